"""Whether an answer held. On a GPU nobody waits to learn it: what is wrong is repaired there and then, by a launch that does
nothing where all is well, and the host reads why at the next forward, where it waits for the noise level anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdit.approx.error_guard import DENSE
from fastdit.planning.forward_plan import above
from fastdit.runs.site_state import SiteState

BROKEN = 2
"""Bit of a fault flag beside 1: the dense answer is not finite either, as what came in was not, which is the model's affair."""


@dataclass(eq=False)
class Verdict:
    """On one call of a site. record: its index in `SiteState.calls`. fault: int32 [1], not 0 where the dense answer was put in
    place. error: [] relative L2, where a budget has it measured. density: [] of a dynamic policy's tiles, where the host does
    not know it."""

    state: SiteState
    record: int
    fault: Tensor
    error: Tensor | None = None
    density: Tensor | None = None
    max_density: float = 1.0
    budget: float = math.inf

    def read(self, fault: float, error: float | None, density: float | None) -> None:
        """Take the values into the record, and the site to a higher level of the guard where the answer did not hold."""
        state, record = self.state, self.state.calls[self.record]
        if density is not None:
            record = record._replace(density=density)
            if density > self.max_density:
                state.too_dense[record.phase] = above(density, self.max_density)
        if error is not None and math.isfinite(error):
            record = record._replace(error=error)
        if fault and not int(fault) & BROKEN:
            over = record.error is not None and record.error > self.budget
            why = f"error {record.error:.3g} over the budget of {self.budget:g}" if over else "not finite"
            reason = state.escalate(f"{why} at noise level {record.sigma:.3f}", record.rung + 1 if over else DENSE)
            record = record._replace(how="dense", density=1.0, reason=reason, rung=state.level)
        state.calls[self.record] = record


def settle(verdicts: Sequence[Verdict]) -> None:
    """Read all of them: one transfer, and one wait, a device."""
    tensors = [x for each in verdicts for x in (each.fault, each.error, each.density) if x is not None]
    values = iter([float(x) for x in (to_host(tensors) if len(tensors) > 1 else tensors)])
    for each in verdicts:
        fault, error, density = (None if x is None else next(values) for x in (each.fault, each.error, each.density))
        each.read(fault or 0.0, error, density)


def to_host(pieces: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of any dtype, on any devices, as float32 [n] on the CPU: one transfer, and one wait, a device."""
    flat = [piece.reshape(-1).float() for piece in pieces]
    found: dict[int, Tensor] = {}
    for device in {piece.device for piece in flat}:
        mine = [i for i, piece in enumerate(flat) if piece.device == device]
        parts = torch.cat([flat[i] for i in mine]).cpu().split([len(flat[i]) for i in mine])
        found.update(zip(mine, parts, strict=True))
    return [found[i] for i in range(len(flat))]
