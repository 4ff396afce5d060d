"""The backward of `kernels/cpu.py`: dQ, dK and dV of block-sparse attention on CPU tensors.

FlashAttention-2 (arXiv 2307.08691 §3.1.2), over the tiles a mask keeps, with the LSE of the forward:

    P = exp(S − lse)   dP = dO·Vᵀ   D = rowsum(dO ∘ O) − dlse   dS = P ∘ (dP − D)
    dQ = scale·dS·K   dK = scale·dSᵀ·Q   dV = Pᵀ·dO

dlse is the gradient of the LSE itself: ∂lse_i/∂S_ij = P_ij. lse and O are those of all keys that a query attends, so each group
of `cpu.py`, and each pooled tile, gives its own part and the parts add up. One walk over the groups gives all three gradients
(the transposed lists would compute S and dP twice); it is always in the same order, so the sums are the same to the bit.

In FP8, INT8 and INT4 the gradient is straight through (arXiv 1308.3432): rounding has the derivative one. S and dP are made of
the rounded Q, K and V of the forward; P is not rounded, and D belongs to that P.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.core.block_mask import tile_map, tile_of
from fastdit.core.quant import Operands, Quant, emulate
from fastdit.core.reference import merge
from fastdit.kernels import cpu

Masks = tuple[Tensor, Tensor, Tensor, Tensor]
"""kv_num_blocks, kv_indices, q_order and k_order of a `BlockMask`."""


def attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    masks: Masks | None, scale: float, quant: Quant, pooled: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q [B, H, Nq, D], k and v [B, Hkv, Nk, D], in their dtypes.

    grad_out [B, H, Nq, D] and grad_lse [B, H, Nq] (None: 0) are those of out and lse, which `cpu.block_sparse_attention` gave
    for the same arguments. A query without keys has no gradient.
    """
    group, dtype = q.shape[1] // k.shape[1], q.dtype
    given = lse
    wide = torch.promote_types(dtype, torch.float32)
    if dtype == torch.float16 or grad_lse is not None:  # dlse does not fit 16 bits
        q, k, v, out, grad_out = (x.to(wide) for x in (q, k, v, out, grad_out))
    k, v = cpu._for_every_head(q, k, v)
    query, key, value = q, k, v
    if not quant.is_none:
        q_order, k_order = (None, None) if masks is None else masks[2:]
        x = emulate(q, k, v, quant, q_order, k_order)
        out, lse = _unrounded(q, k, v, x, out.to(wide), lse, masks, scale, quant, pooled)
        query, key, value, grad_out = x.q, x.k, x.v if x.mean is None else x.v + x.mean, grad_out.to(wide)
    dq, dk, dv = _exact(grad_out, grad_lse, query, key, value, out, lse, masks, scale)
    if quant.smooth_q:  # q is the rest and the mean of its tile, in channels of their own
        dq, dk = dq.tensor_split(2, -1)[0], torch.add(*dk.tensor_split(2, -1))
    total = torch.zeros_like(lse) if grad_lse is None else grad_lse  # rowsum(dS) of the kept tiles
    if pooled and masks is not None:
        due = (grad_out.to(wide) * out.to(wide)).sum(-1) - total
        more = _dropped(grad_out.to(wide), due, q.to(wide), k.to(wide), v.to(wide), given, masks, scale)
        dq, dk, dv = (x.to(wide) + y for x, y in zip((dq, dk, dv), more[:3], strict=True))
        total = total - more[3]
    if quant.smooth_k:  # `key` has no mean, which matters where dS does not add up to 0
        dq = dq + scale * total[..., None] * k.to(wide).mean(2, keepdim=True)
    if group > 1:
        dk, dv = (x.to(wide).unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _unrounded(
    q: Tensor, k: Tensor, v: Tensor, x: Operands, out: Tensor, lse: Tensor, masks: Masks | None, scale: float, quant: Quant,
    pooled: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of the rounded q, k and v with P as it was before its rounding; lse as `x.q` and `x.k` have it."""
    shift = 0 if x.shift is None else scale * x.shift
    if quant.pv == "none":
        return out, lse - shift
    core = partial(cpu.attend_quantized, pv="none")
    out, lse = core(x.q, x.k, x.v, scale) if masks is None else cpu._sparse(x.q, x.k, x.v, *masks, scale, core)
    out, lse = x.finish(out, lse, scale)
    if pooled and masks is not None:
        out, lse = merge([(out, lse), cpu._dropped(q, k, v, *masks, scale)])
    return out, lse - shift


def _exact(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, masks: Masks | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The formulas above by ATen's CPU kernel, group by group; q and k may be wider than v. dK and dV of tiles are added up in
    32 bits or more."""
    width, D = q.shape[-1] + (grad_lse is not None), v.shape[-1]
    q, k = (F.pad(x, (0, width - x.shape[-1])) for x in (q, k))
    v, out, grad_out = (F.pad(x, (0, width - D)) for x in (v, out, grad_out))
    if grad_lse is not None:  # one more channel: of dO 1, of O −dlse, of V 0 gives this D and leaves dP as it is
        grad_out[..., -1], out[..., -1] = 1, -grad_lse
    core = partial(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, scale=scale)
    if masks is None:
        found = core(grad_out, q, k, v, out, lse.contiguous(), 0.0, False)
    else:
        found = _sparse(core, grad_out, q, k, v, out, lse, masks)
    dq, dk, dv = found
    narrow = q.shape[-1] - (grad_lse is not None)
    return dq[..., :narrow], dk[..., :narrow], dv[..., :D]


def _sparse(
    core: partial[tuple[Tensor, Tensor, Tensor]], grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    masks: Masks,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, H, Nq, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    heads = H if masks[1].shape[1] == 1 else 1  # as in `cpu._sparse`: rows of [B, N, H, D] in memory
    rows = [x.transpose(1, 2).reshape(-1, heads, x.shape[-1]) for x in (grad_out, q, k, v, out, lse[..., None])]
    dq = torch.zeros_like(rows[1])
    dk, dv = (torch.zeros(x.shape, dtype=wide) for x in rows[2:4])
    row_bytes = 4 * heads * D * k.element_size()
    for queries, keys in cpu._batches(cpu._groups(*masks), B, H // heads, Nq, k.shape[2], row_bytes):
        index = (queries, queries, keys, keys, queries, queries)
        given = [x.index_select(0, i.flatten()).unflatten(0, i.shape).transpose(1, 2) for x, i in zip(rows, index, strict=True)]
        parts = core(*given[:5], given[5][..., 0].contiguous(), 0.0, False)
        dq_part, dk_part, dv_part = (x.transpose(1, 2).flatten(0, 1) for x in parts)
        dq.index_copy_(0, queries.flatten(), dq_part)
        dk.index_add_(0, keys.flatten(), dk_part.to(wide))
        dv.index_add_(0, keys.flatten(), dv_part.to(wide))
    dq, dk, dv = (x.view(B, -1, H, D).transpose(1, 2) for x in (dq, dk, dv))
    return dq, dk, dv


def _dropped(
    grad_out: Tensor, due: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, masks: Masks, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the pooled remainder adds to dQ, dK and dV, and its rowsum(dS); due: D of the module's formulas [B, H, Nq]. A tile's
    mean passes its gradient on to its n tokens, 1/n each."""
    kv_num_blocks, kv_indices, q_order, k_order = masks
    real, count = (k_order >= 0)[..., None], (k_order >= 0).sum(-1)
    share = count.clamp(min=1).to(q.dtype)
    keys, values = ((x[:, :, k_order.clamp(min=0)] * real).sum(3) / share[:, None] for x in (k, v))
    dropped = ~tile_map(kv_num_blocks, kv_indices) & (count > 0)
    rows = max(1, cpu.CHUNK_BYTES // (len(k_order) * q.shape[0] * q.shape[1] * q.element_size()))
    dq, sums, d_keys, d_values = [], [], torch.zeros_like(keys), torch.zeros_like(values)
    pieces = zip(*(x.split(rows, 2) for x in (grad_out, due, q, lse)), strict=True)
    for (d_out, less, query, total), tiles in zip(pieces, tile_of(q_order, q.shape[2]).split(rows), strict=True):
        logits = query @ keys.mT * scale + share.log()
        p = (logits - total.masked_fill(total.isneginf(), 0)[..., None]).exp() * dropped[:, :, tiles]
        d_logits = p * (d_out @ values.mT - less[..., None])
        sums.append(d_logits.sum(-1))
        dq.append(scale * d_logits @ keys)
        d_keys += scale * d_logits.mT @ query
        d_values += p.mT @ d_out
    tile = tile_of(k_order, k.shape[2])
    dk, dv = ((x / share[:, None])[:, :, tile] for x in (d_keys, d_values))
    return torch.cat(dq, 2), dk, dv, torch.cat(sums, 2)
