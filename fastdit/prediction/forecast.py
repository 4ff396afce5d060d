"""What is known of a run before it: one forecast for each configuration, as numbers and in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fastdit.config import Config
from fastdit.core.layout import Grid


@dataclass(frozen=True)
class Forecast:
    """One configuration. density: mean over all calls of all sites, in [0, 1], None: unknown. dense: (reason, number of sites)
    of those that never are sparse. gpu_bytes, host_bytes: most that statistics take. forms: (form, residuals). about: the bytes
    depend on errors that only a run measures. ratio: seconds of denoising, dense over accelerated, None: unknown. sure:
    "measured", "estimated" or "unknown". why: what is unknown, or that nothing is gained."""

    name: str
    config: Config
    density: float | None
    dense: tuple[tuple[str, int], ...]
    gpu_bytes: int
    host_bytes: int
    forms: tuple[tuple[str, int], ...]
    about: bool
    ratio: float | None
    sure: str
    why: str | None = None

    @property
    def speed(self) -> str:
        """The ratio in words."""
        return "unknown" if self.ratio is None else f"{self.ratio:.2f} × ({self.sure})"


@dataclass(frozen=True)
class Prediction:
    """What `predict` returns. grid: tokens (T, H, W). text: other tokens in the same sequence, "at most" where not `exact`.
    tokens: grid and text together. levels: σ of every step, None: unknown. branches: calls a step for one clip. gpu: a name,
    or "cpu". weights, free: bytes of the pipeline, and free for the run before statistics, on the GPU (or the CPU).
    step_seconds: of one dense step with all branches, None: not measured on such a device. forecasts: one a configuration."""

    pipeline: str
    grid: Grid
    text: int
    exact: bool
    steps: int
    levels: tuple[float, ...] | None
    branches: int
    gpu: str
    weights: int
    free: int
    step_seconds: float | None
    forecasts: tuple[Forecast, ...]

    @property
    def tokens(self) -> int:
        return math.prod(self.grid) + self.text

    def __getitem__(self, name: str) -> Forecast:
        """The forecast of a preset. Raises KeyError."""
        return {each.name: each for each in self.forecasts}[name]

    def line(self, name: str | None = None) -> str:
        """One forecast in a line; None: the first."""
        found = self.forecasts[0] if name is None else self[name]
        density = "unknown" if found.density is None else f"{found.density:.2f}"
        text = f"{self.tokens:,} tokens, {found.name}: density {density}, statistics {_memory(found)}, {found.speed}"
        return f"{text}{f' ({found.why})' if found.why else ''}"

    def __str__(self) -> str:
        t, h, w = self.grid
        text = "" if not self.text else f" and {'' if self.exact else 'at most '}{self.text} of text"
        step = "" if self.step_seconds is None else f", about {self.step_seconds:.2f} s a dense step"
        head = (
            f"{self.pipeline} on {self.gpu}: {t}×{h}×{w} = {t * h * w:,} tokens{text}, {self.steps} steps, "
            f"{self.branches} call{'s' * (self.branches > 1)} each{step}\n"
            f"weights {gigabytes(self.weights)}, free beside the run {gigabytes(self.free)}"
        )
        rows = [("preset", "density", "statistics", "speed of denoising", "stays dense, and why")]
        for each in self.forecasts:
            why = "; ".join([f"{count} sites: {reason}" for reason, count in each.dense] + ([each.why] if each.why else []))
            density = "unknown" if each.density is None else f"{each.density:.3f}"
            rows.append((each.name, density, _memory(each), each.speed, why))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([head, *lines])

    def to_dict(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        found = {name: value for name, value in vars(self).items() if name != "forecasts"}
        rows = [{**vars(each), "config": each.config.to_dict()} for each in self.forecasts]
        return found | {"tokens": self.tokens, "forecasts": rows}


def _memory(found: Forecast) -> str:
    if not found.gpu_bytes + found.host_bytes:
        return "none"
    places = [f"{gigabytes(size)} {where}" for size, where in ((found.gpu_bytes, "GPU"), (found.host_bytes, "host")) if size]
    names = "+".join(form for form, _ in found.forms)
    return f"{'about ' if found.about else ''}{', '.join(places)} ({names})"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
