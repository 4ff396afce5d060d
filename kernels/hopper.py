"""Block-sparse attention for Hopper (sm_90) in Gluon: softmax runs while the tensor cores work, which plain Triton cannot say.

One producer warp brings keys and values of a query tile's list into a ring of shared memory with the bulk copy engine; one or
two consumer warpgroups of 64 query rows each attend to them (warp specialization and the overlap of products with softmax
after FlashAttention-3, arXiv 2407.08608 §3.1 and §3.2). The products of one step are in flight while a softmax runs:

    16-bit V: Q·Kᵀ of step i is issued together with P·V of step i − 1, and the softmax of i runs under the latter
    FP8 V: the exponentials of step i − 1 run under Q·Kᵀ of step i, the maxima of i under P·V of i − 1. That product has an
        accumulator of its own, added in float32: FP8 tensor cores add in about 22 bits (SageAttention2, arXiv 2411.10958 §3.3)

It reads and writes what `triton_forward.py` does. Gluon has no interpreter: numbers are tested on a GPU, what it compiles to in
tests/kernels/test_compile.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastdit.core.quant import LARGEST, Quant
from fastdit.kernels.pack import Packed, Rows

LN_2 = gl.constexpr(0.6931471805599453)
FLOOR = gl.constexpr(-1e30)
"""As in `triton_forward.py`: a finite "no key yet"."""

async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # Triton 3.9 renamed it


@gluon.jit
def _exponents(s, i, top, factor, real, K_PARTS: gl.constexpr, MASKED: gl.constexpr, P_SHIFT: gl.constexpr):
    """Scores of step i -> exponents of P in base 2, the new maximum, and what sums and accumulator so far are multiplied with.
    MASKED: of the step's tile only the first `real` keys are there."""
    s = s.to(gl.float32)
    if MASKED:
        BN: gl.constexpr = s.shape[1]
        column = (i % K_PARTS) * BN + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
        s = gl.where((column < real)[None, :], s, float("-inf"))
    new = gl.maximum(top, gl.maximum(gl.max(s, 1) * factor, FLOOR))
    t = gl.fma(s, gl.full_like(s, 0.0) + factor, gl.full_like(s, 0.0) + gl.expand_dims(P_SHIFT - new, 1))
    return t, new, gl.exp2(top - new)


@gluon.jit
def _operand(p, LAYOUT: gl.constexpr, EIGHT: gl.constexpr, dtype: gl.constexpr):
    """P as the left operand of P·V, without leaving its thread: keys of FP8 are relabelled as `pack.py` did those of V."""
    p = p.to(dtype)
    if EIGHT:
        p = p.reshape([64, p.shape[1] // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([64, p.shape[1]])
    return gl.convert_layout(p, LAYOUT, assert_trivial=True)


@gluon.jit
def _facts(i, Index, scales, KCount, row_scale, K_PARTS: gl.constexpr, QK: gl.constexpr, MASKED: gl.constexpr):
    """Of step i: what its scores are multiplied with, and how many keys its tile has."""
    factor, real = row_scale, 0
    if QK != "none" or MASKED:
        k_tile = gl.load(Index + i // K_PARTS)
        if QK != "none":
            factor = row_scale * gl.load(scales + k_tile)
        if MASKED:
            real = gl.load(KCount + k_tile)
    return factor, real


@gluon.jit
def _step(
    i, state, q_s, k_s, v_s, ready, free, Index, scales, KCount, row_scale,
    P: gl.constexpr, K_PARTS: gl.constexpr, STAGES: gl.constexpr, QK: gl.constexpr, V8: gl.constexpr, MASKED: gl.constexpr,
    P_SHIFT: gl.constexpr,
):  # fmt: skip
    """Scores of step i, values of step i − 1. What is carried to the next step: FP8 V the exponents, 16-bit V already P; the
    factor `keep` that is still to be applied to the sum and, in FP8, to the accumulator."""
    carried, top, total, acc, keep = state
    O_ROW: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    BN: gl.constexpr = k_s.shape[1]
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32 if QK != "none" else 16])
    stage = i % STAGES
    # Two loads, one behind the other: asked for now, they are there when the scores are.
    factor, real = _facts(i, Index, scales, KCount, row_scale, K_PARTS, QK, MASKED)
    mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
    none = gl.zeros([64, BN], gl.int32 if QK == "int8" else gl.float32, S)
    ahead = warpgroup_mma(q_s, k_s.index(stage).permute([1, 0]), none, use_acc=False, is_async=True)
    if V8:
        p = gl.exp2(carried)
        total = total * keep + gl.sum(p, 1)
        p = _operand(p, P, True, v_s.dtype)
        more = warpgroup_mma(p, v_s.index(stage).permute([1, 0]), gl.zeros_like(acc), use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, [ahead])
        t, top, keep_ahead = _exponents(s, i, top, factor, real, K_PARTS, MASKED, P_SHIFT)
        more = warpgroup_mma_wait(0, [more])
        mbarrier.arrive(free.index(stage), count=1)
        acc = acc * gl.convert_layout(keep, O_ROW)[:, None] + more
        return t, top, total, acc, keep_ahead
    else:
        more = warpgroup_mma(carried, v_s.index(stage), acc, is_async=True)
        s = warpgroup_mma_wait(1, [ahead])
        t, top, keep = _exponents(s, i, top, factor, real, K_PARTS, MASKED, P_SHIFT)
        p = gl.exp2(t)
        total = total * keep + gl.sum(p, 1)
        acc = warpgroup_mma_wait(0, [more])
        mbarrier.arrive(free.index(stage), count=1)
        acc = acc * gl.convert_layout(keep, O_ROW)[:, None]
        return _operand(p, P, False, v_s.dtype), top, total, acc, keep


@gluon.jit
def _consume(
    W: gl.constexpr, q_s, k_s, v_s, ready, free,
    Q, RawQ, Out, Lse, QScale, KScale, VScale, VMean, KMean, QOrder, KCount, Index, Fault,
    scale, bh, kv, tile, part, q_tiles, k_tiles, n_q, slots, steps, whole, q_n, o_n,
    D: gl.constexpr, DP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, Q_PARTS: gl.constexpr, K_PARTS: gl.constexpr,
    STAGES: gl.constexpr, QK: gl.constexpr, PV: gl.constexpr, PADDED: gl.constexpr, CENTRED_K: gl.constexpr,
    CENTRED_V: gl.constexpr, P_SHIFT: gl.constexpr, FLAG: gl.constexpr,
):  # fmt: skip
    """Warpgroup W: rows 64·W to 64·W + 63 of the block."""
    Q8: gl.constexpr = QK != "none"
    V8: gl.constexpr = PV != "none"
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32 if Q8 else 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DP, 32 if V8 else 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 4 if V8 else 2)
    IN: gl.constexpr = gl.BlockedLayout([1, 16], [512 // DP, DP // 16], [4, 1], [1, 0])
    IO: gl.constexpr = gl.BlockedLayout([1, 8], [256 // DP, DP // 8], [4, 1], [1, 0])
    S_ROW: gl.constexpr = gl.SliceLayout(1, S)
    O_ROW: gl.constexpr = gl.SliceLayout(1, OUT)
    dtype: gl.constexpr = v_s.dtype

    if Q8:
        row = ((bh * q_tiles + tile) * Q_PARTS + part) * BM + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, IN))
        d = gl.arange(0, DP, gl.SliceLayout(0, IN))
        q_s.store(gl.load(Q + row.to(gl.int64)[:, None] * DP + d[None, :]))
        row_scale = scale * gl.load(QScale + bh * q_tiles + tile)
    else:
        slot = part * BM + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, IO))
        token = gl.load(QOrder + tile * slots + slot, mask=slot < slots, other=-1)
        d = gl.arange(0, DP, gl.SliceLayout(0, IO))
        inside = (token >= 0)[:, None] & (d < D)[None, :]
        q_s.store(gl.load(RawQ + token[:, None] * q_n + d[None, :], mask=inside, other=0.0))
        row_scale = scale
    fence_async_shared()

    scales = KScale + kv * k_tiles
    top = gl.full([64], FLOOR, gl.float32, S_ROW)
    total = gl.zeros([64], gl.float32, S_ROW)
    acc = gl.zeros([64, DP], gl.float32, OUT)
    if steps > 0:
        factor, real = _facts(0, Index, scales, KCount, row_scale, K_PARTS, QK, PADDED)
        mbarrier.wait(ready.index(0), 0)
        none = gl.zeros([64, BN], gl.int32 if QK == "int8" else gl.float32, S)
        s = warpgroup_mma(q_s, k_s.index(0).permute([1, 0]), none, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(free.index(0), count=1)
        carried, top, keep = _exponents(s, 0, top, factor, real, K_PARTS, PADDED, P_SHIFT)
        if not V8:
            p = gl.exp2(carried)
            total = gl.sum(p, 1)
            carried = _operand(p, P, False, dtype)
        for i in range(1, whole):
            carried, top, total, acc, keep = _step(
                i, (carried, top, total, acc, keep), q_s, k_s, v_s, ready, free, Index, scales, KCount, row_scale,
                P, K_PARTS, STAGES, QK, V8, False, P_SHIFT,
            )  # fmt: skip
        if PADDED:  # tiles that lack tokens come last: only this loop has a mask
            for i in range(gl.maximum(whole, 1), steps):
                carried, top, total, acc, keep = _step(
                    i, (carried, top, total, acc, keep), q_s, k_s, v_s, ready, free, Index, scales, KCount, row_scale,
                    P, K_PARTS, STAGES, QK, V8, True, P_SHIFT,
                )  # fmt: skip
        last = steps % STAGES
        values = v_s.index(last)
        if V8:
            p = gl.exp2(carried)
            total = total * keep + gl.sum(p, 1)
            acc = acc * gl.convert_layout(keep, O_ROW)[:, None]
            carried = _operand(p, P, True, dtype)
            values = values.permute([1, 0])
        mbarrier.wait(ready.index(last), (steps // STAGES) & 1)
        acc = warpgroup_mma(carried, values, acc, is_async=True)
        acc = warpgroup_mma_wait(0, [acc])

    seen = total != 0  # NaN counts as seen, and stays NaN
    some = gl.where(seen, total, 1.0)
    out = acc / gl.convert_layout(some, O_ROW)[:, None]
    channel = gl.arange(0, DP, gl.SliceLayout(0, OUT))
    if V8:
        out = out * gl.load(VScale + kv * D + channel, mask=channel < D, other=0.0)[None, :]
    if CENTRED_V:
        mean = gl.load(VMean + kv * D + channel, mask=channel < D, other=0.0)
        out = out + gl.where(gl.convert_layout(seen, O_ROW)[:, None], mean[None, :], 0.0)
    lse = gl.where(seen, (top + gl.log2(some) - P_SHIFT) * LN_2, float("-inf"))
    slot = part * BM + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, IO))
    token = gl.load(QOrder + tile * slots + slot, mask=slot < slots, other=-1)
    d = gl.arange(0, DP, gl.SliceLayout(0, IO))
    inside = (token >= 0)[:, None] & (d < D)[None, :]
    lse = gl.convert_layout(lse, gl.SliceLayout(1, IO))
    if CENTRED_K:  # the LSE of the logits as they were before K was centred
        q = gl.load(RawQ + token[:, None] * q_n + d[None, :], mask=inside, other=0.0).to(gl.float32)
        mean = gl.load(KMean + kv * D + d, mask=d < D, other=0.0)
        lse = lse + scale * LN_2 * gl.sum(q * mean[None, :], 1)
    out = gl.convert_layout(out.to(Out.dtype.element_ty), IO)
    gl.store(Out + token[:, None] * o_n + d[None, :], out, mask=inside)
    gl.store(Lse + bh * n_q + token, lse, mask=token >= 0)
    if FLAG:  # as `raise_fault` of `triton_forward.py` does
        wrong = (gl.sum(out.to(gl.float32) * 0, 1) != 0) | ~(lse < float("inf"))
        where = Fault[0] + gl.full([64], 0, gl.int32, token.type.layout)
        gl.atomic_or(where, gl.full([64], 1, gl.int32, token.type.layout), mask=wrong & (token >= 0), sem="relaxed")


@gluon.jit
def _produce(
    keys, values, k_s, v_s, ready, free, Index, steps, kv, k_tiles,
    DP: gl.constexpr, BN: gl.constexpr, K_PARTS: gl.constexpr, STAGES: gl.constexpr, V8: gl.constexpr,
    K_BYTES: gl.constexpr, V_BYTES: gl.constexpr,
):  # fmt: skip
    """Keys of step i and values of step i − 1 come and go together: one barrier to wait for, one to give back."""
    first = (kv * k_tiles * K_PARTS).to(gl.int32)
    ROWS: gl.constexpr = DP if V8 else BN
    if steps > 0:
        block = first + gl.load(Index) * K_PARTS
        mbarrier.expect(ready.index(0), K_BYTES)
        async_load(keys, [block * BN, 0], ready.index(0), k_s.index(0))
        for i in range(1, steps):
            stage = i % STAGES
            before = block
            block = first + gl.load(Index + i // K_PARTS) * K_PARTS + i % K_PARTS
            mbarrier.wait(free.index(stage), ((i // STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(stage), K_BYTES + V_BYTES)
            async_load(keys, [block * BN, 0], ready.index(stage), k_s.index(stage))
            async_load(values, [before * ROWS, 0], ready.index(stage), v_s.index(stage))
        stage = steps % STAGES
        mbarrier.wait(free.index(stage), ((steps // STAGES) & 1) ^ 1)
        mbarrier.expect(ready.index(stage), V_BYTES)
        async_load(values, [block * ROWS, 0], ready.index(stage), v_s.index(stage))


@gluon.jit(do_not_specialize_on_alignment=["Fault"])
def forward(
    keys, values, Q, RawQ, Out, Lse, QScale, KScale, VScale, VMean, KMean, QOrder, KCount, Num, Whole, Index, Schedule, Fault,
    scale, heads, group, n_q, q_tiles, k_tiles, slots, q_b, q_h, q_n, o_b, o_h, o_n, num_b, num_h,
    D: gl.constexpr, DP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, Q_PARTS: gl.constexpr, K_PARTS: gl.constexpr,
    STAGES: gl.constexpr, QK: gl.constexpr, PV: gl.constexpr, PADDED: gl.constexpr, CENTRED_K: gl.constexpr,
    CENTRED_V: gl.constexpr, P_SHIFT: gl.constexpr, FLAG: gl.constexpr,
):  # fmt: skip
    """One program a block of BM = 64 or 128 queries of a tile. keys [rows, DP]; values [rows, DP], FP8 [blocks · DP, BN]."""
    GROUPS: gl.constexpr = BM // 64
    V8: gl.constexpr = PV != "none"
    block = gl.program_id(0)
    item = gl.load(Schedule + block // Q_PARTS)
    part = block % Q_PARTS
    tile = item % q_tiles
    bh = (item // q_tiles).to(gl.int64)
    b = bh // heads
    h = bh % heads
    kv = b * (heads // group) + h // group
    lists = b * num_b + h * num_h + tile
    Index += lists * k_tiles
    steps = gl.load(Num + lists) * K_PARTS
    whole = steps
    if PADDED:
        whole = gl.load(Whole + lists) * K_PARTS
    RawQ += b * q_b + h * q_h
    Out += b * o_b + h * o_h

    Q_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, DP], keys.dtype)
    q_s = gl.allocate_shared_memory(keys.dtype, [GROUPS, 64, DP], Q_SHARED)
    k_s = gl.allocate_shared_memory(keys.dtype, [STAGES, BN, DP], keys.layout)
    v_s = gl.allocate_shared_memory(values.dtype, [STAGES, DP if V8 else BN, BN if V8 else DP], values.layout)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=GROUPS)
    fence_async_shared()
    K_BYTES: gl.constexpr = BN * DP * (1 if QK != "none" else 2)
    V_BYTES: gl.constexpr = BN * DP * (1 if V8 else 2)
    fault = (Fault,) if FLAG else ()  # what is not needed is not handed over: the kernel without is as it was
    if GROUPS == 2:
        gl.warp_specialize([
            (_consume, (0, q_s.index(0), k_s, v_s, ready, free, Q, RawQ, Out, Lse, QScale, KScale, VScale,
                        VMean, KMean, QOrder, KCount, Index, fault, scale, bh, kv, tile, part, q_tiles, k_tiles, n_q, slots,
                        steps, whole, q_n, o_n, D, DP, BM, BN, Q_PARTS, K_PARTS, STAGES, QK, PV, PADDED, CENTRED_K, CENTRED_V,
                        P_SHIFT, FLAG)),
            (_consume, (1, q_s.index(1), k_s, v_s, ready, free, Q, RawQ, Out, Lse, QScale, KScale, VScale,
                        VMean, KMean, QOrder, KCount, Index, fault, scale, bh, kv, tile, part, q_tiles, k_tiles, n_q, slots,
                        steps, whole, q_n, o_n, D, DP, BM, BN, Q_PARTS, K_PARTS, STAGES, QK, PV, PADDED, CENTRED_K, CENTRED_V,
                        P_SHIFT, FLAG)),
            (_produce, (keys, values, k_s, v_s, ready, free, Index, steps, kv, k_tiles, DP, BN, K_PARTS,
                        STAGES, V8, K_BYTES, V_BYTES)),
        ], [4, 4], [240, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (0, q_s.index(0), k_s, v_s, ready, free, Q, RawQ, Out, Lse, QScale, KScale, VScale,
                        VMean, KMean, QOrder, KCount, Index, fault, scale, bh, kv, tile, part, q_tiles, k_tiles, n_q, slots,
                        steps, whole, q_n, o_n, D, DP, BM, BN, Q_PARTS, K_PARTS, STAGES, QK, PV, PADDED, CENTRED_K, CENTRED_V,
                        P_SHIFT, FLAG)),
            (_produce, (keys, values, k_s, v_s, ready, free, Index, steps, kv, k_tiles, DP, BN, K_PARTS,
                        STAGES, V8, K_BYTES, V_BYTES)),
        ], [4], [24])  # fmt: skip


NAMES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv, torch.int8: gl.int8}


def _blocks(data: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Packed K or V as the bulk copy engine reads it: blocks [rows, columns] one behind the other."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], NAMES[data.dtype])
    return TensorDescriptor.from_tensor(data.view(-1, columns), [rows, columns], layout)


def attend(
    q: Tensor, queries: Packed | None, keys: Packed, values: Packed, q_order: Tensor, lists: tuple[Tensor, ...], q_rows: Rows,
    k_rows: Rows, width: int, quant: Quant, scale: float, group: int, stages: int, padded: bool,
    num_step: tuple[int, int], fault: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [B, H, N, D] and what `pack.py` made of it, K and V -> out (strides of q), lse [B, H, N].

    lists: (tokens of each key tile, length of each list, how many of it lack none, tiles, schedule) as in `Lists`; scale in
    base 2; num_step: steps of the lists' lengths from one batch element and head to the next; fault as in
    `cuda.block_sparse_attention`.
    """
    B, H, N, D = q.shape
    count, num, whole, index, schedule = lists
    out, lse = torch.empty_like(q), q.new_empty(B, H, N, dtype=torch.float32)
    eight = quant.pv != "none"
    blank: Any = lse  # stands where the compiled kernel has no use for an argument
    forward[(len(q_order) * q_rows.parts * B * H,)](
        _blocks(keys.data, k_rows.block, width),
        _blocks(values.data, width, k_rows.block) if eight else _blocks(values.data, k_rows.block, width),
        q if queries is None else queries.data, q, out, lse,
        *(blank if x is None else x for x in (queries and queries.scale, keys.scale, values.scale, values.mean, keys.mean)),
        q_order, count, num, whole, index, schedule, fault,
        scale, H, group, N, len(q_order), index.shape[-1], q_rows.slots, *q.stride()[:3], *out.stride()[:3], *num_step,
        D=D, DP=width, BM=q_rows.block, BN=k_rows.block, Q_PARTS=q_rows.parts, K_PARTS=k_rows.parts, STAGES=stages,
        QK=quant.qk, PV=quant.pv, PADDED=padded, CENTRED_K=keys.mean is not None, CENTRED_V=quant.smooth_v,
        P_SHIFT=math.log2(LARGEST["fp8"]) if eight else 0.0, FLAG=fault is not None, num_warps=4,
        maxnreg=None if q_rows.block == 128 else 128,  # two blocks of one warpgroup share a multiprocessor
    )  # fmt: skip
    return out, lse
