"""Whether the output of a call is finite and within its error budget. On a GPU the host does not wait for the result: a launch
behind the kernel repairs a faulty output at once and does nothing otherwise. The host reads the reason at the next forward,
where it waits for the noise level anyway."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdit.approx.error_guard import DENSE
from fastdit.planning.forward_plan import above
from fastdit.runs.site_state import SiteState

BROKEN = 2
"""Bit of a fault flag besides 1: the dense output is not finite either, because the inputs were not; not fastdit's fault."""


@dataclass(eq=False)
class Verdict:
    """The verdict on one call of a site. record: its index in `SiteState.calls`. fault: int32 [1], not 0 if the dense output
    replaced the sparse one. error: [] relative L2, None if not measured. density: [] of a dynamic policy's tiles, None if the
    host knows it. foresee: gets the error, once known."""

    state: SiteState
    record: int
    fault: Tensor
    error: Tensor | None = None
    density: Tensor | None = None
    max_density: float = 1.0
    budget: float = math.inf
    foresee: Callable[[float], None] | None = None

    def read(self, fault: float, error: float | None, density: float | None) -> None:
        """Store the values in the record, and raise the site's guard level if the output was faulty."""
        state, record = self.state, self.state.calls[self.record]
        if density is not None:
            record = record._replace(density=density)
            if density > self.max_density:
                state.too_dense[record.phase] = above(density, self.max_density)
        if error is not None and math.isfinite(error):
            record = record._replace(error=error)
            if self.foresee is not None:
                self.foresee(error)
        if fault and not int(fault) & BROKEN:
            over = record.error is not None and record.error > self.budget
            why = f"error {record.error:.3g} over the budget of {self.budget:g}" if over else "not finite"
            reason = state.escalate(f"{why} at noise level {record.sigma:.3f}", record.rung + 1 if over else DENSE)
            record = record._replace(how="dense", density=1.0, reason=reason, rung=state.level)
        state.calls[self.record] = record


def settle(verdicts: Sequence[Verdict]) -> None:
    """Read all verdicts, with one transfer and one synchronisation per device."""
    tensors = [x for each in verdicts for x in (each.fault, each.error, each.density) if x is not None]
    values = iter([float(x) for x in (to_host(tensors) if len(tensors) > 1 else tensors)])
    for each in verdicts:
        fault, error, density = (None if x is None else next(values) for x in (each.fault, each.error, each.density))
        each.read(fault or 0.0, error, density)


def to_host(pieces: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of any dtype, on any devices -> float32 [n] on the CPU, with one transfer and synchronisation per device."""
    flat = [piece.reshape(-1).float() for piece in pieces]
    found: dict[int, Tensor] = {}
    for device in {piece.device for piece in flat}:
        mine = [i for i, piece in enumerate(flat) if piece.device == device]
        parts = torch.cat([flat[i] for i in mine]).cpu().split([len(flat[i]) for i in mine])
        found.update(zip(mine, parts, strict=True))
    return [found[i] for i in range(len(flat))]
