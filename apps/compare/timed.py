"""What the runs of one call gave: times, memory, and how close each configuration came to dense."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdit import Report
    from fastdit.apps.compare.machine import Watch
    from fastdit.apps.render.draw import Clip


@dataclass
class Timed:
    """The runs of one configuration, or of dense. clip: the first's. stages: seconds of "text", "denoise" and "decode" of each
    run. peak: the most bytes (`Watch.peak`)."""

    clip: Clip
    stages: list[dict[str, float]] = field(default_factory=list)
    peak: int = 0

    def add(self, clip: Clip, watch: Watch) -> None:
        self.stages.append(clip.seconds)
        self.peak = max(self.peak, watch.peak)

    @property
    def runs(self) -> list[float]:
        """Seconds of each denoising loop."""
        return [stages["denoise"] for stages in self.stages]

    @property
    def seconds(self) -> float:
        """The best denoising loop."""
        return min(self.runs)

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    @property
    def spread(self) -> float | None:
        """(slowest − fastest) / fastest denoising loop; None for a single run."""
        return (max(self.runs) - self.seconds) / self.seconds if len(self.runs) > 1 else None


@dataclass
class Variant(Timed):
    """The runs of one preset. velocity: mean relative error in each phase that ran. psnr, ssim, flicker (`flicker_change`):
    mean over frames, NaN where there are none; latents: relative L2 of the last latents, NaN if the pipeline hides them."""

    report: Report = None  # type: ignore[assignment]
    psnr: float = math.nan
    ssim: float = math.nan
    flicker: float = math.nan
    latents: float = math.nan
    velocity: list[dict[str, Any]] = field(default_factory=list)

    @property
    def dense_because(self) -> str | None:
        """Why no sparse attention ran at all; None if some did."""
        if self.report.density < 1 or any(site.ran == "sparse" for site in self.report.sites):
            return None
        reasons = Counter(site.reason for site in self.report.sites if site.reason)
        return reasons.most_common(1)[0][0] if reasons else "the configuration is dense"

    def to_dict(self, dense_seconds: float) -> dict[str, Any]:
        """For JSON; psnr_db None: equal to dense."""
        return {
            "fast_s": self.seconds,
            "ratio": dense_seconds / self.seconds,
            "density": self.report.density,
            "psnr_db": finite(self.psnr),
            "ssim": finite(self.ssim),
            "velocity_error": self.velocity,
            "stayed_dense": self.dense_because,
        }


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass
class Comparison:
    """One call, dense and by each configuration. kernel: name of the dense attention kernel; tokens: in the denoiser's
    sequence, None if its call does not tell; others: share of the processors' time that other processes took in each run."""

    dense: Timed
    kernel: str
    tokens: int | None
    variants: dict[str, Variant] = field(default_factory=dict)
    others: list[float] = field(default_factory=list)

    @property
    def dense_seconds(self) -> float:
        """The best denoising loop."""
        return self.dense.seconds

    def whole(self, timed: Timed) -> float:
        """Seconds of a whole call: its best denoising loop, and the least that encoding text and decoding took in any run, as
        acceleration does not change them."""
        every = [stages for each in (self.dense, *self.variants.values()) for stages in each.stages]
        return timed.seconds + min(stages["text"] for stages in every) + min(stages["decode"] for stages in every)
