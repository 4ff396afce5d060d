"""The reference implementation of attention: eager, simple, and correct in float64. Every kernel is tested against it.

    S = scale · Q Kᵀ,   lse_i = log Σ_j exp S_ij,   out_i = Σ_j exp(S_ij − lse_i) V_j

Softmax over a set of keys can be cut into disjoint pieces; `merge` joins them exactly by their LSE (FlashAttention,
arXiv 2205.14135 §3.1; LeanAttention, arXiv 2405.10480). A query with no key gets out = 0 and lse = −inf.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdit.core.block_mask import tile_of
from fastdit.core.layout import Layout


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Dense softmax attention.

    q [B, H, Nq, D], k and v [B, H, Nk, D]; mask: bool, True = attend, broadcastable to [B, H, Nq, Nk]; scale: default
    D^-½. Returns out [B, H, Nq, D] in q's dtype and natural-log lse [B, H, Nq], computed in float32 (float64 for
    float64 inputs). Materialises Nq × Nk: for tests and small sizes.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(dtype) @ k.to(dtype).mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse.isneginf(), 0)[..., None]).exp()
    return (weights @ v.to(dtype)).to(q.dtype), lse


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join the (out, lse) of attention over disjoint sets of keys into the (out, lse) over their union.

    Each part: out [..., N, D], lse [..., N]. A part without keys (lse = −inf) contributes nothing.
    """
    lses = torch.stack([lse for _, lse in parts])
    total = lses.logsumexp(0)
    weights = (lses - total.masked_fill(total.isneginf(), 0)).exp()
    out = sum(w[..., None] * o.to(w.dtype) for w, (o, _) in zip(weights, parts, strict=True))
    assert isinstance(out, Tensor)
    return out.to(parts[0][0].dtype), total


def token_mask(layout: Layout, tile_map: Tensor) -> Tensor:
    """Tile map bool [b, h, tiles, tiles] -> the equivalent token mask, bool [b, h, N, N] in token order."""
    tile = tile_of(layout.order(tile_map.device), layout.length)
    return tile_map[:, :, tile[:, None], tile[None, :]]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖₂ / ‖expected‖₂ over all elements, in float64; 0 when both are zero."""
    actual, expected = actual.double(), expected.double()
    difference, norm = (actual - expected).norm(), expected.norm()
    return float(difference / norm) if norm > 0 else float(difference)
