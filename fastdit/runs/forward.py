"""One call of a denoiser, begun before its first layer: the plan, and what its sites share while it runs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from fastdit.config import Config
from fastdit.core.block_mask import version
from fastdit.core.byte_cache import ByteCache
from fastdit.planning import key_padding
from fastdit.planning.forward_plan import CallPlan, ForwardPlan
from fastdit.planning.key_padding import KeptKeys, Runs
from fastdit.runs.branches import Branch
from fastdit.runs.run import Run
from fastdit.runs.site_state import SiteState

FLAGS = 64
"""Zeroed at a time: a launch for as many calls as a large denoiser has."""
_numbers = itertools.count()
_forwards: WeakValueDictionary[int, Forward] = WeakValueDictionary()


@dataclass(eq=False)
class Forward:
    """Found by its `number`, the token that the sites are given.

    first: index of the denoiser's first site; names: of its sites; masks: where block masks are kept; held: bytes of statistics
    that the pipeline keeps on a device; seen: calls so far, by layer.
    """

    run: Run
    branch: Branch
    plan: ForwardPlan
    config: Config
    first: int
    names: tuple[str, ...]
    masks: ByteCache
    held: Callable[[torch.device], int]
    sigma: float = field(init=False)
    step: int = field(init=False)
    number: int = field(default_factory=_numbers.__next__)

    def __post_init__(self) -> None:
        self.sigma, self.step = self.run.clock.sigma, self.run.step
        self.seen: Counter[int] = Counter()
        self._plans: dict[tuple[Any, ...], CallPlan] = {}
        self._masks: dict[tuple[int, ...], tuple[Tensor, int, KeptKeys | str]] = {}
        self._flags: dict[torch.device, list[Tensor]] = {}
        _forwards[self.number] = self

    @staticmethod
    def find(number: int) -> Forward:
        if (found := _forwards.get(number)) is None:
            raise RuntimeError("this attention belongs to a call of a denoiser that is over: call the denoiser, not its layers")
        return found

    def state(self, layer: int) -> SiteState:
        return self.run.sites[self.first + layer]

    def count(self, layer: int) -> int:
        """How many calls the layer had in this forward before this one: some processors call once a sample."""
        self.seen[layer] += 1
        return self.seen[layer] - 1

    def call(self, layer: int, q: Tensor, keys: int, kept: Runs | None) -> CallPlan:
        """`ForwardPlan.call`, made once for all sites that ask the same."""
        key = (self.plan.sites[layer], keys, kept, q.shape, q.dtype, q.device)
        if (plan := self._plans.get(key)) is None:
            plan = self._plans[key] = self.plan.call(layer, q, keys, kept, self.masks)
        return plan

    def flag(self, device: torch.device) -> Tensor:
        """int32 [1], 0: for one answer. Zeroed for many at a time."""
        if not (flags := self._flags.get(device)):
            flags = self._flags[device] = list(torch.zeros(FLAGS, dtype=torch.int32, device=device).split(1))
        return flags.pop()

    def dense(self, layer: int, reason: str) -> CallPlan:
        """For want of something."""
        site = self.plan.sites[layer]
        return CallPlan(site.phase, reason, wanting=True, level=site.level)

    def kept_keys(self, mask: Tensor, batch: int, queries: int, keys: int, compiled: bool) -> KeptKeys | str:
        """What a mask leaves, or what it is instead: read once for all layers that are given it.

        compiled: read each time. Code by torch.compile writes a second mask into the buffer, and the very tensor, of a first,
        and counts no change.
        """
        if compiled:
            return key_padding.read(mask, batch, queries, keys) or key_padding.why_not(mask)
        key = id(mask), batch, queries, keys
        known = self._masks.get(key)
        if known is None or known[1] != version(mask):
            read = key_padding.read(mask, batch, queries, keys) or key_padding.why_not(mask)
            known = self._masks[key] = mask, version(mask), read  # kept, or another tensor might get its identity
        return known[2]
