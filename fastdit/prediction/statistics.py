"""Bytes of statistics in a run, by `approx.placement`'s own arithmetic: which form they get, and whether on GPU or host.

What `store="auto"` does when memory is short depends on errors measured in the run; here all residuals have those of
docs/results/stores.json (30 steps), so the bytes are then near, not exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from fastdit.approx import placement, residual_store
from fastdit.approx.allocation import Option, allocate
from fastdit.config import Reuse

HOST = torch.device("cpu")
ERRORS = dict(
    zip(placement.FORMS, (1e-7, 7.6e-6, 8.4e-5, 3.8e-5, 2.4e-4, 9.2e-4, 6.0e-3, 1.9e-2), strict=True)
)  # squares of the velocity's error, less bfloat16's
Shape = tuple[int, int, int, int]
bytes_of = lru_cache(maxsize=1024)(residual_store.bytes_of)


@dataclass
class Kept:
    """What one site remembers for one branch: form and place of its residual (None: it has none), and its ratio's bytes."""

    shape: Shape
    form: str | None
    place: torch.device
    pinned: bool
    ratio: int = 0
    auto: bool = True

    @property
    def residual(self) -> int:
        return 0 if self.form is None else bytes_of(self.shape, self.form, self.pinned)

    def bytes(self, place: torch.device) -> int:
        on_gpu = self.place if not self.pinned else torch.device("cuda")  # ρ stays with q
        return self.residual * (place == self.place) + self.ratio * (place == on_gpu)

    def smaller(self) -> list[tuple[int, str]]:
        sizes = [(bytes_of(self.shape, form, self.pinned), form) for form in placement.FORMS]
        return [(size, form) for size, form in sizes if size < self.residual or form == self.form]


class Store:
    """All statistics of a run. free: bytes on each device before it, the device of q first."""

    def __init__(self, free: dict[torch.device, int]) -> None:
        self.free = free
        self.device = next(iter(free))
        self.kept: dict[tuple[int, ...], Kept] = {}
        self.peak = dict.fromkeys(free, 0)
        self.forms: dict[str, int] = {}
        self.shared = False

    def held(self, place: torch.device) -> int:
        return sum(each.bytes(place) for each in self.kept.values())

    def add(self, key: tuple[int, ...], shape: Shape, reuse: Reuse) -> Kept | None:
        """A refresh's; None where there is no room."""
        cuda = self.device.type == "cuda"
        ratio = 4 * shape[0] * shape[1] * shape[2] if reuse.kind in ("retention", "ratio") else 0
        if reuse.kind == "ratio":
            new: Kept | None = Kept(shape, None, self.device, False, ratio)
        else:
            new = None
            for place in (HOST,) if reuse.host or not cuda else (self.device, HOST):
                if (new := self._at(place, shape, reuse, cuda and place == HOST, ratio)) is not None:
                    break
        if new is not None:
            self.kept[key] = new
            held = {place: self.held(place) for place in self.free}
            if sum(held.values()) >= sum(self.peak.values()):
                self.forms = {}
                for each in self.kept.values():
                    self.forms[each.form or "ratio"] = self.forms.get(each.form or "ratio", 0) + 1
            self.peak = {place: max(size, held[place]) for place, size in self.peak.items()}
        return new

    def _at(self, place: torch.device, shape: Shape, reuse: Reuse, pinned: bool, ratio: int) -> Kept | None:
        others = [each for each in self.kept.values() if each.place == place and each.form is not None and each.auto]
        held = self.held(place)
        sizes = [(each.residual, min(each.smaller())[0]) for each in others]
        room = placement.room_at(place, shape, reuse, pinned, max(0, self.free[place] - held), held, sizes)
        if room.place is None:
            return None
        new = Kept(shape, room.form, place, pinned, ratio, reuse.store == placement.AUTO)
        if room.form is None:  # everybody gives way
            self.shared = True
            choices: list[list[Option]] = [[(bytes_of(shape, form, pinned), ERRORS[form]) for form in placement.FORMS]]
            choices += [[(size, ERRORS[form]) for size, form in each.smaller()] for each in others]
            found = allocate(choices, room.budget)
            assert found is not None
            for each, option in zip(others, found[1:], strict=True):
                each.form = each.smaller()[option][1]
            new.form = placement.FORMS[found[0]]
        return new
