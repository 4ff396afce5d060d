"""What a site remembers of earlier steps, and what that is for: neighbouring noise levels give nearly the same attention.

On a *refresh* attention runs dense, and beside it sparse, which gives per query i (Re-ttention, arXiv 2505.22918 §3.2-3.3)

    ρ_i = exp(lse_sparse,i − lse_full,i) in (0, 1],   R_i = O_full,i − ρ_i · O_sparse,i  (what the dropped keys contributed)

and the sparse steps that follow answer  O_i = min(1, ρ_i + n·λ) · O_sparse,i + R_i  in the n-th step after the first. It needs
no more than (out, lse), so it goes with every policy, number format and remainder. Its limits are kept, as they are what it
must beat: ``ratio`` (R = 0), ``residual`` (ρ = 1: DiTFastAttn, arXiv 2406.08552) and ``broadcast`` (no tile at all: the last
dense output again; Pyramid Attention Broadcast, arXiv 2408.12588). ``maps`` alone keeps a dynamic policy's tile map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdit.approx import placement, remainder
from fastdit.approx.residual_store import Part, Stored, parts, taken
from fastdit.config import AUTO, Reuse
from fastdit.core.block_mask import BlockMask
from fastdit.planning.forward_plan import CallPlan


@dataclass(eq=False)
class Memory:
    """What one site holds for one branch, phase and shape. uses: sparse steps since the last refresh."""

    block_mask: BlockMask | None = None
    density: float | Tensor = 1.0
    map_uses: int = 0
    ratio: Tensor | None = None
    kept: Stored | None = None
    uses: int = 0
    due: bool = False
    """The next step must be a refresh: its tile map is new, or the errors would exceed `Reuse.drift`."""
    no_room: str | None = None
    """Why nothing is remembered, though it should be."""
    power: Tensor | None = None
    """Mean square of the dense answer, where the form may change: what errors are relative to."""
    errors: list[float] | None = None
    """Of `placement.FORMS`, once there was need to know."""

    @property
    def form(self) -> str | None:
        """In which the residual is kept."""
        return None if self.kept is None else self.kept.form

    def with_map(self, plan: CallPlan, q: Tensor, k: Tensor, v: Tensor) -> CallPlan:
        """A dynamic policy's plan with the tiles that it chose, now or, while they serve, in an earlier step."""
        serves = plan.reuse.maps if self.due else plan.reuse.map_age  # a refresh may have a new one, the steps after it not
        if self.block_mask is not None and self.map_uses < serves:
            self.map_uses += 1
            return plan.with_mask(self.block_mask, self.density, q.shape[1])
        plan = plan.choose(q, k, v)
        self.due = True
        if plan.reuse.map_age > 1:
            self.block_mask, self.density, self.map_uses = plan.block_mask, plan.density, 1
        return plan

    def drop(self) -> None:
        self.block_mask = self.ratio = self.kept = None

    def bytes(self, device: torch.device | None = None) -> int:
        """Held on a device; None: on all."""
        tensors = [self.ratio, *(self.kept.tensors if self.kept is not None else ())]
        return sum(taken(x.nbytes, x.is_pinned()) for x in tensors if x is not None and device in (None, x.device))


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: CallPlan, reuse: Reuse, memory: Memory, scale: float | None,
    dense: Callable[[], Tensor], held: placement.Held = lambda device: 0, sharers: placement.Sharers = tuple,
    compute: Callable[..., tuple[Tensor, Tensor]] = remainder.attention, fault: Tensor | None = None,
) -> tuple[Tensor, str]:  # fmt: skip
    """One call with what was remembered, which it updates: q, k, v [B, H, N, D] -> out like q, and how: "sparse",
    "refresh" or "reuse"; "dense" where there is no room to remember anything.

    dense: the best dense attention there is for these inputs; held: bytes that all sites remember already on a device; sharers:
    the run's memories; compute: `remainder.attention`, or what stands in its place; fault: int32 [1], into which 1 is ORed if
    an answer is not finite.
    """

    def sparse() -> tuple[Tensor, Tensor]:
        return compute(q, k, v, plan.block_mask, plan.quant, scale, plan.remainder, fault=fault)

    if memory.no_room:
        return dense(), "dense"
    if reuse.kind == "none" or plan.block_mask is None:
        return sparse()[0], "sparse"
    if (memory.ratio is not None or memory.kept is not None) and memory.uses < reuse.refresh - 1 and not memory.due:
        memory.uses += 1
        out = torch.empty_like(q) if reuse.kind == "broadcast" else sparse()[0]
        kept, weight = memory.kept, None
        if memory.ratio is not None:
            weight = (memory.ratio + (memory.uses - 1) * reuse.ramp).clamp(max=1)[..., None]
        in_place = kept is None or (kept.as_is and kept.data.device == q.device)  # nothing wide is made on the way
        for heads in (...,) if in_place else parts(q):
            part = out[heads]
            if kept is None:
                assert weight is not None
                part.mul_(weight)
            elif reuse.kind == "broadcast":
                part.copy_(kept.load(q, heads))
            elif weight is None:
                part.add_(kept.load(q, heads))
            else:
                torch.addcmul(kept.load(q, heads), part, weight[heads], out=part)
        return out, "reuse"
    room = None if memory.kept is None else placement.Room(memory.kept.data.device, memory.kept.form)
    memory.uses, memory.due, memory.ratio, memory.kept = 0, False, None, None
    if reuse.kind != "ratio" and room is None:  # otherwise: what the last refresh leaves, this one takes
        room = placement.find(q, reuse, held, sharers)
        memory.no_room = room.why
        if room.place is None:
            return dense(), "dense"  # densities chosen for use with statistics do not hold without them
    if reuse.kind == "broadcast":
        full = dense()
    else:
        full, lse_full = remainder.attention(q, k, v, None, scale=scale, fault=fault)
        less, lse = sparse()
        if reuse.kind != "residual":
            memory.ratio = (lse - lse_full).exp().clamp(max=1)
    if room is None or room.place is None:
        return full, "refresh"
    wide = torch.promote_types(q.dtype, torch.float32)

    def left_out(heads: Part, rows: Any = slice(None)) -> Tensor:
        """R of some heads and rows; of `broadcast` the answer itself."""
        if reuse.kind == "broadcast":
            return full[heads][:, :, rows]
        part = less[heads][:, :, rows].to(wide)
        if memory.ratio is not None:
            part = memory.ratio[heads][:, :, rows, None] * part
        return full[heads][:, :, rows].to(wide) - part

    form = room.form
    if reuse.store == AUTO:
        rows = placement.sample(q.shape[2], q.device)
        memory.power = full[:, :, rows].float().square().mean()
        if form is None:
            memory.errors = placement.measure(left_out(..., rows).float(), memory.power)
            form = placement.share(q, room, memory.errors, sharers)
    assert form is not None
    kept = Stored.empty(full, form, room.place.type == "cpu")
    for heads in parts(q):
        kept.put(left_out(heads), heads)
    memory.kept = kept
    return full, "refresh"
