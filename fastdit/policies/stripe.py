"""AnchorAttention (Zhang et al., arXiv 2505.23520 §3): keep the keys whose logit comes close to the largest one nearby.

The paper computes attention exactly over the initial block and a local window; the largest logit there is a query's *anchor*.
Queries and anchors are averaged over blocks. Another key is kept if its logit with a block's mean query comes within theta of
the block's mean anchor, for any block of the group: a dropped key weighs less than e^−theta of the anchor. A video has no
causal order, so "initial" is the first frame and "local" a window of tiles. Text, which no policy sees, is part of the anchor
in the remainder "stripes", the paper's method at the granularity of keys.

This file is the method at the granularity of tiles: a key tile is kept if any of its keys passes. Only the mean query is
compared, so a key that matters to a single query can be missed, in the paper as here. On the embedded model, with a window of
one tile, that is no better than random tiles (docs/policies.md): the threshold keeps whole tiles for single keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdit.core.byte_cache import byte_cache, sent
from fastdit.core.layout import Grid, Layout
from fastdit.policies.base import Policy
from fastdit.policies.scores import ROWS_BYTES, means
from fastdit.policies.window import Window


@dataclass(frozen=True)
class Stripe(Policy):
    """theta: in logits (natural log), the paper's 12; ∞ keeps everything, −∞ only the first frame and the window.
    window: local tiles (t, h, w). group: consecutive query tiles that share their keys (the paper: 16 blocks)."""

    theta: float = 12.0
    window: Grid = (1, 3, 3)
    group: int = 1

    name: ClassVar[str] = "stripe"

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", Window(size=self.window).size)  # raises ValueError for an invalid window
        if self.theta != self.theta or self.group < 1:
            raise ValueError(f"stripe: theta must be a number and group >= 1, got {self.theta} and {self.group}")

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        if q is None or k is None:
            raise ValueError("stripe needs q and k")
        near, local = _ready(self.window, layout, str(q.device))
        first = layout.frame_tiles
        real = layout.order(q.device)[: layout.video_tiles] >= 0
        # Added to logits: −∞ hides padding.
        minus = torch.zeros(real.shape, dtype=torch.float32, device=q.device).masked_fill(~real, float("-inf"))
        queries, keys = q.float() * q.shape[-1] ** -0.5, k.float()
        pooled, start = means(queries, layout), keys[:, :, :first].flatten(2, 3).mT
        outside = minus[local].masked_fill(~near.gather(1, local)[..., None], float("-inf"))
        B, H, tiles, slots, _ = k.shape
        rows = max(1, ROWS_BYTES // (4 * B * H * tiles * slots))
        kept = []
        for part in torch.arange(tiles, device=q.device).split(rows):
            mine = queries[:, :, part]
            top = (mine.flatten(2, 3) @ start + minus[:first].flatten()).amax(-1).unflatten(-1, (-1, slots))
            for each in range(local.shape[1]):
                logits = mine @ keys[:, :, local[part, each]].mT
                top = top.maximum((logits + outside[part, each, None]).amax(-1))
            anchor = (top * real[part]).sum(-1) / real[part].sum(-1)
            logits = pooled[:, :, part] @ keys.flatten(2, 3).mT + minus.flatten()
            heaviest = logits.unflatten(-1, (tiles, slots)).amax(-1)
            kept.append(~(heaviest + self.theta < anchor[..., None]))  # NaN keeps
        found = torch.cat(kept, 2)
        if self.group > 1:
            groups = found.split(self.group, 2)
            found = torch.cat([x.any(2, keepdim=True).expand_as(x) for x in groups], 2)
        found |= near
        found[..., :first] = True
        return found


@byte_cache(64 << 20)
def _ready(window: Grid, layout: Layout, device: str) -> tuple[Tensor, Tensor]:
    """bool [tiles, tiles]: tiles in each tile's window; int64 [tiles, largest window]: the windows as indices, filled up with
    tiles outside of them."""
    near = Window(size=window).select(layout)[0, 0]
    local = near.int().argsort(dim=-1, descending=True, stable=True)[:, : int(near.sum(-1).max())]
    return sent(near, device), sent(local, device)
