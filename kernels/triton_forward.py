"""The attention kernel itself, in Triton: one program answers one block of a query tile, over that tile's list of key tiles.

FlashAttention-2 (arXiv 2307.08691) over a list instead of a range. Q is gathered from token order as it is loaded and the
answer scattered back as it is stored; K and V were laid out in tile order by `pack.py`. Scores are kept in base 2.
What costs instructions only sometimes is a constant of the compiled kernel: a kernel that needs none of it has none of it.

Tiles without padding come first in a list, so that only the loop over the others masks. FP8 and INT8 products of P and V are
added to a float32 accumulator tile by tile, because FP8 tensor cores add in about 22 bits (SageAttention2, arXiv 2411.10958
§3.3); their keys are relabelled inside groups of 16, P here and V in `pack.py`, so that P goes from accumulator to
operand without leaving its thread. INT4 K lies packed two to a byte and is unpacked in registers to INT8 products.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(-1e30)
"""A finite "no key yet": minus infinity less itself would be NaN."""


@triton.jit
def raise_fault(Fault, out, lse, live, BIT: tl.constexpr):
    """ORs BIT into an int32 where a row that is stored is not finite: out as it is rounded, lse −inf where no key was seen.

    A row at a time, so that no warp waits for another: where all is well it costs a sum and a predicate that is never true.
    """
    wrong = (tl.sum(out.to(tl.float32) * 0, 1) != 0) | ~(lse < float("inf"))  # 0·x is NaN where x is not finite
    tl.atomic_or(Fault + tl.zeros_like(lse).to(tl.int32), tl.full(lse.shape, BIT, tl.int32), mask=wrong & live, sem="relaxed")


@triton.jit(do_not_specialize_on_alignment=["Fault"])
def forward(
    Q, RawQ, K, V, Out, Lse, QScale, KScale, VScale, VMean, TileBias, BiasQ, BiasK, KMean,
    QOrder, KCount, Num, Whole, Index, Schedule, Fault,
    scale, heads, group, n_q, q_tiles, k_tiles, slots, parts, q_b, q_h, q_n, o_s, o_b, o_h, o_n, num_b, num_h, bq_b, bq_h,
    bk_b, bk_h,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, Q_PARTS: tl.constexpr, K_PARTS: tl.constexpr,
    QK: tl.constexpr, PV: tl.constexpr, PADDED: tl.constexpr, TILE_BIAS: tl.constexpr, RANK: tl.constexpr,
    KEY_BIAS: tl.constexpr, CENTRED_K: tl.constexpr, CENTRED_V: tl.constexpr,
    P_SHIFT: tl.constexpr, LOCAL: tl.constexpr, SPLIT: tl.constexpr, ASM: tl.constexpr, FLAG: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    item = tl.load(Schedule + block // Q_PARTS)  # heavy tiles first: the last programs to run are short ones
    tile = item % q_tiles
    bh = (item // q_tiles).to(tl.int64)
    b = bh // heads
    h = bh % heads
    kv = b * (heads // group) + h // group
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BN)
    d = tl.arange(0, DP)
    inside = d < D
    slot = (block % Q_PARTS) * BM + rows
    token = tl.load(QOrder + tile * slots + slot, mask=slot < slots, other=-1)
    live = token >= 0

    HALF: tl.constexpr = DP // 2
    half = tl.arange(0, HALF)
    raw = RawQ + b * q_b + h * q_h + token[:, None] * q_n + d[None, :]
    row_scale = scale
    if QK == "none":
        q = tl.load(raw, mask=live[:, None] & inside[None, :], other=0.0)
    else:
        row = ((bh * q_tiles + tile) * Q_PARTS + block % Q_PARTS) * BM + rows
        row_scale = scale * tl.load(QScale + bh * q_tiles + tile)
        if QK == "int4":
            q = tl.load(Q + row[:, None] * DP + half[None, :])
            q_high = tl.load(Q + row[:, None] * DP + HALF + half[None, :])
            row_scale = row_scale / 16  # both nibbles of K are used 16 times too large: no shift down
        else:
            q = tl.load(Q + row[:, None] * DP + d[None, :])
    keys = k_tiles * K_PARTS * BN
    if RANK > 0:
        rank = tl.arange(0, RANK)
        bias_q = tl.load(BiasQ + b * bq_b + h * bq_h + token[:, None] * RANK + rank[None, :], mask=live[:, None], other=0.0)
        BiasK += (b * bk_b + h * bk_h) * keys * RANK
    if KEY_BIAS:
        BiasK += (b * bk_b + h * bk_h) * keys
    if TILE_BIAS:
        TileBias += (bh * q_tiles + tile) * keys

    K += kv * keys * (HALF if QK == "int4" else DP)
    V += kv * keys * DP
    lists = b * num_b + h * num_h + tile
    Index += lists * k_tiles
    steps = tl.load(Num + lists) * K_PARTS
    low = 0
    high = steps
    if SPLIT:
        low = steps * tl.program_id(1) // parts
        high = steps * (tl.program_id(1) + 1) // parts
    whole = steps
    if PADDED:
        whole = tl.load(Whole + lists) * K_PARTS
    top = tl.full((BM,), FLOOR, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DP), tl.float32)
    for masked in tl.static_range(2 if PADDED else 1):
        begin = low if masked == 0 else tl.maximum(low, whole)
        end = tl.minimum(high, whole) if masked == 0 else high
        for i in range(begin, end):
            k_tile = tl.load(Index + i // K_PARTS)
            first = (k_tile * K_PARTS + i % K_PARTS) * BN
            if QK == "int4":
                pair = tl.load(K + first * HALF + (columns[:, None] * HALF + half[None, :]))
                if ASM:
                    k, k_high = tl.inline_asm_elementwise(
                        "shl.b32 $0, $2, 4; and.b32 $0, $0, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0;",
                        "=r,=r,r", [pair], dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
                    )  # fmt: skip
                else:
                    k = (pair << 4).to(tl.int8)
                    k_high = (pair & -16).to(tl.int8)
                s = tl.dot(q, tl.trans(k), out_dtype=tl.int32)
                s = tl.dot(q_high, tl.trans(k_high), s, out_dtype=tl.int32).to(tl.float32)
            else:
                k = tl.load(K + first * DP + (columns[:, None] * DP + d[None, :]))
                if QK == "int8":
                    s = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
                else:
                    s = tl.dot(q, tl.trans(k), input_precision="tf32x3")
            factor = row_scale
            if QK != "none":
                factor = row_scale * tl.load(KScale + kv * k_tiles + k_tile)
            if RANK > 0:
                bias_k = tl.load(BiasK + (first + columns)[:, None] * RANK + rank[None, :])
                s = tl.dot(bias_q, tl.trans(bias_k), s * factor, input_precision="tf32x3")
                factor = 1.0
            if TILE_BIAS:
                s = s * factor + tl.load(TileBias + first + columns)[None, :]
                factor = 1.0
            if KEY_BIAS:
                s = s * factor + tl.load(BiasK + first + columns)[None, :]
                factor = 1.0
            if masked == 1:
                s = tl.where(((i % K_PARTS) * BN + columns < tl.load(KCount + k_tile))[None, :], s, float("-inf"))
            here = tl.maximum(tl.max(s, 1) * factor, FLOOR)
            new = tl.maximum(top, here)
            keep = tl.math.exp2(top - new)
            base = here if LOCAL else new
            p = tl.math.exp2(tl.math.fma(s, tl.zeros_like(s) + factor, tl.zeros_like(s) + (P_SHIFT - base)[:, None]))
            row_sum = tl.sum(p, 1)
            if PV == "none":
                v = tl.load(V + first * DP + (columns[:, None] * DP + d[None, :]))
                acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="tf32x3")
            else:
                p = tl.reshape(tl.permute(tl.reshape(p, (BM, BN // 16, 2, 4, 2)), (0, 1, 3, 2, 4)), (BM, BN))
                v = tl.trans(tl.load(V + first * DP + (d[:, None] * BN + columns[None, :])))
                if PV == "fp8":
                    part = tl.dot(p.to(tl.float8e4nv), v)
                else:
                    code = (p + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)  # 1.5 · 2²³ rounds: the low byte is p
                    part = tl.dot(code, v, out_dtype=tl.int32).to(tl.float32)
                if LOCAL:
                    share = tl.math.exp2(here - new)
                    part *= share[:, None]
                    row_sum *= share
                acc = acc * keep[:, None] + part
            total = total * keep + row_sum
            top = new

    # The tokens are loaded again: kept through the loops, they and what is made of them would not fit the registers.
    token = tl.load(QOrder + tile * slots + slot, mask=slot < slots, other=-1)
    live = token >= 0
    seen = total != 0  # NaN counts as seen, and stays NaN
    some = tl.where(seen, total, 1.0)
    out = acc / some[:, None]
    if PV != "none":
        out *= tl.load(VScale + kv * D + d, mask=inside, other=0.0)[None, :]
    if CENTRED_V:
        out += tl.where(seen[:, None], tl.load(VMean + kv * D + d, mask=inside, other=0.0)[None, :], 0.0)
    lse = tl.where(seen, (top + tl.math.log2(some) - P_SHIFT) * LN_2, float("-inf"))
    if CENTRED_K:  # the LSE of the logits as they were before K was centred
        raw = RawQ + b * q_b + h * q_h + token[:, None] * q_n + d[None, :]
        q = tl.load(raw, mask=live[:, None] & inside[None, :], other=0.0).to(tl.float32)
        mean = tl.load(KMean + kv * D + d, mask=inside, other=0.0)
        lse += scale * LN_2 * tl.sum(q * mean[None, :], 1)
    if SPLIT:
        split = tl.program_id(1).to(tl.int64)
        Out += split * o_s
        Lse += split * (tl.num_programs(0) // (q_tiles * Q_PARTS)) * n_q
    where = Out + b * o_b + h * o_h + token[:, None] * o_n + d[None, :]
    out = out.to(Out.dtype.element_ty)
    tl.store(where, out, mask=live[:, None] & inside[None, :])
    tl.store(Lse + bh * n_q + token, lse, mask=live)
    if FLAG:
        raise_fault(Fault, out, lse, live, 1)
