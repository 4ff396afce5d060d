"""Definition of the number formats: FP8, INT8 and INT4 attention in eager torch, rounded exactly as on a tensor core.

x ≈ x_q · scale, with scale = max|x| / q_max over a group of elements and q_max = 448 (FP8 E4M3), 127 (INT8) or 7 (INT4,
symmetric). Q and K have one scale per tile, per head or per tensor (`granularity`). V has one per channel of each head,
over the whole sequence. P is relative to its row's maximum, so it lies in [0, 1] and has the fixed scale 1/448 or 1/127
(FPSAttention, arXiv 2506.04648 §3.2; SageAttention2, arXiv 2411.10958 §3). Row sums use P before rounding.

Smoothing subtracts a mean, so that the scale covers only the deviation from it, and restores the mean exactly
(SageAttention, arXiv 2410.02367 §4.2, and SageAttention2 §3.1):

    K: k − mean over all keys. Each row of logits shifts by a constant: softmax is unchanged, the LSE is corrected.
    Q: q − mean over its tile. The missing q̄·Kᵀ is added to the logits in full precision.
    V: v − mean over all keys. The mean is added back to the output, since the rows of softmax sum to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastdit.core.block_mask import tile_of
from fastdit.core.number_format import Quant
from fastdit.core.reference import attention

STORAGE = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.int8}
"""dtype of the codes. INT4 codes are int8 until `pack_int4`."""
LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
BLOCK = 128
"""Consecutive tokens per scale where attention has no tiles; SageAttention's query block."""


def scale_of(x: Tensor, fmt: str, dims: tuple[int, ...]) -> Tensor:
    """max|x| / q_max over `dims` (kept with size 1); 1 where x is all zero."""
    scale = x.abs().amax(dims, keepdim=True) / LARGEST[fmt]
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def quantize(x: Tensor, fmt: str, scale: Tensor) -> Tensor:
    """x -> codes in the format's storage dtype, x ≈ codes · scale; rounds half to even and saturates."""
    scaled = (x / scale).clamp(-LARGEST[fmt], LARGEST[fmt])
    return (scaled if fmt == "fp8" else scaled.round()).to(STORAGE[fmt])


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """codes · scale, in the scale's dtype. Where the scale is not finite (the input had NaN or Inf), the result is NaN."""
    return codes.to(scale.dtype) * scale


def pack_int4(codes: Tensor) -> Tensor:
    """int8 codes in [-8, 7], [..., D] with D even -> uint8 [..., D / 2]; the even index is the low nibble."""
    if codes.shape[-1] % 2:
        raise ValueError(f"INT4 codes are packed in pairs: the last dimension must be even, got {codes.shape[-1]}")
    low, high = (codes & 0xF).view(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | (high << 4)


def unpack_int4(packed: Tensor) -> Tensor:
    """Inverse of `pack_int4`."""
    nibbles = torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)
    return ((nibbles ^ 8).to(torch.int8)) - 8


@dataclass(frozen=True, eq=False)
class Operands:
    """Q, K and V rounded to their formats, as float32 (float64 for float64 inputs), with the terms that undo the smoothing.

    q [B, H, Nq, D'], k [B, H, Nk, D'], v [B, H, Nk, D]. q·k is the logit without `scale`. D' = D, or 2 D with Q-smoothing: the
    second half holds q̄ and the unrounded K. shift: [B, H, Nq], times `scale` added to a row's LSE. mean: [B, H, 1, D], added to
    the output.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    shift: Tensor | None
    mean: Tensor | None

    def finish(self, out: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Undo the smoothing: (out, lse) over the smoothed q, k, v -> (out, lse) over the original ones."""
        if self.mean is not None:
            out = out + self.mean * (lse > float("-inf"))[..., None]
        return out, lse if self.shift is None else lse + scale * self.shift


def emulate(
    q: Tensor, k: Tensor, v: Tensor, quant: Quant, q_order: Tensor | None = None, k_order: Tensor | None = None
) -> Operands:
    """Round q, k, v [B, H, N, D] (token order) to the formats of `quant`.

    q_order, k_order: [tiles, slots] as in `BlockMask`; None means runs of `BLOCK` tokens.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    shift = mean = None
    if quant.qk != "none":
        query_tiles = Tiles(q.shape[2], q_order, q.device)
        if quant.smooth_k:
            k_mean = k.mean(2, keepdim=True)
            shift = (q * k_mean).sum(-1)
            k = k - k_mean
        exact_k, q_mean = k, None
        if quant.smooth_q:
            q_mean = query_tiles.mean(q)
            q = q - q_mean
        q = _round_trip(q, quant, query_tiles)
        k = _round_trip(k, quant, Tiles(k.shape[2], k_order, k.device))
        if q_mean is not None:
            q, k = torch.cat([q, q_mean], -1), torch.cat([k, exact_k], -1)
    if quant.pv != "none":
        if quant.smooth_v:
            mean = v.mean(2, keepdim=True)
            v = v - mean
        scale = scale_of(v, quant.pv, (2,))
        v = dequantize(quantize(v, quant.pv, scale), scale)
    return Operands(q, k, v, shift, mean)


def rounded_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, pv: str) -> tuple[Tensor, Tensor]:
    """Attention with P rounded to `pv` relative to its row's maximum: (out, lse). Shapes as in `Operands`; holds Nq × Nk."""
    if pv == "none":
        return attention(q, k, v, scale=scale)
    logits = (q @ k.mT) * scale
    top = logits.amax(-1, keepdim=True)
    p = (logits - top).exp()
    total = p.sum(-1, keepdim=True)
    step = torch.full((), 1 / LARGEST[pv], dtype=p.dtype, device=p.device)
    return dequantize(quantize(p, pv, step), step) @ v / total, (top + total.log())[..., 0]


class Tiles:
    """Groups of tokens that share a scale: the tiles of `order` [tiles, slots] (-1: padding); None: runs of `BLOCK` tokens."""

    def __init__(self, length: int, order: Tensor | None, device: torch.device) -> None:
        if order is None:
            order = torch.arange(-(-length // BLOCK) * BLOCK, device=device).view(-1, BLOCK)
            order = order.masked_fill(order >= length, -1)
        self.order, self.real = order, (order >= 0)[..., None]
        self.of = tile_of(order, length)

    def _split(self, x: Tensor) -> Tensor:
        """[B, H, N, D] -> [B, H, tiles, slots, D], zeros in padded slots."""
        return x[:, :, self.order.clamp(min=0)].masked_fill(~self.real, 0)

    def mean(self, x: Tensor) -> Tensor:
        """[B, H, N, D] -> [B, H, N, D]: the mean over each token's tile."""
        return (self._split(x).sum(3) / self.real.sum(1).clamp(min=1))[:, :, self.of]

    def scale(self, x: Tensor, fmt: str) -> Tensor:
        """[B, H, N, D] -> [B, H, N, 1]: the scale of each token's tile."""
        return scale_of(self._split(x), fmt, (3, 4))[:, :, self.of, 0]


def _round_trip(x: Tensor, quant: Quant, tiles: Tiles) -> Tensor:
    if quant.granularity == "tile":
        scale = tiles.scale(x, quant.qk)
    else:
        scale = scale_of(x, quant.qk, (2, 3) if quant.granularity == "head" else (0, 1, 2, 3))
    return dequantize(quantize(x, quant.qk, scale), scale)
