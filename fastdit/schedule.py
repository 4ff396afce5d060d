"""What a configuration will do at each step and layer, computed without a model: a schedule to print, plot and test.

A configuration is defined over noise levels; the scheduler decides how they fall over the steps. `noise_levels` returns those
of flow matching: σ' = s·σ / (1 + (s − 1)·σ) for the shift s, with σ evenly spaced from 1 to 1/steps. Euler and Heun use them
if the pipeline passes them in; UniPC and DPM++ are within .003. By default Euler and Heun space σ evenly from 1 to the
smallest level of training: then pass the scheduler's own `timesteps / 1000` to `schedule`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from fastdit.config import Config


@dataclass(frozen=True)
class Entry:
    """One step of a range of layers (first, last), half-open, that share a phase (None: dense). what: it in words."""

    step: int
    sigma: float
    layers: tuple[int, int]
    phase: int | None
    what: str


def noise_levels(steps: int, shift: float = 5.0) -> list[float]:
    """σ of each step of a flow-matching run. Raises ValueError for steps < 1 or shift <= 0."""
    if steps < 1 or not shift > 0:
        raise ValueError(f"steps >= 1 and shift > 0 must hold, got {steps} and {shift}")
    even = [1 - i / steps for i in range(steps)]
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]


def schedule(config: Config, sigmas: Sequence[float], layers: int = 1) -> list[Entry]:
    """The entries of every step, in the order of its layers. Steps that take statistics differ from steps that reuse them.

    Calls that are dense for other reasons (short sequences, dense maps, the error budget) are not predicted: `report` shows
    what ran.
    """
    entries = []
    last: dict[int, int | None] = {}
    ages: dict[int, int] = {}
    for step, sigma in enumerate(sigmas):
        words = []
        for layer in range(layers):
            phase = config.at(sigma, layer, layers)
            # Statistics belong to a phase, so every phase begins with a refresh.
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
