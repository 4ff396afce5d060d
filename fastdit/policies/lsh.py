"""HyperAttention (Han et al., arXiv 2310.05869 §2, §4): sort by angle, attend within blocks of the sorted order.

Random hyperplanes give each key and query a word of sign bits. Read as a Gray code, words that differ in one bit are
neighbours (sortLSH). Queries and keys are sorted by it separately and attended in equal blocks of the sorted order, so
vectors of similar direction meet. The paper sorts tokens; this sorts tiles by their mean (K centred), since a kernel skips
whole tiles. On the embedded model that is no better than random tiles (docs/policies.md): its heads attend nearby in space
and time, which the direction of a mean does not show. The paper's second half, a sampled estimate of everything else, is the
remainder "sampled".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdit.core.byte_cache import sent
from fastdit.core.layout import Layout
from fastdit.policies.base import Policy, check_share
from fastdit.policies.scores import means


@dataclass(frozen=True)
class LSH(Policy):
    """density: block size / all tiles, in (0, 1]. planes: number of hyperplanes (the paper's r = 7), drawn from `seed`."""

    density: float = 0.25
    planes: int = 7
    seed: int = 0

    name: ClassVar[str] = "lsh"

    def __post_init__(self) -> None:
        check_share(self.name, density=self.density)
        if not 1 <= self.planes <= 30:
            raise ValueError(f"lsh: planes must be 1 to 30, got {self.planes}")

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        if q is None or k is None:
            raise ValueError("lsh needs q and k")
        queries, keys = means(q, layout), means(k, layout)
        drawn = torch.Generator().manual_seed(self.seed)
        planes = sent(torch.randn(q.shape[-1], self.planes, generator=drawn, dtype=torch.float32, device="cpu"), q.device)
        rows, columns = (
            buckets(x, planes).argsort(dim=-1, stable=True).argsort(-1) for x in (queries, keys - keys.mean(2, keepdim=True))
        )
        size = max(1, round(self.density * layout.video_tiles))
        finite = (queries.isfinite() & keys.isfinite().all(2, keepdim=True)).all(-1)
        return (rows[..., None] // size == columns[..., None, :] // size) | ~finite[..., None]


def buckets(x: Tensor, planes: Tensor) -> Tensor:
    """[..., D] -> rank of its sign bits in Gray order, int64 [...]; words of adjacent ranks differ in one bit."""
    bits = (x @ planes > 0).long()
    binary = bits.cumsum(-1) % 2  # Gray code -> rank: each bit is the parity of the bits up to it
    return (binary << torch.arange(planes.shape[1] - 1, -1, -1, device=x.device)).sum(-1)
