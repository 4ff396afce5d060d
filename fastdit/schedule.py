"""What a configuration will do at which step and layer, told without a model: a schedule to print, plot and test.

A configuration speaks of noise levels; how they fall over the steps is the scheduler's affair. `noise_levels` gives those of
flow matching: σ' = s·σ / (1 + (s − 1)·σ) for the shift s, σ evenly from 1 to 1/steps. Euler and Heun have them where the
pipeline hands them over, UniPC and DPM++ to within .003. Euler and Heun left to themselves go evenly from 1 to the smallest
level they were trained on: give `schedule` the scheduler's own `timesteps / 1000` then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from fastdit.config import Config


@dataclass(frozen=True)
class Entry:
    """At one step: layers (first, last), half-open, that share a phase (None: dense), and what that is in words."""

    step: int
    sigma: float
    layers: tuple[int, int]
    phase: int | None
    what: str


def noise_levels(steps: int, shift: float = 5.0) -> list[float]:
    """σ of each step of a flow-matching run. Raises ValueError for steps < 1 or a shift that is not above 0."""
    if steps < 1 or not shift > 0:
        raise ValueError(f"steps >= 1 and shift > 0 must hold, got {steps} and {shift}")
    even = [1 - i / steps for i in range(steps)]
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]


def schedule(config: Config, sigmas: Sequence[float], layers: int = 1) -> list[Entry]:
    """Every step's phases in the order of its layers. Steps that take statistics are told apart from those that use them.

    Dense for other reasons (short sequences, dense maps, the error budget) is not foreseen here: `report` says what ran.
    """
    entries = []
    last: dict[int, int | None] = {}
    ages: dict[int, int] = {}
    for step, sigma in enumerate(sigmas):
        words = []
        for layer in range(layers):
            phase = config.at(sigma, layer, layers)
            # Memory belongs to a phase: another one begins with a refresh, and so does a new age.
            ages[layer] = ages[layer] + 1 if layer in last and last[layer] == phase else 0
            last[layer] = phase
            words.append((phase, _what(config, phase, ages[layer])))
        first = 0
        for (phase, what), group in groupby(words):
            end = first + len(list(group))
            entries.append(Entry(step, sigma, (first, end), phase, what))
            first = end
    return entries


def _what(config: Config, index: int | None, age: int) -> str:
    if index is None:
        return "dense"
    phase = config.phases[index]
    quant = "" if phase.quant.is_none else f", {phase.quant}"
    remainder = "" if phase.remainder == "none" else f", {phase.remainder} remainder"
    if phase.reuse.kind == "none" or phase.policy.name == "dense":
        return f"{phase.policy}{quant}{remainder}"
    if age % phase.reuse.refresh == 0:
        return f"dense, statistics for {phase.reuse.kind} taken"
    if phase.reuse.kind == "broadcast":
        return "the last dense output again"
    return f"{phase.policy}{quant}{remainder}, {phase.reuse.kind}"
