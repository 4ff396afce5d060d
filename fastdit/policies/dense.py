"""Attend to every tile: the phases that stay dense, run by the best dense kernel there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdit.layout import Layout


@dataclass(frozen=True)
class Dense:
    """Every tile attends every tile."""

    name: ClassVar[str] = "dense"
    static: ClassVar[bool] = True

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None) -> Tensor:
        return torch.ones(1, 1, layout.video_tiles, layout.video_tiles, dtype=torch.bool)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name}

    def __str__(self) -> str:
        return self.name
