"""Block-sparse attention on CUDA tensors: what `kernels/cpu.py` promises, by the kernels beside this file.

Here the inputs are brought into tile order and format, lists of tiles into the order the kernel wants, and the chosen is
sized. INT4 K is half the bytes of INT8 and no faster: Hopper and later have no INT4 unit, and Triton has no INT4 product.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastdit.core.block_mask import version
from fastdit.core.byte_cache import byte_cache
from fastdit.core.quant import BLOCK, LARGEST, Quant
from fastdit.core.reference import merge
from fastdit.kernels import launch
from fastdit.kernels import pooled as remainder
from fastdit.kernels.pack import Rows, pack, pack_values, strides
from fastdit.kernels.triton_forward import forward

LOG2_E = math.log2(math.e)
BIAS_BYTES = 512 << 20
"""The q̄·Kᵀ of Q-smoothing is one float32 per query tile and key: heads beyond this many bytes take turns."""


def unsupported(q: Tensor, quant: Quant, capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability has no kernel for these inputs, or None if it has."""
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]}: kernels need 8.0 (Ampere) or newer"
    if q.dtype == torch.float64:
        return "no float64 kernel"
    if q.shape[-1] > 256:
        return f"head dim {q.shape[-1]}: kernels go to 256"
    if q.dtype == torch.float32 and q.shape[-1] > 128 and "none" in (quant.qk, quant.pv):
        return f"head dim {q.shape[-1]} in float32: kernels of 32 bits go to 128"
    if "fp8" in (quant.qk, quant.pv) and capability < (8, 9):
        return f"compute capability {capability[0]}.{capability[1]} has no FP8: it needs 8.9 (Ada) or newer"
    return None


@dataclass(frozen=True, eq=False)
class Lists:
    """A block mask as the kernel walks it: index [b, h, q_tiles, k_tiles] with tiles without padding in front (None: all
    are), of which whole [b, h, q_tiles]; schedule: (batch, head, query tile) as one number, longest lists first; count
    [k_tiles]: real tokens. made_of: what else it was made of than `kv_indices`."""

    index: Tensor | None
    whole: Tensor
    schedule: Tensor
    count: Tensor
    made_of: tuple[Any, ...]


@triton.jit
def _sort_lists(Index, Num, Count, Out, Whole, k_tiles, rows, BLOCK: tl.constexpr):
    """One program a list: tiles of `rows` tokens to the front, the others behind them, both in their order."""
    which = tl.program_id(0).to(tl.int64)
    Index += which * k_tiles
    Out += which * k_tiles
    num = tl.load(Num + which)
    whole = 0
    for start in range(0, num, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tile = tl.load(Index + at, mask=at < num, other=0)
        full = (at < num) & (tl.load(Count + tile) == rows)
        tl.store(Out + whole + tl.cumsum(full.to(tl.int32), 0) - 1, tile, mask=full)
        whole += tl.sum(full.to(tl.int32), 0)
    behind = whole
    for start in range(0, num, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tile = tl.load(Index + at, mask=at < num, other=0)
        ragged = (at < num) & (tl.load(Count + tile) != rows)
        tl.store(Out + behind + tl.cumsum(ragged.to(tl.int32), 0) - 1, tile, mask=ragged)
        behind += tl.sum(ragged.to(tl.int32), 0)
    tl.store(Whole + which, whole)


_known: MutableMapping[Tensor, Lists] = WeakIdKeyDictionary()
"""Lists of masks that are still alive, by their `kv_indices`: a static mask serves every layer and step of a run."""


def lists_of(num: Tensor, index: Tensor, k_order: Tensor, rows: int, batch: int, heads: int, padded: bool) -> Lists:
    """The lists of a contiguous mask for `batch` × `heads`, where a tile without padding has `rows` tokens."""
    made_of = (num, k_order, version(num), version(index), rows, batch, heads, padded)
    lists = _known.get(index)
    if lists is not None and lists.made_of[2:] == made_of[2:] and lists.made_of[0] is num and lists.made_of[1] is k_order:
        return lists
    count = (k_order >= 0).sum(-1, dtype=torch.int32)
    ordered, whole = None, num
    if padded:
        ordered, whole = torch.empty_like(index), torch.empty_like(num)
        _sort_lists[(num.numel(),)](index, num, count, ordered, whole, index.shape[-1], rows, BLOCK=512)
    schedule = num.expand(batch, heads, -1).flatten().argsort(descending=True, stable=True).to(torch.int32)
    lists = _known[index] = Lists(ordered, whole, schedule, count, made_of)  # holds no `index`: that would keep it alive
    return lists


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, q_order: Tensor, k_order: Tensor,
    scale: float, quant: Quant, bias_q: Tensor | None = None, bias_k: Tensor | None = None, pooled: bool = False,
    splits: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The contract of `kernels/cpu.py`, on CUDA: q [B, H, Nq, D], k and v [B, Hkv, Nk, D] in token order, H a multiple of Hkv
    -> out (strides of q), lse [B, H, Nq].

    bias_q [b, h, Nq, R] and bias_k [b, h, Nk, R]: added to the logits as bias_q·bias_kᵀ (b, h: 1 or B, H), in float32, since
    16 bits lose positions; bias_k alone, R = 1: added to all logits of a key (log n for a key that stands for n, −inf for
    one that is masked; FlashBias, arXiv 2505.12044). pooled: a dropped tile enters as one key and value, the means of its
    own, with log n on its logit. splits: parts of each list, merged by LSE; default: enough to fill the GPU.
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    B, H, Nq, D = q.shape
    group = H // k.shape[1]
    if pooled:
        masks = kv_num_blocks, kv_indices, q_order, k_order
        out, lse = block_sparse_attention(q, k, v, *masks, scale, quant, bias_q, bias_k, splits=splits)
        remainder.add(q, k, v, *masks, scale * LOG2_E, out, lse)
        return out, lse
    if quant.smooth_q:
        turn = max(1, BIAS_BYTES // (4 * B * group * len(q_order) * k_order.numel())) * group
        if turn < H:
            done = []
            for start in range(0, H, turn):
                part, shared = slice(start, start + turn), slice(start // group, (start + turn) // group)
                left, right = (None if x is None else _heads(x, part) for x in (bias_q, bias_k))
                masks = _heads(kv_num_blocks, part), _heads(kv_indices, part), q_order, k_order
                heads = q[:, part], k[:, shared], v[:, shared]
                done.append(block_sparse_attention(*heads, *masks, scale, quant, left, right))
            out, lse = (torch.cat(x, 1) for x in zip(*done, strict=True))
            return torch.empty_like(q).copy_(out), lse
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)  # the interpreter has none
    chosen = launch.choose(D, quant, capability, q.dtype == torch.float32)
    hopper = None
    if q.is_cuda and capability == (9, 0) and q.element_size() == 2 and bias_k is None:
        hopper = launch.overlapped(D, quant, q_order.shape[1])
    if hopper is not None and (splits or launch.splits(len(q_order) * B * H, len(k_order), q.device)) == 1:
        chosen = hopper
    q_rows = Rows.of(q_order.shape[1], chosen.block_q, chosen.least)
    k_rows = Rows.of(k_order.shape[1], chosen.block_k, chosen.least)
    width = max(triton.next_power_of_2(D), 64 if quant.qk == "int4" else 32 if not quant.is_none else 16)
    q_tiles, k_tiles = len(q_order), len(k_order)
    packed_int4 = quant.qk == "int4"
    keys = pack(k, k_order, k_rows, quant.qk, width, quant.smooth_k, granularity=quant.granularity, packed_int4=packed_int4)
    values = pack_values(v, k_order, k_rows, quant, width)
    queries, tile_bias = None, None
    if quant.qk != "none":
        queries = pack(q, q_order, q_rows, quant.qk, width, centre_tile=quant.smooth_q, granularity=quant.granularity)
        if queries.tile_mean is not None:
            exact = pack(k, k_order, k_rows, "none", width, quant.smooth_k).data[..., :D].float()
            grouped = queries.tile_mean.view(B * k.shape[1], group * q_tiles, D)
            tile_bias = (grouped @ exact.mT).mul_(scale * LOG2_E)
    factor_q, factor_k, rank = _factors(bias_q, bias_k, k_order, k_rows)
    padded = k_rows.rows * k_tiles != k.shape[2]
    kv_num_blocks, kv_indices = kv_num_blocks.contiguous(), kv_indices.contiguous()
    lists = lists_of(kv_num_blocks, kv_indices, k_order, k_rows.rows, B, H, padded)
    num_b, num_h = strides(kv_num_blocks)
    index = kv_indices if lists.index is None else lists.index
    if chosen is hopper:
        from fastdit.kernels.hopper import attend  # Gluon is imported where it runs

        ragged = lists.count, kv_num_blocks, lists.whole, index, lists.schedule
        shape = q_rows, k_rows, width, quant, scale * LOG2_E, group, chosen.stages, padded, (num_b, num_h)
        return attend(q, queries, keys, values, q_order, ragged, *shape)
    programs = q_tiles * q_rows.parts * B * H
    if splits is None:
        splits = launch.splits(programs, k_tiles * k_rows.parts, q.device)
    out = q.new_empty(splits, B, H, Nq, D, dtype=torch.float32) if splits > 1 else torch.empty_like(q)[None]
    lse = q.new_empty(splits, B, H, Nq, dtype=torch.float32)
    forward[(programs, splits)](
        q if queries is None else queries.data, q, keys.data, values.data, out, lse,
        None if queries is None else queries.scale, keys.scale, values.scale, values.mean, tile_bias, factor_q, factor_k,
        keys.mean, q_order, lists.count, kv_num_blocks, lists.whole,
        index, lists.schedule,
        scale * LOG2_E, H, group, Nq, q_tiles, k_tiles, q_rows.slots, splits, q.stride(0), q.stride(1), q.stride(2),
        *out.stride()[:4], num_b, num_h, *((0, 0) if factor_q is None else strides(factor_q)),
        *((0, 0) if factor_k is None else strides(factor_k, 1)),
        D=D, DP=width, BM=q_rows.block, BN=k_rows.block, Q_PARTS=q_rows.parts, K_PARTS=k_rows.parts,
        QK=quant.qk, PV=quant.pv, PADDED=padded, TILE_BIAS=tile_bias is not None, RANK=rank,
        KEY_BIAS=factor_k is not None and rank == 0, CENTRED_K=keys.mean is not None, CENTRED_V=quant.smooth_v,
        P_SHIFT=math.log2(LARGEST[quant.pv]) if quant.pv != "none" else 0.0, LOCAL=chosen.local,
        SPLIT=splits > 1, ASM=q.is_cuda, num_warps=chosen.warps(q_rows.block, D), num_stages=chosen.stages,
    )  # fmt: skip
    if splits > 1:
        whole, total = merge(list(zip(out, lse, strict=True)))
        out, lse = torch.empty_like(q).copy_(whole)[None], total[None]
    return out[0], lse[0]


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, quant: Quant, bias_q: Tensor | None = None, bias_k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Every query attends every key, in tiles of `BLOCK` consecutive tokens."""
    return block_sparse_attention(q, k, v, *_everything(q.shape[2], k.shape[2], str(q.device)), scale, quant, bias_q, bias_k)


@byte_cache(64 << 20)
def _everything(q_len: int, k_len: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Block mask of a full tile map: lists and orders."""
    q_order, k_order = (_runs(length, device) for length in (q_len, k_len))
    index = torch.arange(len(k_order), dtype=torch.int32, device=device).expand(1, 1, len(q_order), -1).contiguous()
    return torch.full_like(index[..., 0], len(k_order)), index, q_order, k_order


def _runs(length: int, device: str) -> Tensor:
    order = torch.arange(-(-length // BLOCK) * BLOCK, device=device).view(-1, BLOCK)
    return order.masked_fill(order >= length, -1)


def _heads(x: Tensor, part: slice) -> Tensor:
    return x if x.shape[1] == 1 else x[:, part]


def _factors(
    bias_q: Tensor | None, bias_k: Tensor | None, k_order: Tensor, rows: Rows
) -> tuple[Tensor | None, Tensor | None, int]:
    """Low-rank bias for the kernel, base 2: queries [b, h, Nq, rank] in token order, keys [b, h, keys, rank] in tile order;
    rank is a power of two from 16, the least a product takes, and 0 where all queries share one bias."""
    if bias_k is None:
        return None, None, 0
    tiled = (bias_k.float() * LOG2_E)[:, :, k_order.clamp(min=0)].masked_fill((k_order < 0)[..., None], 0)
    tiled = F.pad(tiled, (0, 0, 0, rows.rows - rows.slots)).flatten(2, 3)
    if bias_q is None:
        return None, tiled.contiguous(), 0
    rank = max(16, triton.next_power_of_2(bias_q.shape[-1]))
    pad = (0, rank - bias_q.shape[-1])
    return F.pad(bias_q.float(), pad).contiguous(), F.pad(tiled, pad).contiguous(), rank
