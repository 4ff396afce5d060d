"""Where the tokens sit: a video grid cut into 3D tiles, with optional text before or after it.

A denoiser flattens its latent grid T×H×W frame by frame (raster order) and may put text tokens before or after it. A
*tile* is one t×h×w brick of that grid, the unit of sparsity and of scales (FPSAttention, arXiv 2506.04648 §3; Sliding
Tile Attention, arXiv 2502.04507 §3). In *tile order* the tokens of a tile are contiguous, so a block-sparse kernel sees
only whole blocks. Tiles that overhang the grid are padded: missing tokens are -1 in `Layout.order`, always after the
tile's real tokens, and have no weight. Text has tiles of its own, after the video's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from fastdit.core.byte_cache import byte_cache, sent

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Layout:
    """Grid and tile in tokens (T, H, W); `text_len` text tokens before (`text_first`) or after the video."""

    grid: Grid
    tile: Grid
    text_len: int = 0
    text_first: bool = False

    def __post_init__(self) -> None:
        for name, axes in (("grid", self.grid), ("tile", self.tile)):
            if len(axes) != 3 or any(int(a) != a or a < 1 for a in axes):
                raise ValueError(f"{name} must be three positive whole numbers (T, H, W), got {axes}")
        if self.text_len < 0:
            raise ValueError(f"text_len must be >= 0, got {self.text_len}")

    @property
    def tile_grid(self) -> Grid:
        """Tiles along T, H and W; the last one of an axis may overhang."""
        t, h, w = (math.ceil(g / s) for g, s in zip(self.grid, self.tile, strict=True))
        return t, h, w

    @property
    def tile_tokens(self) -> int:
        """Slots of one tile, padding included."""
        return math.prod(self.tile)

    @property
    def video_len(self) -> int:
        return math.prod(self.grid)

    @property
    def video_tiles(self) -> int:
        return math.prod(self.tile_grid)

    @property
    def frame_tiles(self) -> int:
        """Tiles of the first frame, which lead the order: all with the least coordinate along T."""
        return self.video_tiles // self.tile_grid[0]

    @property
    def text_tiles(self) -> int:
        return math.ceil(self.text_len / self.tile_tokens)

    @property
    def num_tiles(self) -> int:
        return self.video_tiles + self.text_tiles

    @property
    def length(self) -> int:
        """All tokens: the N of attention's [B, H, N, D]."""
        return self.video_len + self.text_len

    @property
    def is_padded(self) -> bool:
        return self.num_tiles * self.tile_tokens != self.length

    def order(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 [num_tiles, tile_tokens]: the token in each slot of each tile, -1 where padded."""
        return _order(self, str(device))

    def counts(self, device: torch.device | str = "cpu") -> Tensor:
        """int64 [num_tiles]: real tokens of each tile."""
        return (self.order(device) >= 0).sum(-1)

    def to_tiles(self, x: Tensor) -> Tensor:
        """[B, H, N, D] in token order -> [B, H, num_tiles, tile_tokens, D], zeros in padded slots. ValueError if N differs."""
        if x.shape[2] != self.length:
            raise ValueError(f"expected {self.length} tokens for {self}, got {x.shape[2]}")
        order = self.order(x.device)
        tiled = x.index_select(2, order.clamp(min=0).flatten())
        if self.is_padded:
            tiled.index_fill_(2, _padding(self, str(x.device)), 0)
        return tiled.unflatten(2, (self.num_tiles, self.tile_tokens))

    def from_tiles(self, x: Tensor) -> Tensor:
        """Inverse of `to_tiles`: [B, H, num_tiles, tile_tokens, D] -> [B, H, N, D]; padded slots are dropped."""
        order = self.order(x.device).flatten()
        slot = torch.empty(self.length, dtype=torch.long, device=x.device)
        real = order >= 0
        slot[order[real]] = torch.arange(len(order), device=x.device)[real]
        return x.flatten(2, 3).index_select(2, slot)


ORDER_BYTES = 64 << 20
"""Bound on the cached orders of all layouts; an order of 75,600 tokens takes 600 KB."""


@byte_cache(ORDER_BYTES)
def _order(layout: Layout, device: str) -> Tensor:
    (T, H, W), (t, h, w), (nt, nh, nw) = layout.grid, layout.tile, layout.tile_grid
    index = torch.full((nt * t, nh * h, nw * w), -1, dtype=torch.long, device="cpu")
    index[:T, :H, :W] = torch.arange(T * H * W, device="cpu").view(T, H, W)
    tiles = index.view(nt, t, nh, h, nw, w).permute(0, 2, 4, 1, 3, 5).reshape(-1, layout.tile_tokens)
    # Padding follows the tile's real tokens, so that a kernel needs only a count per tile.
    tiles = tiles.gather(1, (tiles < 0).to(torch.int8).argsort(dim=1, stable=True))
    if layout.text_len:
        text = torch.full((layout.text_tiles * layout.tile_tokens,), -1, dtype=torch.long, device="cpu")
        text[: layout.text_len] = torch.arange(layout.text_len, device="cpu")
        video_start, text_start = (layout.text_len, 0) if layout.text_first else (0, layout.video_len)
        tiles = torch.cat([_shift(tiles, video_start), _shift(text, text_start).view(-1, layout.tile_tokens)])
    return sent(tiles.contiguous(), device)


@byte_cache(ORDER_BYTES)
def _padding(layout: Layout, device: str) -> Tensor:
    """int64 [n]: indices of the empty slots, counted over all tiles."""
    return sent((layout.order().flatten() < 0).nonzero().flatten(), device)


def _shift(index: Tensor, start: int) -> Tensor:
    return torch.where(index >= 0, index + start, index)


@lru_cache(maxsize=256)
def fit_tile(grid: Grid, target: int = 64) -> Grid:
    """The default tile for a grid: about `target` tokens, close to a cube, and a divisor of the grid if possible.

    Minimises |log2(tokens / target)| + |log2 aspect| / 4 + 8 × padding, where padding is the share of padded slots.
    Exact divisors therefore win where the grid has usable ones (Wan 720p: 21×45×80), and a prime side costs a little padding
    instead of an extreme tile (Sliding Tile Attention's fixed (6, 8, 8) would pad Wan's grids by 22-31 %).
    Raises ValueError for target < 1.
    """
    if target < 1:
        raise ValueError(f"target tokens per tile must be >= 1, got {target}")

    def cost(tile: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        slots = math.prod(math.ceil(g / s) * s for g, s in zip(grid, tile, strict=True))
        padding = 1 - math.prod(grid) / slots
        aspect = math.log2(max(tile) / min(tile))
        return abs(math.log2(math.prod(tile) / target)) + aspect / 4 + 8 * padding, tile

    sides = [range(1, min(g, 2 * target) + 1) for g in grid]
    t, h, w = min((tile for tile in product(*sides) if math.prod(tile) <= 2 * target), key=cost, default=(1, 1, 1))
    return t, h, w
