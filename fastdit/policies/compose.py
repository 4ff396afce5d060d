"""Policies made of policies: their union, their intersection, and one policy per head.

HeadProfile follows RazorAttention (arXiv 2407.15891) and DuoAttention (arXiv 2410.10819): heads specialise. The mass
exp(LSE_pattern − LSE_full) that each pattern retains in a head is measured once, offline
(`fastdit.reporting.head_profile`), and the head then uses the pattern that was chosen for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from fastdit.core.byte_cache import sent
from fastdit.core.layout import Grid, Layout
from fastdit.policies.base import Policy


@dataclass(frozen=True)
class _Composed(Policy):
    policies: tuple[Policy, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(self.policies))  # a list cannot be hashed
        if not self.policies or not all(isinstance(policy, Policy) for policy in self.policies):
            raise ValueError(f"{self.name}: policies must be one or more policies, got {self.policies!r}")

    @property
    def reads(self) -> str:  # type: ignore[override]
        """The longest of theirs: "" < "qk" < "qkv", each a prefix of the next."""
        return max((policy.reads for policy in self.policies), key=len)

    def _maps(self, layout: Layout, *tensors: Tensor | None) -> list[Tensor]:
        device = next((x.device for x in tensors if x is not None), torch.device("cpu"))
        return [sent(policy.select(layout, *tensors), device) for policy in self.policies]


@dataclass(frozen=True)
class Union(_Composed):
    """A tile pair is kept if any of the policies keeps it."""

    name: ClassVar[str] = "union"

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        return reduce(torch.logical_or, self._maps(layout, q, k, v))


@dataclass(frozen=True)
class Intersect(_Composed):
    """A tile pair is kept if all of the policies keep it; each tile attends itself in any case."""

    name: ClassVar[str] = "intersect"

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        return reduce(torch.logical_and, self._maps(layout, q, k, v))


@dataclass(frozen=True)
class HeadProfile(_Composed):
    """heads: for each head of a layer, the index of its policy. grid: the grid it was measured on; None fits any."""

    heads: tuple[int, ...] = ()
    grid: Grid | None = None

    name: ClassVar[str] = "head_profile"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "heads", tuple(self.heads))
        if self.grid is not None:
            object.__setattr__(self, "grid", tuple(self.grid))
        if not self.heads or any(not 0 <= head < len(self.policies) for head in self.heads):
            raise ValueError(
                f"head_profile: heads must be indices of its {len(self.policies)} policies, one per head, got {self.heads}"
            )

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        if self.grid is not None and layout.grid != self.grid:
            raise ValueError(f"head_profile: measured on the grid {self.grid}, this clip has {layout.grid}: profile this size")
        if q is not None and q.shape[1] != len(self.heads):
            raise ValueError(f"head_profile: made for {len(self.heads)} heads, this layer has {q.shape[1]}: profile this model")
        maps = self._maps(layout, q, k, v)
        batch = max(x.shape[0] for x in maps)
        chosen = [maps[policy].expand(batch, len(self.heads), -1, -1)[:, head] for head, policy in enumerate(self.heads)]
        return torch.stack(chosen, 1)
