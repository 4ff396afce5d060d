"""Parts of split lists, on CUDA: one launch joins what `triton_forward.py` left of each, as `core.reference.merge` does."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels.triton_forward import raise_fault

FLOOR = tl.constexpr(-1e30)
"""As in `triton_forward.py`: a finite "no key yet"."""


def merge(parts: Tensor, lses: Tensor, out: Tensor, lse: Tensor, fault: Tensor | None = None) -> None:
    """parts [splits, B, H, N, D] and lses [splits, B, H, N], float32 and contiguous -> into out [B, H, N, D], D contiguous, and
    lse [B, H, N]. A part that saw no key (−inf) contributes nothing; NaN stays. fault as in `cuda.block_sparse_attention`."""
    splits, B, H, N, D = parts.shape
    block = 32
    _merge[(triton.cdiv(N, block), B * H)](
        parts, lses, out, lse, fault, splits, H, N, *out.stride()[:3],
        D=D, DP=triton.next_power_of_2(D), BM=block, FLAG=fault is not None, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["Fault"])
def _merge(
    Parts, Lses, Out, Lse, Fault, splits, heads, n_q, o_b, o_h, o_n,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, FLAG: tl.constexpr,
):  # fmt: skip
    """One program a block of queries of a head."""
    bh = tl.program_id(1).to(tl.int64)
    rows = tl.num_programs(1).to(tl.int64) * n_q
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    live = token < n_q
    d = tl.arange(0, DP)
    inside = live[:, None] & (d < D)[None, :]
    top = tl.full((BM,), FLOOR, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DP), tl.float32)
    for split in range(splits):
        row = split * rows + bh * n_q + token
        lse = tl.load(Lses + row, mask=live, other=float("-inf"))
        some = lse != float("-inf")  # NaN counts as some, and stays NaN
        new = tl.maximum(top, tl.where(some, lse, FLOOR))
        keep = tl.exp(top - new)
        share = tl.where(some, tl.exp(lse - new), 0.0)
        acc = acc * keep[:, None] + share[:, None] * tl.load(Parts + row[:, None] * D + d[None, :], mask=inside, other=0.0)
        total = total * keep + share
        top = new
    seen = total != 0
    total = tl.where(seen, total, 1.0)
    out = (acc / total[:, None]).to(Out.dtype.element_ty)
    lse = tl.where(seen, top + tl.log(total), float("-inf"))
    where = Out + (bh // heads) * o_b + (bh % heads) * o_h + token.to(tl.int64)[:, None] * o_n + d[None, :]
    tl.store(where, out, mask=inside)
    tl.store(Lse + bh * n_q + token, lse, mask=live)
    if FLAG:
        raise_fault(Fault, out, lse, live, 1)
