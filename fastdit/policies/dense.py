"""Attend to every tile: for the phases that stay dense, run by the fastest dense kernel available."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fastdit.policies.base import Policy

if TYPE_CHECKING:
    from torch import Tensor

    from fastdit.core.layout import Layout


@dataclass(frozen=True)
class Dense(Policy):
    """Every tile attends every tile."""

    name: ClassVar[str] = "dense"
    reads: ClassVar[str] = ""

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        import torch

        return torch.ones(1, 1, layout.video_tiles, layout.video_tiles, dtype=torch.bool, device="cpu")
