"""The dense launch behind an attention call, on CUDA: it overwrites an answer that is not finite, and nobody waits for that.

Which it is stands in a flag that the attention kernels raise (`triton_forward.raise_fault`), and only the device reads it: a
launch whose flag is down returns at once, so it can stand behind every call, compiled and in CUDA graphs too. It reads K and V
in token order as they come and writes into the answer: no packing, no list, no memory of its own. A few programs a
multiprocessor take all blocks of queries in turns, so that the launch that has nothing to do costs a few microseconds and not a
block scheduler's round over tens of thousands.

The inputs' own format, products and softmax in float32: scores of float16 that would overflow do not.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels import launch
from fastdit.kernels.triton_forward import raise_fault

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


def settings(dim: int, wide: bool) -> dict[str, int]:
    """For heads of `dim` channels, wide: in float32. Fits every GPU (tests/kernels/test_compile.py); not timed."""
    block = (16 if dim > 128 else 32) if wide else 64
    return {"BM": block, "BN": 32 if dim > 64 and not wide else block, "num_warps": 8, "num_stages": 2}


def repair(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, fault: Tensor, lse: Tensor | None = None) -> None:
    """Dense attention of q [B, H, Nq, D] to k, v [B, Hkv, Nk, D] into out [B, H, Nq, D], all of any strides, and into lse
    [B, H, Nq] (float32, contiguous), if `fault`, one int32, has a 1 in it; ORs 2 into it if that is not finite either.

    Takes whatever `cuda.unsupported` does not refuse in some format. Allocates nothing and does not wait.
    """
    B, H, n_q, D = q.shape
    chosen = settings(D, q.element_size() == 4)
    blocks = triton.cdiv(n_q, chosen["BM"])
    items = blocks * B * H
    _repair[(min(items, launch.resident(q.device)),)](
        q, k, v, out, lse, fault, scale * LOG2_E, H, H // k.shape[1], n_q, k.shape[2], items, blocks,
        *q.stride(), *k.stride(), *v.stride(), *out.stride(),
        D=D, DP=max(16, triton.next_power_of_2(D)), LSE=lse is not None, **chosen,
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["Fault"])
def _repair(
    Q, K, V, Out, Lse, Fault, scale, heads, group, n_q, n_k, items, blocks,
    q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """Item `block + blocks · head` is a block of queries of a head; a program takes every so many'th."""
    if (tl.load(Fault) & 1) == 0:
        return
    d = tl.arange(0, DP)
    inside = (d < D)[None, :]
    columns = tl.arange(0, BN)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        bh = (item // blocks).to(tl.int64)
        b = bh // heads
        h = bh % heads
        token = (item % blocks).to(tl.int64) * BM + tl.arange(0, BM)
        live = token < n_q
        keys = K + b * k_b + (h // group) * k_h
        values = V + b * v_b + (h // group) * v_h
        q = tl.load(Q + b * q_b + h * q_h + token[:, None] * q_n + d[None, :] * q_d, mask=live[:, None] & inside, other=0.0)
        top = tl.full((BM,), float("-inf"), tl.float32)  # not a finite floor: there is a key, and its score may be any number
        total = tl.zeros((BM,), tl.float32)
        acc = tl.zeros((BM, DP), tl.float32)
        for start in range(0, n_k, BN):
            real = columns < n_k - start
            there = real[:, None] & inside
            k = tl.load(keys + (columns[:, None] * k_n + d[None, :] * k_d), mask=there, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
            s = tl.where(real[None, :], s, float("-inf"))
            new = tl.maximum(top, tl.max(s, 1))
            keep = tl.math.exp2(top - new)
            p = tl.math.exp2(s - new[:, None])
            v = tl.load(values + (columns[:, None] * v_n + d[None, :] * v_d), mask=there, other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="tf32x3")
            total = total * keep + tl.sum(p, 1)
            top = new
            keys += BN * k_n  # so that offsets within a block fit 32 bits, however long the sequence
            values += BN * v_n
        out = (acc / total[:, None]).to(Out.dtype.element_ty)
        lse = (top + tl.math.log2(total)) * LN_2
        tl.store(Out + b * o_b + h * o_h + token[:, None] * o_n + d[None, :] * o_d, out, mask=live[:, None] & inside)
        if LSE:
            tl.store(Lse + bh * n_q + token, lse, mask=live)
        raise_fault(Fault, out, lse, live, 2)
