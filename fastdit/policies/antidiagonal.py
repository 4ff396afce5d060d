"""XAttention (Xu et al., arXiv 2503.16428 §3): sums over antidiagonals of small cells tell which blocks matter.

Each block's mass is estimated from strided antidiagonals (`scores.antidiagonal`). They cross every vertical and every slash
pattern in a block; a mean of queries and keys averages these patterns away. A query block keeps the fewest key blocks whose
estimated mass sums to tau. The estimate differs from the true mass: on random data tau .9 kept .87 of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastdit.core.layout import Layout
from fastdit.policies.base import Policy, check_share
from fastdit.policies.scores import antidiagonal, select_tiles


@dataclass(frozen=True)
class Antidiagonal(Policy):
    """tau: mass to keep, in (0, 1] (1: all; the paper uses .90 and .95 for video); or density: share of tiles to keep.
    stride: tokens per cell (the paper: 8 or 16)."""

    tau: float | None = None
    density: float | None = None
    stride: int = 8

    name: ClassVar[str] = "antidiagonal"

    def __post_init__(self) -> None:
        check_share(self.name, tau=self.tau, density=self.density)
        if self.stride < 1:
            raise ValueError(f"antidiagonal: stride must be >= 1, got {self.stride}")

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        if q is None or k is None:
            raise ValueError("antidiagonal needs q and k")
        return select_tiles(antidiagonal(q, k, layout, min(self.stride, layout.tile_tokens)), self.tau, self.density)
