"""3D windows of tiles: Sliding Tile Attention (arXiv 2502.04507 §3) and FPSAttention (arXiv 2506.04648 §3.2).

Both attend, on each axis, to the tiles near the query's own tile. They differ at the borders of the grid, which makes them
different operators (grid 5×6×10, window 3×3×3: density 9.0 % against 6.5 %):

* ``border="clamp"`` (STA): the window is shifted inwards until it lies inside the grid, so every query attends to exactly
  w_t·w_h·w_w tiles. For a window of w tiles on an axis of n, query tile i attends [s, s + w), s = clamp(i − ⌊w/2⌋, 0, n − w).
  STA's windows are odd; here an even w is exactly w tiles, while STA's own reference widens it to w + 1.
* ``border="truncate"`` (FPSAttention): the window is cut off at the border, |i − j| ≤ ⌊w/2⌋; border queries see fewer tiles.

A window fixed in tiles covers a different share of every grid. ``density`` gives the share instead, and `fit_window` finds
the window for the grid; the presets use it. A window larger than the grid covers all of it, exactly like dense attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, ClassVar, Literal

from fastdit.policies.base import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from fastdit.core.layout import Grid, Layout

TIME_SHARE = 3
"""A window fitted to a density covers this many times more of height and width than of time."""


@dataclass(frozen=True)
class Window(Policy):
    """Attend to a box of tiles around the own tile: `size` = (t, h, w) in tiles, or the box nearest to `density`."""

    size: Grid | None = None
    density: float | None = None
    border: Literal["clamp", "truncate"] = "clamp"

    name: ClassVar[str] = "window"
    reads: ClassVar[str] = ""

    def __post_init__(self) -> None:
        if (self.size is None) == (self.density is None):
            raise ValueError("window: give exactly one of size=(t, h, w) in tiles and density in (0, 1]")
        if self.size is not None:
            if len(self.size) != 3 or any(not isinstance(s, int) or s < 1 for s in self.size):
                raise ValueError(f"window: size must be three whole numbers of tiles >= 1, got {self.size}")
            object.__setattr__(self, "size", tuple(self.size))
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"window: density must lie in (0, 1], got {self.density}")
        if self.border not in ("clamp", "truncate"):
            raise ValueError(f"window: border must be 'clamp' (STA) or 'truncate' (FPSAttention), got {self.border!r}")

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        size = self.size or fit_window(layout.tile_grid, self.density or 1.0, self.border)
        near_t, near_h, near_w = (axis_window(n, w, self.border) for n, w in zip(layout.tile_grid, size, strict=True))
        box = near_t[:, None, None, :, None, None] & near_h[:, None, None, :, None] & near_w[:, None, None, :]
        return box.reshape(1, 1, layout.video_tiles, layout.video_tiles)

    def __str__(self) -> str:
        what = "×".join(map(str, self.size)) if self.size else f"{self.density:g}"
        return f"window({what}, {self.border})"


def axis_window(tiles: int, window: int, border: str) -> Tensor:
    """One axis: bool [tiles, tiles], True where query tile (row) attends key tile (column)."""
    import torch

    i = torch.arange(tiles, device="cpu")
    if border == "truncate":
        return (i[:, None] - i).abs() <= window // 2
    start = (i - window // 2).clamp(min=0).clamp(max=max(tiles - window, 0))
    return (i >= start[:, None]) & (i < start[:, None] + window)


@lru_cache(maxsize=256)
def fit_window(tile_grid: Grid, density: float, border: str = "clamp") -> Grid:
    """The window, in tiles, for a density on this tile grid.

    Minimises |log(density / wanted)| + |log(aspect / TIME_SHARE)| / 4, where aspect is the share of height or width that
    the window covers over its share of time. A third as much of time as of space had the lowest error at equal density on
    the embedded model (CHANGELOG.md). Large models also attend most to near frames (Radial Attention, arXiv 2506.19852 §3).
    """
    steps = [range(1, n + 1) if border == "clamp" else range(1, 2 * n, 2) for n in tile_grid]
    share = [{w: float(axis_window(n, w, border).float().mean()) for w in s} for n, s in zip(tile_grid, steps, strict=True)]

    def cost(size: tuple[int, ...]) -> tuple[float, float]:
        cover = [share[axis][w] for axis, w in enumerate(size)]
        miss = abs(math.log(math.prod(cover) / density))
        uneven = abs(math.log(max(cover[1:]) / cover[0] / TIME_SHARE)) + math.log(max(cover[1:]) / min(cover[1:]))
        return round(miss + uneven / 4, 6), -cover[0]

    t, h, w = min(product(*steps), key=cost)
    return t, h, w
