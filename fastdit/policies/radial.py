"""Radial Attention (Li et al., arXiv 2506.19852 §4): the further apart two frames are, the narrower the window between them.

Attention between frames falls off exponentially with their distance d, so the window halves each time d doubles:

    share of the other frame that a query attends = decay / 2^g,   g = bit_length(d):  d = 0 → 1, 1 → ½, 2-3 → ¼, 4-7 → ⅛, …

Where the share is less than one tile, the tile at the same position is attended in every ⌈1/(share · tiles)⌉-th frame only.
The density is O(log T / T). The paper's window is a band over a frame's raster index, in tokens, shrunk to blocks of 128. Here
tiles are neighbours in both directions, so the window is a box of the same area. The paper's sink, the first frame, is
`Config.first_frame`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from fastdit.core.layout import Layout
from fastdit.policies.base import Policy, check_share
from fastdit.policies.window import axis_window


@dataclass(frozen=True)
class Radial(Policy):
    """decay: factor on every window, default 1; > 1 widens them. density: choose the decay that gives this density."""

    decay: float | None = None
    density: float | None = None

    name: ClassVar[str] = "radial"
    reads: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if self.decay is None:
            check_share(self.name, decay=self.decay, density=self.density)
        elif self.density is not None or not 0 < self.decay < math.inf:
            raise ValueError(f"radial: give decay > 0 or density in (0, 1], got decay={self.decay}, density={self.density}")

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        decay = self.decay if self.density is None else fit_decay(layout, self.density)
        return _bands(layout, decay or 1.0)[None, None]


def _bands(layout: Layout, decay: float) -> Tensor:
    T, H, W = layout.tile_grid
    kept = torch.zeros(T, H, W, T, H, W, dtype=torch.bool, device="cpu")
    for d in range(T):
        frames = max(0, d * layout.tile[0] - layout.tile[0] + 1)  # between the nearest frames of two tiles
        share = min(1.0, decay / 2 ** frames.bit_length())
        side = math.sqrt(share)
        rows, columns = (axis_window(n, max(1, round(side * n)), "clamp") for n in (H, W))
        box = rows[:, None, :, None] & columns[:, None]
        if share * H * W < 1 and d % math.ceil(1 / (share * H * W)):
            continue
        for t in range(T - d):
            kept[t, :, :, t + d] = kept[t + d, :, :, t] = box
    return kept.view(T * H * W, T * H * W)


@lru_cache(maxsize=64)
def fit_decay(layout: Layout, density: float) -> float:
    """The decay whose map has the largest density not above `density`, found by bisection; or else the smallest decay."""
    low, high = 2.0**-12, 2.0 ** (2 + layout.grid[0].bit_length())
    for _ in range(40):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if float(_bands(layout, middle).float().mean()) <= density else (low, middle)
    return low
