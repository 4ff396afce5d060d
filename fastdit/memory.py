"""What a site remembers of earlier steps, and what that is for: neighbouring noise levels give nearly the same attention.

On a *refresh* attention runs dense, and beside it sparse, which gives per query i (Re-ttention, arXiv 2505.22918 §3.2-3.3)

    ρ_i = exp(lse_sparse,i − lse_full,i) in (0, 1],   R_i = O_full,i − ρ_i · O_sparse,i  (what the dropped keys contributed)

and the sparse steps that follow answer  O_i = min(1, ρ_i + n·λ) · O_sparse,i + R_i  in the n-th step after the first. It needs
no more than (out, lse), so it goes with every policy, number format and remainder. Its limits are kept, as they are what it
must beat: ``ratio`` (R = 0), ``residual`` (ρ = 1: DiTFastAttn, arXiv 2406.08552) and ``broadcast`` (no tile at all: the last
dense output again; Pyramid Attention Broadcast, arXiv 2408.12588). ``maps`` alone keeps a dynamic policy's tile map.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdit import ops, remainder
from fastdit.blockmask import BlockMask
from fastdit.plan import Plan
from fastdit.reuse import Reuse

STORES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


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
        tensors = [self.ratio, *((self.kept.data, self.kept.scale) if self.kept is not None else ())]
        return sum(x.nbytes for x in tensors if x is not None and device in (None, x.device))


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor [..., D] in fewer bits, perhaps elsewhere: data · scale, the scale one a row or None."""

    data: Tensor
    scale: Tensor | None

    @classmethod
    def of(cls, x: Tensor, store: str, host: bool) -> Stored:
        scale = None
        if store == "fp8":
            scale = x.abs().amax(-1, keepdim=True).float().div(448).clamp(min=torch.finfo(torch.float32).tiny)
            x = x / scale
        data = x.to(STORES[store])
        return cls(data.cpu(), None if scale is None else scale.cpu()) if host else cls(data, scale)

    def load(self, like: Tensor) -> Tensor:
        x = self.data.to(like.device, non_blocking=True).to(torch.promote_types(like.dtype, torch.float32))
        return x if self.scale is None else x * self.scale.to(like.device)


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
        if reuse.kind == "broadcast":
            assert memory.kept is not None
            return memory.kept.load(q).to(q.dtype), "reuse"
        part, _ = sparse()
        out = part.to(torch.promote_types(q.dtype, torch.float32))
        if memory.ratio is not None:
            out = out * (memory.ratio + (memory.uses - 1) * reuse.ramp).clamp(max=1)[..., None]
        if memory.kept is not None:
            out = out + memory.kept.load(q)
        return out.to(q.dtype), "reuse"
    memory.uses, memory.ratio, memory.kept = 0, None, None
    host = reuse.host
    if reuse.kind != "ratio":
        rows = q.numel() // q.shape[-1]  # each with a ratio, or a scale
        needs = q.numel() * STORES[reuse.store].itemsize + 4 * rows * ((reuse.kind == "retention") + (reuse.store == "fp8"))
        places = [torch.device("cpu")] if host or not q.is_cuda else [q.device, torch.device("cpu")]
        found = [place for place in places if held(place) + needs <= (free_bytes(place) + held(place)) // 2]
        if not found:
            beside = sum(map(held, places)) / 2**20
            memory.no_room = f"{reuse.kind}: no room for {needs / 2**20:.0f} MB beside {beside:.0f} MB remembered"
            return dense(), "dense"  # densities chosen for use with statistics do not hold without them
        host = found[0].type == "cpu"
    if reuse.kind == "broadcast":
        out = dense()
        memory.kept = Stored.of(out, reuse.store, host)
        return out, "refresh"
    full, lse_full = ops.attention(q, k, v, scale=scale)
    part, lse = sparse()
    wide = torch.promote_types(q.dtype, torch.float32)
    residual = full.to(wide)
    if reuse.kind == "residual":
        residual = residual - part.to(wide)
    else:
        memory.ratio = (lse - lse_full).exp().clamp(max=1)
        residual = residual - memory.ratio[..., None] * part.to(wide)
    if reuse.kind != "ratio":
        memory.kept = Stored.of(residual, reuse.store, host)
    return full, "refresh"


def free_bytes(device: torch.device) -> int:
    """Memory that could still be had on a device; where nobody says (macOS), a petabyte."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1 << 50
