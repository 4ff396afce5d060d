"""PowerAttention (Chen et al., arXiv 2503.03588 §3): distances that are powers of two, so that depth reaches everything.

A query attends its neighbours and the blocks at distance 1, 2, 4, …: after ⌈log2 n⌉ layers information has reached it from
everywhere, at O(log n) blocks per query. The paper's pattern is causal and one-dimensional; a video has three axes and no
order. So *axes* takes powers of two along each axis from the query's tile, and *raster* the distance between tile indices.
The paper trains with it. Untrained on the embedded model, it loses to a window on its own; with the pooled remainder it was
the best static policy at density 1/8 (docs/policies.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastdit.core.layout import Grid, Layout
from fastdit.policies.base import Policy
from fastdit.policies.scores import tile_coordinates
from fastdit.policies.window import Window


@dataclass(frozen=True)
class PowerOfTwo(Policy):
    """window: tiles (t, h, w) around the query's own, attended as well. along: "axes" or "raster"."""

    window: Grid = (1, 1, 1)
    along: Literal["axes", "raster"] = "axes"

    name: ClassVar[str] = "power_of_two"
    reads: ClassVar[str] = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", Window(size=self.window).size)  # raises ValueError for an invalid window
        if self.along not in ("axes", "raster"):
            raise ValueError(f"power_of_two: along must be 'axes' or 'raster', got {self.along!r}")

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        axes = tile_coordinates(layout) if self.along == "axes" else (torch.arange(layout.video_tiles, device="cpu"),)
        far = torch.stack([(x[:, None] - x).abs() for x in axes])
        power = (far & (far - 1)) == 0  # or zero
        reach = power.all(0) & ((far > 0).sum(0) <= 1)
        return Window(size=self.window).select(layout) | reach
