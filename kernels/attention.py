"""Block-sparse flash attention in Triton: every kept tile in one pass, any format of `fastdit.quant`, out and LSE.

Each program answers one block of a query tile and walks that tile's list of key tiles (FlashAttention-2, arXiv 2307.08691,
over a list instead of a range). Q is gathered from token order as it is loaded and the answer scattered back as it is stored;
K and V were laid out in tile order by `quantize.py`. Scores are kept in base 2.

FP8 and INT8 use the tensor cores' own types. P is scaled to 448, relative to the maximum so far, and each tile's product is
added to a float32 accumulator of its own, because FP8 tensor cores add in about 22 bits (SageAttention2, arXiv 2411.10958
§3.3). INT4 K lies packed two to a byte and is unpacked in registers to INT8 products: half the bytes of K, no faster
arithmetic on Hopper and later, which have no INT4 unit. With Q-smoothing the lost q̄·Kᵀ enters as a bias per query tile.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels import configs
from fastdit.kernels.quantize import Packed, Rows, pack, pack_values
from fastdit.quant import BLOCK, Quant

LOG2_E = math.log2(math.e)


@triton.jit
def _forward(
    Q, K, V, Out, Lse, QScale, KScale, VScale, VMean, Bias, QOrder, KCount, Num, Index,
    scale, heads, n_q, q_tiles, k_tiles, slots, q_b, q_h, q_n, o_b, o_h, o_n, num_b, num_h,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, Q_PARTS: tl.constexpr, K_PARTS: tl.constexpr,
    QK: tl.constexpr, PV: tl.constexpr, PADDED: tl.constexpr, BIASED: tl.constexpr, CENTRED_V: tl.constexpr,
    P_SHIFT: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    tile = block // Q_PARTS
    bh = tl.program_id(1).to(tl.int64)
    b = bh // heads
    h = bh % heads
    rows = tl.arange(0, BM)
    columns = tl.arange(0, BN)
    d = tl.arange(0, DP)
    slot = (block % Q_PARTS) * BM + rows
    token = tl.load(QOrder + tile * slots + slot, mask=slot < slots, other=-1)
    live = token >= 0

    HALF: tl.constexpr = DP // 2
    half = tl.arange(0, HALF)
    if QK == "none":
        here = Q + b * q_b + h * q_h + token[:, None] * q_n + d[None, :]
        q = tl.load(here, mask=live[:, None] & (d < D)[None, :], other=0.0)
        row_scale = scale
    else:
        row = (bh * q_tiles * Q_PARTS + block) * BM + rows
        row_scale = scale * tl.load(QScale + bh * q_tiles + tile)
        if QK == "int4":
            q = tl.load(Q + row[:, None] * DP + half[None, :])
            q_high = tl.load(Q + row[:, None] * DP + HALF + half[None, :])
            row_scale = row_scale / 16  # both nibbles of K are used 16 times too large: no shift down
        else:
            q = tl.load(Q + row[:, None] * DP + d[None, :])

    keys = k_tiles * K_PARTS * BN
    K += bh * keys * (HALF if QK == "int4" else DP)
    V += bh * keys * DP
    Num += b * num_b + h * num_h
    Index += (b * num_b + h * num_h + tile) * k_tiles
    top = tl.full((BM,), -1e30, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DP), tl.float32)
    for i in range(tl.load(Num + tile) * K_PARTS):
        k_tile = tl.load(Index + i // K_PARTS)
        first = (k_tile * K_PARTS + i % K_PARTS) * BN
        if QK == "int4":
            pair = tl.load(K + (first + columns)[:, None] * HALF + half[None, :])
            s = tl.dot(q, tl.trans((pair << 4).to(tl.int8)), out_dtype=tl.int32)
            s = tl.dot(q_high, tl.trans((pair & -16).to(tl.int8)), s, out_dtype=tl.int32).to(tl.float32)
        else:
            k = tl.load(K + (first + columns)[:, None] * DP + d[None, :])
            if QK == "int8":
                s = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
            else:
                s = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        factor = row_scale
        if QK != "none":
            factor = row_scale * tl.load(KScale + bh * k_tiles + k_tile)
        if BIASED:
            s = s * factor + tl.load(Bias + (bh * q_tiles + tile) * keys + first + columns)[None, :]
            factor = 1.0
        if PADDED:
            s = tl.where(((i % K_PARTS) * BN + columns < tl.load(KCount + k_tile))[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1) * factor)
        keep = tl.math.exp2(top - new)
        p = tl.math.exp2(tl.math.fma(s, tl.zeros_like(s) + factor, tl.zeros_like(s) + (P_SHIFT - new)[:, None]))
        total = total * keep + tl.sum(p, 1)
        top = new
        if PV == "fp8":
            v = tl.trans(tl.load(V + d[:, None] * keys + (first + columns)[None, :]))
            acc = acc * keep[:, None] + tl.dot(p.to(tl.float8e4nv), v)
        else:
            v = tl.load(V + (first + columns)[:, None] * DP + d[None, :])
            acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision="tf32x3")

    seen = total > 0
    # NaN must stay NaN: `seen` is false for it as well.
    out = acc / tl.where(total == 0, 1.0, total)[:, None]
    inside = d < D
    if PV == "fp8":
        out *= tl.load(VScale + bh * D + d, mask=inside, other=0.0)[None, :]
    if CENTRED_V:
        out += tl.where(seen[:, None], tl.load(VMean + bh * D + d, mask=inside, other=0.0)[None, :], 0.0)
    lse = (top + tl.math.log2(tl.where(total == 0, 1.0, total)) - P_SHIFT) * 0.6931471805599453
    lse = tl.where(total == 0, float("-inf"), lse)
    where = Out + b * o_b + h * o_h + token[:, None] * o_n + d[None, :]
    tl.store(where, out.to(Out.dtype.element_ty), mask=live[:, None] & inside[None, :])
    tl.store(Lse + bh * n_q + token, lse, mask=live)


def unsupported(q: Tensor, quant: Quant, capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability has no kernel for these inputs, or None if it has."""
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}: kernels need 8.0 (Ampere) or newer"
    if q.dtype == torch.float64:
        return "no float64 kernel"
    if q.shape[-1] > 256:
        return f"head dim {q.shape[-1]}: kernels go to 256"
    if "fp8" in (quant.qk, quant.pv) and capability < (8, 9):
        return f"compute capability {capability[0]}.{capability[1]} has no FP8: it needs 8.9 (Ada) or newer"
    if quant.pv == "int8":
        return "no kernel for int8 P·V: use fp8 or none"
    return None


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, q_order: Tensor, k_order: Tensor,
    scale: float, quant: Quant,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The contract of `kernels/cpu.py`, on CUDA: q, k, v [B, H, N, D] in token order -> out (strides of q), lse [B, H, Nq]."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    B, H, Nq, D = q.shape
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)  # the interpreter has none
    launch = configs.launch(q.shape[-1], quant, capability)
    q_rows, k_rows = Rows.of(q_order.shape[1], launch.block_q), Rows.of(k_order.shape[1], launch.block_k)
    width = max(triton.next_power_of_2(D), 64 if quant.qk == "int4" else 32 if not quant.is_none else 16)
    q_tiles, k_tiles = len(q_order), len(k_order)
    keys = pack(
        k, k_order, k_rows, quant.qk, width, quant.smooth_k, granularity=quant.granularity, packed_int4=quant.qk == "int4"
    )
    values = pack_values(v, k_order, k_rows, quant, width)
    queries, bias = Packed(q, None, None, None), None
    if quant.qk != "none":
        queries = pack(q, q_order, q_rows, quant.qk, width, False, quant.smooth_q, quant.granularity)
    if queries.tile_mean is not None:
        exact = pack(k, k_order, k_rows, "none", width, quant.smooth_k).data[..., :D].float()
        bias = (queries.tile_mean @ exact.mT).mul_(scale * LOG2_E)
    out = torch.empty_like(q)
    lse = q.new_empty(B, H, Nq, dtype=torch.float32)
    shared = [
        stride if size > 1 else 0 for size, stride in zip(kv_num_blocks.shape[:2], kv_num_blocks.stride()[:2], strict=True)
    ]
    _forward[(q_tiles * q_rows.parts, B * H)](
        queries.data, keys.data, values.data, out, lse, queries.scale, keys.scale, values.scale, values.mean, bias,
        q_order, (k_order >= 0).sum(-1, dtype=torch.int32), kv_num_blocks, kv_indices,
        scale * LOG2_E, H, Nq, q_tiles, k_tiles, q_rows.slots, q.stride(0), q.stride(1), q.stride(2),
        out.stride(0), out.stride(1), out.stride(2), *shared,
        D=D, DP=width, BM=q_rows.block, BN=k_rows.block, Q_PARTS=q_rows.parts, K_PARTS=k_rows.parts,
        QK=quant.qk, PV=quant.pv,
        PADDED=k_rows.rows * k_tiles != k.shape[2], BIASED=bias is not None, CENTRED_V=quant.smooth_v,
        P_SHIFT=math.log2(448) if quant.pv == "fp8" else 0.0, num_warps=launch.warps(q_rows.block, D),
        num_stages=launch.stages,
    )  # fmt: skip
    if keys.mean is not None:  # the LSE of the logits as they were before K was centred
        lse += scale * (q.float() @ keys.mean.view(B, H, D, 1))[..., 0]
    return out, lse


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, quant: Quant) -> tuple[Tensor, Tensor]:
    """Every query attends every key, in tiles of `BLOCK` consecutive tokens."""
    q_order, k_order = (_runs(x.shape[2], x.device) for x in (q, k))
    everything = torch.arange(len(k_order), dtype=torch.int32, device=q.device).expand(1, 1, len(q_order), -1).contiguous()
    count = torch.full((1, 1, len(q_order)), len(k_order), dtype=torch.int32, device=q.device)
    return block_sparse_attention(q, k, v, count, everything, q_order, k_order, scale, quant)


def _runs(length: int, device: torch.device) -> Tensor:
    order = torch.arange(-(-length // BLOCK) * BLOCK, device=device).view(-1, BLOCK)
    return order.masked_fill(order >= length, -1)
