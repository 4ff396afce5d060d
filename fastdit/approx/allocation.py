"""Which of several forms each of many things is kept in, so that all fit a budget and the sum of their errors is small."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

Option = tuple[int, float]
"""Bytes, error."""


def allocate(choices: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """For each thing the number of the option it gets: choices[i] lists its options (bytes, error), in any order; all together
    take at most `budget` bytes. None where even the smallest do not fit.

    Greedy on marginal error per byte (Shoham & Gersho 1988): all begin with their smallest option, and the step on anyone's
    convex hull that takes away most error per byte is taken next, as long as it fits; one that does not fit ends its thing's
    steps. Last, what room is left goes to the single exchanges that gain most. Errors must add up (squares of norms do). Among
    allocations of as many bytes as the hull steps took the result is the best; of the whole budget it wastes less than the
    largest step that did not fit.
    """
    hulls = [_hull(options) for options in choices]
    at = [0] * len(hulls)
    left = budget - sum(choices[i][hull[0]][0] for i, hull in enumerate(hulls))
    if left < 0:
        return None

    def next_step(i: int) -> tuple[float, int, int] | None:
        if at[i] + 1 >= len(hulls[i]):
            return None
        (size, error), (more, less) = (choices[i][hulls[i][at[i] + j]] for j in (0, 1))
        return (less - error) / (more - size), i, more - size

    steps = [step for i in range(len(hulls)) if (step := next_step(i)) is not None]
    heapq.heapify(steps)
    while steps:
        _, i, cost = heapq.heappop(steps)
        if cost <= left:
            left -= cost
            at[i] += 1
            if (step := next_step(i)) is not None:
                heapq.heappush(steps, step)
    found = [hull[place] for hull, place in zip(hulls, at, strict=True)]
    while True:
        gains = [
            (choices[i][now][1] - error, i, option)
            for i, now in enumerate(found)
            for option, (size, error) in enumerate(choices[i])
            if size - choices[i][now][0] <= left and error < choices[i][now][1]
        ]
        if not gains:
            return found
        _, i, option = max(gains)
        left -= choices[i][option][0] - choices[i][found[i]][0]
        found[i] = option


def _hull(options: Sequence[Option]) -> list[int]:
    """The options of the lower convex hull of error over bytes, from the smallest on: ever less gain a byte."""
    order = sorted(range(len(options)), key=lambda j: options[j])
    hull: list[int] = []
    for j in order:
        size, error = options[j]
        if hull and (error >= options[hull[-1]][1] or size == options[hull[-1]][0]):
            continue
        while len(hull) > 1:
            (a, x), (b, y) = options[hull[-2]], options[hull[-1]]
            if (x - y) * (size - b) > (y - error) * (b - a):
                break
            hull.pop()
        hull.append(j)
    return hull
