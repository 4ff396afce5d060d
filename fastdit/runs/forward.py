"""One call of a denoiser, from before its first layer: its plan, and what its sites share while it runs."""

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
    """One call of a denoiser. Sites find it by its `number`, which the token holds.

    first: index of the denoiser's first site. names: of its sites. masks: cache of block masks. held: returns the bytes of
    statistics that the pipeline holds on a device. due: statistics must be taken anew. train: with gradients, and nothing
    remembered or measured. over: its layers have run; one that runs again is recomputed for a backward. seen: calls so far, by
    layer.
    """

    run: Run
    branch: Branch
    plan: ForwardPlan
    config: Config
    first: int
    names: tuple[str, ...]
    masks: ByteCache
    held: Callable[[torch.device], int]
    due: bool = False
    train: bool = False
    over: bool = False
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
            raise RuntimeError("this attention layer was called after its denoiser's forward ended: call the denoiser instead")
        return found

    def state(self, layer: int) -> SiteState:
        return self.run.sites[self.first + layer]

    def count(self, layer: int) -> int:
        """Number of earlier calls of the layer in this forward; counts this one. Some processors call once per sample."""
        self.seen[layer] += 1
        return self.seen[layer] - 1

    def call(self, layer: int, q: Tensor, keys: int, kept: Runs | None) -> CallPlan:
        """`ForwardPlan.call`, cached for all sites with the same arguments."""
        key = (self.plan.sites[layer], keys, kept, q.shape, q.dtype, q.device)
        if (plan := self._plans.get(key)) is None:
            plan = self._plans[key] = self.plan.call(layer, q, keys, kept, self.masks)
        return plan

    def flag(self, device: torch.device) -> Tensor:
        """A fault flag for one call: int32 [1], 0. One launch zeroes `FLAGS` of them."""
        if not (flags := self._flags.get(device)):
            flags = self._flags[device] = list(torch.zeros(FLAGS, dtype=torch.int32, device=device).split(1))
        return flags.pop()

    def dense(self, layer: int, reason: str) -> CallPlan:
        """A dense plan for a call whose facts are missing or unsupported."""
        site = self.plan.sites[layer]
        return CallPlan(site.phase, reason, wanting=True, level=site.level)

    def kept_keys(self, mask: Tensor, batch: int, queries: int, keys: int, compiled: bool) -> KeptKeys | str:
        """The keys that a mask keeps, or why they cannot be cut. Read once for all layers that are given the same mask.

        compiled: read it in each call. Code made by torch.compile may write a second mask into the tensor of the first without
        changing its version.
        """
        key = id(mask), batch, queries, keys
        known = None if compiled else self._masks.get(key)
        if known is not None and known[1] == version(mask):
            return known[2]
        read = key_padding.read(mask, batch, queries, keys) or key_padding.why_not(mask)
        if not compiled:
            self._masks[key] = mask, version(mask), read  # kept, or another tensor might get its identity
        return read
