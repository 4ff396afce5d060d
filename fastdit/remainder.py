"""What stands in for the keys that a policy drops.

* ``none``: nothing.
* ``pooled``: each dropped tile enters as one key and one value, the means of its own, with log n on its logit: the compensation
  token of RazorAttention (arXiv 2407.15891) for every tile. Exact where a tile's keys are equal. In the kernels.
* ``sampled``: HyperAttention's estimate (arXiv 2310.05869 §4): `SAMPLES` keys a head drawn uniformly with replacement, those in
  kept tiles left out, each standing for N / SAMPLES keys, merged by LSE. Numerator and denominator are unbiased, so their
  ratio is consistent; its variance is large where the rest is not flat. One draw serves a whole run: a new one a step flickers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdit import ops
from fastdit.blockmask import BlockMask
from fastdit.quant import Quant
from fastdit.reference import attention as exact
from fastdit.reference import merge

REMAINDERS = ("none", "pooled", "sampled")
SAMPLES = 256
"""HyperAttention's m."""
LOGITS_BYTES = 64 << 20


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask | None,
    quant: Quant | None = None,
    scale: float | None = None,
    remainder: str = "none",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """`ops.attention` with any remainder; seed: of the draw. Raises ValueError for a remainder that is none."""
    if remainder not in REMAINDERS:
        raise ValueError(f"remainder must be one of {', '.join(REMAINDERS)}, got {remainder!r}")
    if block_mask is None:  # nothing is dropped
        return ops.attention(q, k, v, None, quant, scale)
    if remainder != "sampled":
        return ops.attention(q, k, v, block_mask, quant, scale, remainder)
    return merge([ops.attention(q, k, v, block_mask, quant, scale), sampled(q, k, v, block_mask, scale, SAMPLES, seed)])


def sampled(
    q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, scale: float | None = None, samples: int = SAMPLES, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Estimated attention to the keys that a block mask drops: q, k, v [B, H, N, D] -> (out, lse [B, H, N])."""
    heads, length = k.shape[1], k.shape[2]
    draw = torch.randint(length, (heads, samples), generator=torch.Generator().manual_seed(seed)).to(k.device)
    index = draw[None, :, :, None].expand(k.shape[0], -1, -1, k.shape[3])
    keys, values = (x.gather(2, index).repeat_interleave(q.shape[1] // heads, 1) for x in (k, v))
    q_tile, k_tile = (_tiles(order, n) for order, n in ((block_mask.q_order, q.shape[2]), (block_mask.k_order, length)))
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


def _tiles(order: Tensor, length: int) -> Tensor:
    """Tile of each token, int64 [length]."""
    tile_of = torch.empty(length, dtype=torch.long, device=order.device)
    real = order >= 0
    tile_of[order[real]] = torch.arange(len(order), device=order.device)[:, None].expand_as(order)[real]
    return tile_of
