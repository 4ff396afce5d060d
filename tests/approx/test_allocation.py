"""Forms by the byte: against every allocation there is, on small cases."""

import itertools
import random

import pytest

from fastdit.approx.allocation import allocate


def total(choices, found):
    return tuple(sum(choices[i][j][part] for i, j in enumerate(found)) for part in (0, 1))


def best(choices, budget):
    fits = (
        found
        for found in itertools.product(*(range(len(options)) for options in choices))
        if total(choices, found)[0] <= budget
    )
    return min((total(choices, found)[1] for found in fits), default=None)


def drawn(seed):
    rng = random.Random(seed)
    choices = []
    for _ in range(rng.randint(1, 5)):
        size, error = rng.randint(1, 40), rng.random()
        options = [(size, error)]
        for _ in range(rng.randint(0, 4)):
            size, error = size + rng.randint(1, 40), error * rng.uniform(0.2, 1.1)  # some are of no use
            options.append((size, error))
        rng.shuffle(options)
        choices.append(options)
    return choices, rng.randint(1, 300)


@pytest.mark.parametrize("seed", range(200))
def test_it_fits_and_is_no_worse_than_the_best_of_one_step_less_room(seed):
    choices, budget = drawn(seed)
    found = allocate(choices, budget)
    if found is None:
        assert best(choices, budget) is None
        return
    size, error = total(choices, found)
    assert size <= budget
    step = max(max(s for s, _ in options) - min(s for s, _ in options) for options in choices)
    assert error <= (best(choices, budget - step) or float("inf")) + 1e-12
    assert error >= best(choices, budget) - 1e-12


def test_near_the_best_on_average():
    ratios = []
    for seed in range(400):
        choices, budget = drawn(seed)
        if (found := allocate(choices, budget)) is not None and (least := best(choices, budget)) > 0:
            ratios.append(total(choices, found)[1] / least)
    assert sum(ratios) / len(ratios) < 1.03


def test_equal_steps_of_falling_gain_are_exact():
    """Where every step takes as many bytes, greedy is optimal at each budget."""
    rng = random.Random(0)
    for _ in range(40):
        choices = []
        for _ in range(4):
            gains = sorted((rng.random() for _ in range(3)), reverse=True)
            choices.append([(10 * (j + 1), 3 - sum(gains[:j])) for j in range(4)])
        for budget in range(40, 170, 10):
            assert total(choices, allocate(choices, budget))[1] == pytest.approx(best(choices, budget))


def test_room_for_all_gives_all_the_best_and_for_none_none():
    choices = [[(1, 5.0), (10, 1.0)], [(2, 4.0), (3, 4.0), (20, 0.5)]]
    assert allocate(choices, 30) == [1, 2]
    assert allocate(choices, 29) == [1, 0]
    assert allocate(choices, 22) == [1, 0]
    assert allocate(choices, 11) == [0, 0]
    assert allocate(choices, 3) == [0, 0]
    assert allocate(choices, 2) is None
    assert allocate([], 0) == []


def test_what_matters_more_gets_more():
    """Same sizes, one thing's errors a hundred times the other's."""
    options = [(1, 1.0), (4, 0.3), (8, 0.01)]
    assert allocate([options, [(s, 100 * e) for s, e in options]], 9) == [0, 2]
