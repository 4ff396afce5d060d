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

import torch
from torch import Tensor

from fastdit import ops
from fastdit.approx import remainder
from fastdit.approx.memory_budget import free_bytes
from fastdit.approx.residual_store import Stored, bytes_of, parts, taken
from fastdit.config import Reuse
from fastdit.core.block_mask import BlockMask
from fastdit.planning.plan import Plan


@dataclass(eq=False)
class Memory:
    """What one site holds for one branch, phase and shape. uses: sparse steps since the last refresh."""

    block_mask: BlockMask | None = None
    density: float = 1.0
    map_uses: int = 0
    ratio: Tensor | None = None
    kept: Stored | None = None
    uses: int = 0
    no_room: str | None = None
    """Why nothing is remembered, though it should be."""

    def drop(self) -> None:
        self.block_mask = self.ratio = self.kept = None

    def bytes(self, device: torch.device | None = None) -> int:
        """Held on a device; None: on all."""
        tensors = [self.ratio, *(self.kept.tensors if self.kept is not None else ())]
        return sum(taken(x.nbytes, x.is_pinned()) for x in tensors if x is not None and device in (None, x.device))


def attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, reuse: Reuse, memory: Memory, scale: float | None,
    dense: Callable[[], Tensor], held: Callable[[torch.device], int] = lambda device: 0,
    compute: Callable[..., tuple[Tensor, Tensor]] = remainder.attention,
) -> tuple[Tensor, str]:  # fmt: skip
    """One call with what was remembered, which it updates: q, k, v [B, H, N, D] -> out like q, and how: "sparse",
    "refresh" or "reuse"; "dense" where there is no room to remember anything.

    dense: the best dense attention there is for these inputs; held: bytes that all sites remember already on a device; compute:
    `remainder.attention`, or what stands in its place.
    """

    def sparse() -> tuple[Tensor, Tensor]:
        return compute(q, k, v, plan.block_mask, plan.quant, scale, plan.remainder)

    if memory.no_room:
        return dense(), "dense"
    if reuse.kind == "none" or plan.block_mask is None:
        return sparse()[0], "sparse"
    if (memory.ratio is not None or memory.kept is not None) and memory.uses < reuse.refresh - 1:
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
    place = None if memory.kept is None else memory.kept.data.device  # what the last refresh leaves, this one takes
    memory.uses, memory.ratio, memory.kept = 0, None, None
    if reuse.kind != "ratio" and place is None:
        place, memory.no_room = _place(q, reuse, held)
        if place is None:
            return dense(), "dense"  # densities chosen for use with statistics do not hold without them
    host = place is not None and place.type == "cpu"
    if reuse.kind == "broadcast":
        out = dense()
        memory.kept = Stored.of(out, reuse.store, host)
        return out, "refresh"
    full, lse_full = ops.attention(q, k, v, scale=scale)
    less, lse = sparse()
    if reuse.kind != "residual":
        memory.ratio = (lse - lse_full).exp().clamp(max=1)
    if reuse.kind != "ratio":
        wide = torch.promote_types(q.dtype, torch.float32)
        memory.kept = Stored.empty(full, reuse.store, host)
        for heads in parts(q):
            part = less[heads].to(wide)
            if memory.ratio is not None:
                part = memory.ratio[heads][..., None] * part
            memory.kept.put(full[heads].to(wide) - part, heads)
    return full, "refresh"


def _place(q: Tensor, reuse: Reuse, held: Callable[[torch.device], int]) -> tuple[torch.device | None, str | None]:
    """Where there is room for what a refresh leaves, or why there is none: all together take half of what was free at most."""
    rows = q.numel() // q.shape[-1]  # each with a ratio, or a scale
    host = torch.device("cpu")
    for place in (host,) if reuse.host or not q.is_cuda else (q.device, host):
        needs = bytes_of(tuple(q.shape), reuse.store, q.is_cuda and place == host) + 4 * rows * (reuse.kind == "retention")
        beside = held(place)
        if beside + needs <= (free_bytes(place) + beside) // 2:
            return place, None
    return None, f"{reuse.kind}: no room for {needs / 2**20:.0f} MB beside {beside / 2**20:.0f} MB remembered"
