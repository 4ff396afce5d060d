"""The search for the fastest configuration within an error.

Candidates differ in how dense the window is, in the number format and in the remainder. Each leaves one number open that
trades time for error and that the error follows: `Reuse.drift`, the error of the layers' answers from which a step takes new
statistics. So noise levels get as many dense steps as they need, and a search has few numbers to find. For each candidate the
largest drift is found at which the velocity error stays within the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastdit.config import TILE, Config, Phase, Reuse
from fastdit.core.number_format import Quant
from fastdit.policies import Window

DENSITIES = (0.125, 0.0625, 0.25)
"""In the order of trial: the first is the presets'."""
REFRESH = 20
"""The most steps between two refreshes: the drift asks for one long before."""
MOST_TRIALS = 5
"""Of one candidate."""
NEAR = 0.93
"""Share of the budget from which on a candidate's drift is left as it is."""
FIRST, MOST = 4.5, 2.0
"""The first drift, in budgets: a layer's answer is further off than the velocity, to which the block's input adds itself. And
the largest: twice the answer's own norm."""


@dataclass(frozen=True)
class Trial:
    """A configuration that was tried. error: relative L2 of the velocity at the dense run's inputs, mean over steps and clips;
    seconds: of the denoiser's calls in these steps."""

    config: Config
    error: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {"config": self.config.to_dict(), "error": self.error, "seconds": self.seconds}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Trial:
        return cls(Config.from_dict(fields["config"]), float(fields["error"]), float(fields["seconds"]))


Measure = Callable[[Config], Trial]


def configuration(density: float, drift: float, least: int | None = None) -> Config:
    """One phase from the first step on, which is a refresh and so dense. least: `Config.min_tokens`."""
    phase = Phase((1.0, 0.0), Window(density=density), reuse=Reuse("residual", REFRESH, drift=drift))
    return Config((phase,), TILE, min_tokens=least)


def with_drift(config: Config, drift: float) -> Config:
    (phase,) = config.phases
    return replace(config, phases=(replace(phase, reuse=replace(phase.reuse, drift=rounded(drift))),))


def drift_of(config: Config) -> float:
    (phase,) = config.phases
    assert phase.reuse.drift is not None
    return phase.reuse.drift


def rounded(drift: float) -> float:
    """To three digits, so that a resumed search asks for the same configurations."""
    return float(f"{drift:.3g}")


def search(
    measure: Measure, budget: float, formats: tuple[Quant, ...], dense_seconds: float, least: int | None = None
) -> Iterator[Trial]:
    """Every trial in turn; the caller keeps the best (`better`), and may stop at any time. least: `Config.min_tokens`.

    First the densities, then the best of them with each number format, and the best of all with the pooled remainder.
    """
    best: list[Trial] = []  # the last is the best so far
    for config in _candidates(best, budget, formats, least):
        for trial in tuned(measure, config, budget, best[-1].seconds if best else dense_seconds):
            if (found := better(best[-1] if best else None, trial, budget)) is trial:
                best.append(found)
            yield trial


def _candidates(best: Sequence[Trial], budget: float, formats: tuple[Quant, ...], least: int | None) -> Iterator[Config]:
    """Each made when the one before was tried: from the best of these, if there is one."""
    drift = rounded(min(MOST, FIRST * budget))
    for density in DENSITIES:
        yield configuration(density, drift_of(best[-1].config) if best else drift, least)
    for quant in formats if best else ():
        phase = best[-1].config.phases[0]
        yield replace(best[-1].config, phases=(replace(phase, quant=quant),))
    if best:
        yield replace(best[-1].config, phases=(replace(best[-1].config.phases[0], remainder="pooled"),))


def better(best: Trial | None, trial: Trial, budget: float) -> Trial | None:
    """The faster of the two that keep to the budget."""
    if trial.error > budget:
        return best
    return trial if best is None or trial.seconds < best.seconds else best


def tuned(measure: Measure, config: Config, budget: float, seconds: float) -> Iterator[Trial]:
    """Trials of one candidate with other drifts, until its error is just within the budget.

    Given up where it is not faster than `seconds` though its error is above the budget: less error takes more time.
    """
    below, above = 0.0, math.inf  # drifts known to be within the budget, and beyond
    known: list[tuple[float, float]] = []
    drift = drift_of(config)
    for _ in range(MOST_TRIALS):
        trial = measure(with_drift(config, drift))
        yield trial
        known.append((drift, trial.error))
        if trial.error <= budget:
            below = max(below, drift)
            if trial.error >= NEAR * budget or drift >= MOST:
                return
        else:
            above = min(above, drift)
            if trial.seconds >= seconds:
                return
        drift = rounded(_next(known, budget, below, above))
        if drift in {each for each, _ in known}:
            return


def _next(known: list[tuple[float, float]], budget: float, below: float, above: float) -> float:
    """The drift to try: where a power law through the last two trials meets the budget, between what is known."""
    power = 1.0
    if len(known) > 1:
        (a, error_a), (b, error_b) = known[-2:]
        if min(error_a, error_b) > 0 and a != b:
            power = min(3.0, max(0.4, math.log(error_b / error_a) / math.log(b / a)))
    drift, error = known[-1]
    aim = (1 + NEAR) / 2 * budget
    wanted = drift * min(3.0, max(1 / 3, (aim / max(error, 1e-9)) ** (1 / power)))
    if below > 0 and above < math.inf and not 1.02 * below < wanted < 0.98 * above:
        wanted = math.sqrt(below * above)
    return min(MOST, wanted)


def formats_for(device: str) -> tuple[Quant, ...]:
    """Number formats that are faster on a device: on a CPU none."""
    if device != "cuda":
        return ()
    import torch

    if torch.cuda.get_device_capability() < (8, 9):
        return (Quant("int8", smooth_k=True),)
    return Quant("fp8", "fp8"), Quant("int8", "fp8", smooth_k=True)
