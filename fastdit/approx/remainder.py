"""What stands in for the keys that a policy drops.

* ``none``: nothing.
* ``pooled``: each dropped tile enters as one key and one value, the means of its own, with log n on its logit: the compensation
  token of RazorAttention (arXiv 2407.15891) for every tile. Exact where a tile's keys are equal. In the kernels.
* ``sampled``: HyperAttention's estimate (arXiv 2310.05869 §4): `SAMPLES` keys a head drawn uniformly with replacement, those in
  kept tiles left out, each standing for N / SAMPLES keys, merged by LSE. Numerator and denominator are unbiased, so their
  ratio is consistent; its variance is large where the rest is not flat. One draw serves a whole run: a new one a step flickers.
* ``stripes``: AnchorAttention's difference-aware stripes (arXiv 2505.23520 §3.2-3.3): of the dropped keys those whose logit
  with a tile's mean query comes within `THETA` of what the tile's kept keys reach, at most `STRIPES` a head for each `GROUP`
  query tiles, gathered and attended exactly, merged by LSE. The kept tiles' mean LSE is the anchor (the paper: their mean
  maximum, which lies below it), and the limit, which keeps every gather of one size, is ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastdit import ops
from fastdit.core.block_mask import BlockMask, tile_of
from fastdit.core.byte_cache import sent
from fastdit.core.quant import Quant
from fastdit.core.reference import attention as exact
from fastdit.core.reference import merge

REMAINDERS = ("none", "pooled", "sampled", "stripes")
SAMPLES = 256
"""HyperAttention's m."""
THETA, GROUP, STRIPES = 12.0, 16, 512
"""AnchorAttention's θ (natural-log units) and query blocks that share their stripes; keys of one gather."""
LOGITS_BYTES = 64 << 20
WIDE_BYTES = 512 << 20
"""Of the heads whose keys are held in float32 at a time: a third of a 14B model's at 720p; fewer would be too many launches."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask | None,
    quant: Quant | None = None,
    scale: float | None = None,
    remainder: str = "none",
    seed: int = 0,
    fault: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.run` with any remainder. seed: of the draw; fault: int32 [1], into which 1 is ORed where the answer is not finite.
    Raises ValueError for an unknown remainder."""
    if remainder not in REMAINDERS:
        raise ValueError(f"remainder must be one of {', '.join(REMAINDERS)}, got {remainder!r}")
    quant, scale = quant or Quant(), q.shape[-1] ** -0.5 if scale is None else scale
    if block_mask is None:  # nothing is dropped
        return ops.run(q, k, v, None, quant, scale, fault=fault)
    if remainder in ("none", "pooled"):
        return ops.run(q, k, v, block_mask, quant, scale, remainder, fault=fault)
    kept = ops.run(q, k, v, block_mask, quant, scale)
    if remainder == "sampled":
        rest = sampled(q, k, v, block_mask, scale, SAMPLES, seed)
    else:
        rest = stripes(q, k, v, block_mask, kept[1], scale)
    out, lse = merge([kept, rest])
    if fault is not None:  # a sum that is not finite says the same as `isfinite().all()`, without a mask as large as the answer
        fault |= ~out.sum(dtype=torch.promote_types(out.dtype, torch.float32)).isfinite()
    return out, lse


def sampled(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float | None = None, samples: int = SAMPLES, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Estimated attention to the keys that a block mask drops: q, k, v [B, H, N, D] -> (out, lse [B, H, N])."""
    heads, length = k.shape[1], k.shape[2]
    drawn = torch.randint(length, (heads, samples), generator=torch.Generator().manual_seed(seed), device="cpu")
    draw = sent(drawn, k.device)
    index = draw[None, :, :, None].expand(k.shape[0], -1, -1, k.shape[3])
    keys, values = (x.gather(2, index).repeat_interleave(q.shape[1] // heads, 1) for x in (k, v))
    q_tile, k_tile = (tile_of(order, n) for order, n in ((block_mask.q_order, q.shape[2]), (block_mask.k_order, length)))
    columns = k_tile[draw].repeat_interleave(q.shape[1] // heads, 0)
    kept = block_mask.to_tile_map()
    kept = kept.expand(kept.shape[0], q.shape[1], -1, -1).gather(
        3, columns[None, :, None].expand(kept.shape[0], -1, kept.shape[2], -1)
    )
    rows = max(1, LOGITS_BYTES // (4 * samples * q.shape[0] * q.shape[1]))
    parts = [
        exact(part, keys, values, ~kept[:, :, tiles], scale)
        for part, tiles in zip(q.split(rows, 2), q_tile.split(rows), strict=True)
    ]
    out, lse = torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)
    return out, lse + math.log(length / samples)


def stripes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    lse: Tensor,
    scale: float | None = None,
    theta: float = THETA,
    limit: int = STRIPES,
) -> tuple[Tensor, Tensor]:
    """Exact attention to the heaviest of the keys that a block mask drops; lse [B, H, N] of the keys that it keeps.

    q, k, v [B, H, N, D] -> (out, lse [B, H, N]), 0 and −inf for queries without a stripe.
    """
    B, H, _, D = q.shape
    length, order = k.shape[2], block_mask.q_order
    real, q_slots = order >= 0, order.clamp(min=0)
    count = real.sum(-1).clamp(min=1)
    places = order.masked_fill(~real, q.shape[2])  # padding is written to a row behind the others: its number need not be known
    own_tile = torch.arange(len(order), device=order.device)[:, None].expand_as(order)
    k_tile = tile_of(block_mask.k_order, length)
    kept = block_mask.to_tile_map().expand(B, H, -1, -1)
    out, found = q.new_zeros(B, H, q.shape[2] + 1, D), lse.new_full((B, H, q.shape[2] + 1), float("-inf"))
    scaling = D**-0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    for part, key, value in some_heads(H, k, v, WIDE_BYTES):
        queries = (q[:, part, q_slots].to(wide) * real[..., None]).sum(3) / count[:, None]
        anchors = (lse[:, part, q_slots].masked_fill(~real, 0)).sum(3) / count
        wide_key, near = key.to(wide).mT, kept[:, part]
        for first in range(0, len(order), GROUP):
            last = min(first + GROUP, len(order))
            over = queries[:, :, first:last] @ wide_key * scaling - anchors[:, :, first:last, None]
            over = over.masked_fill(near[:, :, first:last].index_select(3, k_tile), float("-inf")).amax(2)
            heaviest, index = over.topk(min(limit, length), -1)
            keys, values = (x.gather(2, index[..., None].expand(-1, -1, -1, D)) for x in (key, value))
            slots, to, of_query = (x[first:last].flatten() for x in (q_slots, places, own_tile))
            seen = near[:, :, of_query].gather(3, k_tile[index][:, :, None].expand(-1, -1, len(slots), -1))
            mask = ~seen & (heaviest > -theta)[:, :, None]
            out[:, part, to], found[:, part, to] = exact(q[:, part, slots], keys, values, mask, scale)
    return out[:, :, :-1], found[:, :, :-1]


def some_heads(heads: int, k: Tensor, v: Tensor, most: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Which of the query heads, and the keys and values [B, h, N, D] of each, so many at a time that their keys take `most`
    bytes in float32."""
    group = heads // k.shape[1]
    some = max(1, most // (4 * group * k[:, :1].numel()))
    for head in range(0, k.shape[1], some):
        keys, values = (x[:, head : head + some] for x in (k, v))
        if group > 1:
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        yield slice(head * group, (head + some) * group), keys, values
