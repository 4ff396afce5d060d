"""Sparse VideoGen (Xi et al., arXiv 2502.01776 §4): a head attends either near its own frame or along time.

*Spatial* heads attend all of their own frame and of a band of frames around it. *Temporal* heads attend the same position, and
a band around it, in all frames. The paper's temporal mask is its spatial mask on tokens reordered so that all frames of one
position are neighbours (`permute` below). Tiles are bricks, so no token moves and both maps use the same tiles. The band's
half-width follows from the density r as in the paper: N·(1 − √(1 − r)) on each side of the diagonal, in tiles.

Each call computes a few query rows (32 in the paper's code) with full attention, the spatial map and the temporal map; a head
takes the map with the smaller squared error of the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdit.core.byte_cache import byte_cache, sent
from fastdit.core.layout import Layout
from fastdit.policies.base import Policy, check_share
from fastdit.policies.scores import tile_coordinates


@dataclass(frozen=True)
class SpatialTemporal(Policy):
    """density: of either map, in (0, 1]. rows: query rows sampled for the choice, the same ones in every call (`seed`)."""

    density: float = 0.25
    rows: int = 32
    seed: int = 0

    name: ClassVar[str] = "spatial_temporal"
    reads: ClassVar[str] = "qkv"

    def __post_init__(self) -> None:
        check_share(self.name, density=self.density)
        if self.rows < 1:
            raise ValueError(f"spatial_temporal: rows must be >= 1, got {self.rows}")

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        if q is None or k is None or v is None:
            raise ValueError("spatial_temporal needs q, k and v")
        spatial, temporal, rows = _ready(self, layout, str(q.device))
        real, tile = layout.order(q.device)[: layout.video_tiles].flatten() >= 0, rows // layout.tile_tokens
        query, key, value = q.flatten(2, 3)[:, :, rows].float(), k.flatten(2, 3).float(), v.float()
        logits = (query @ key.mT * q.shape[-1] ** -0.5).masked_fill(~real, float("-inf"))
        # Values by frames of tiles: one product of 32 rows with all keys would occupy only a dozen of a GPU's cores.
        value = value.unflatten(2, (layout.tile_grid[0], -1)).flatten(3, 4)
        full, near_space, near_time = (
            self._answer(logits, value, kept[tile].repeat_interleave(layout.tile_tokens, -1))
            for kept in (torch.ones_like(spatial), spatial, temporal)
        )
        errors = [(near - full).square().sum((-1, -2), keepdim=True) for near in (near_space, near_time)]
        return torch.where(errors[0] <= errors[1], spatial, temporal)

    @staticmethod
    def _answer(logits: Tensor, value: Tensor, kept: Tensor) -> Tensor:
        """Attention of a few rows to kept keys: logits [B, H, rows, N], value [B, H, frames, N / frames, D], kept [rows, N]."""
        weights = logits.masked_fill(~kept, float("-inf")).softmax(-1)
        return (weights.unflatten(-1, value.shape[2:4]).transpose(2, 3) @ value).sum(2)

    def maps(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """The spatial and the temporal map, bool [video_tiles, video_tiles] each."""
        n = layout.video_tiles
        half = max(0, round(n * (1 - math.sqrt(1 - self.density))) - 1)
        index = torch.arange(n, device="cpu")
        band = (index[:, None] - index).abs() <= half
        rank = permute(layout)
        return band, band[rank[:, None], rank]


@byte_cache(64 << 20)
def _ready(policy: SpatialTemporal, layout: Layout, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Both maps, and the slots of the sampled rows. Cached, because they are the same in every call."""
    slots = (layout.order()[: layout.video_tiles].flatten() >= 0).nonzero().flatten()
    drawn = torch.randperm(len(slots), generator=torch.Generator().manual_seed(policy.seed), device="cpu")
    spatial, temporal = policy.maps(layout)
    return sent(spatial, device), sent(temporal, device), sent(slots[drawn[: policy.rows]], device)


def permute(layout: Layout) -> Tensor:
    """int64 [video_tiles]: rank of each video tile when tiles are ordered by position, then by frame."""
    t, h, w = tile_coordinates(layout)
    T, _, W = layout.tile_grid
    return (h * W + w) * T + t
