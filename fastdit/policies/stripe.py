"""AnchorAttention (Zhang et al., arXiv 2505.23520 §3): keys nearly as heavy as the heaviest one nearby, for a group of queries.

The paper computes attention exactly over the initial block and a local window; the largest logit found there is a query's
*anchor*. Queries and anchors are averaged over blocks, and of all other keys those are kept whose logit with a block's mean
query comes within theta of its mean anchor, for any block of the group: what is dropped weighs less than e^−theta of
the anchor. A video has no causal order, so "initial" is the first frame and "local" a window of tiles; text, which no policy
sees, is part of the anchor in the remainder "stripes", the paper's method at the granularity of keys.

This is the paper's method at the granularity of tiles: a key tile is kept if any of its keys passes. The mean query is
compared, not each query, so a key that one query alone wants can be missed, in the paper as here. On the embedded model, with
a window of one tile, that is no better than random tiles (docs/policies.md): the threshold keeps whole tiles for single keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdit.core.byte_cache import byte_cache, sent
from fastdit.core.layout import Grid, Layout
from fastdit.policies.base import Policy
from fastdit.policies.scores import ROWS_BYTES, means, places
from fastdit.policies.window import Window


@dataclass(frozen=True)
class Stripe(Policy):
    """theta: natural-log logit units, the paper's 12; ∞ keeps everything, −∞ the first frame and the window alone.
    window: local tiles (t, h, w). group: query tiles that share their keys, in tile order (the paper: 16 blocks)."""

    theta: float = 12.0
    window: Grid = (1, 3, 3)
    group: int = 1

    name: ClassVar[str] = "stripe"

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", Window(size=self.window).size)  # raises ValueError for a window that is none
        if self.theta != self.theta or self.group < 1:
            raise ValueError(f"stripe: theta must be a number and group >= 1, got {self.theta} and {self.group}")

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        if q is None or k is None:
            raise ValueError("stripe needs q and k")
        near, first, local = _ready(self.window, layout, str(q.device))
        real = layout.order(q.device)[: layout.video_tiles] >= 0
        # What hides padding
        minus = torch.zeros(real.shape, dtype=torch.float32, device=q.device).masked_fill(~real, float("-inf"))
        queries, keys = q.float() * q.shape[-1] ** -0.5, k.float()
        pooled, start = means(queries, layout), keys[:, :, first].flatten(2, 3).mT
        outside = minus[local].masked_fill(~near.gather(1, local)[..., None], float("-inf"))
        B, H, tiles, slots, _ = k.shape
        rows = max(1, ROWS_BYTES // (4 * B * H * tiles * slots))
        kept = []
        for part in torch.arange(tiles, device=q.device).split(rows):
            mine = queries[:, :, part]
            top = (mine.flatten(2, 3) @ start + minus[first].flatten()).amax(-1).unflatten(-1, (-1, slots))
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
        return found | near | first


@byte_cache(64 << 20)
def _ready(window: Grid, layout: Layout, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Which tiles lie near each (bool, and as many numbers a tile as the largest window has) and which in the first frame."""
    near = Window(size=window).select(layout)[0, 0]
    local = near.int().argsort(dim=-1, descending=True, stable=True)[:, : int(near.sum(-1).max())]
    return sent(near, device), sent(places(layout)[0] == 0, device), sent(local, device)
