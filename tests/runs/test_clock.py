import pytest

from fastdit.runs.clock import Clock


@pytest.mark.parametrize("calls", [1, 2, 6])
def test_steps_are_noise_levels_not_calls(calls):
    clock = Clock()
    for run in (1, 2):
        for step, sigma in enumerate((1.0, 0.8, 0.5, 0.1)):
            begins = [clock.observe(sigma) for _ in range(calls)]
            assert begins == [step == 0] + [False] * (calls - 1)
            assert (clock.run, clock.step, clock.sigma) == (run, step, sigma)


def test_a_run_cut_short_is_followed_by_a_new_one():
    clock = Clock()
    for sigma in (0.9, 0.7, 0.6):
        clock.observe(sigma)
    assert clock.observe(0.9)
    assert (clock.run, clock.step) == (2, 0)


def test_rounding_is_not_a_step():
    clock = Clock()
    clock.observe(0.5)
    assert not clock.observe(0.5 + 1e-6)
    assert not clock.observe(0.5 - 1e-6)
    assert clock.step == 0
