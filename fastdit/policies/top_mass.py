"""SpargeAttn (Zhang et al., arXiv 2502.18137 §3.2-3.4): mean queries and keys of tiles predict where attention goes.

Of each row of softmax(q̄·k̄ᵀ) over tiles, keep the fewest tiles whose mass sums to tau. A mean does not represent a tile whose
tokens point in all directions: a tile whose self-similarity (mean cosine between its tokens) is below `similarity` is kept
as a whole row and column. As in the authors' code, K is centred for the similarity, which leaves softmax unchanged.

On the embedded model the threshold tau is no better than random tiles at equal density (error .27 for both at 1/4,
docs/policies.md): heads that attend widely get most tiles and lose least without them. A share of tiles (density) has .12.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdit.core.layout import Layout
from fastdit.policies.base import Policy, check_share
from fastdit.policies.scores import means, pooled, select_tiles


@dataclass(frozen=True)
class TopMass(Policy):
    """tau: mass to keep, in (0, 1]; or density: share of tiles to keep (the authors' `topk`, by default .5).
    similarity: tiles below it are kept whole; −1: none (the authors' plug-and-play mode has −0.1, hardly any)."""

    tau: float | None = None
    density: float | None = None
    similarity: float = -1.0

    name: ClassVar[str] = "top_mass"

    def __post_init__(self) -> None:
        check_share(self.name, tau=self.tau, density=self.density)
        if not -1 <= self.similarity <= 1:
            raise ValueError(f"top_mass: similarity must lie in [-1, 1], got {self.similarity}")

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        if q is None or k is None:
            raise ValueError("top_mass needs q and k")
        kept = select_tiles(pooled(q, k, layout), self.tau, self.density)
        if self.similarity > -1:
            centre = k.float().sum((2, 3), keepdim=True) / layout.video_len
            real = (layout.order(k.device)[: layout.video_tiles] >= 0)[..., None]
            rows, columns = (self_similarity(x, layout) < self.similarity for x in (q, (k - centre) * real))
            kept = kept | rows[..., None] | columns[:, :, None]
        return kept


def self_similarity(x: Tensor, layout: Layout) -> Tensor:
    """[B, H, tiles, tokens, D] -> mean cosine between all pairs of a tile's tokens, [B, H, tiles]: |mean of x/|x||²."""
    return means(torch.nn.functional.normalize(x.float(), dim=-1), layout).square().sum(-1)
