"""Token order to tile order, and to the formats of `fastdit.quant`, in Triton: what the attention kernel reads.

A tile of `slots` tokens becomes `rows` ≥ slots rows, a whole number of the kernel's blocks; the rows behind its tokens are
zero. Smoothing takes means over real tokens only. One launch measures each tile (mean, scale), one writes it; a 16-bit K or
V needs the second alone. Nothing here waits for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.quant import LARGEST, STORAGE, Quant

ROUND = 12582912.0
"""1.5 · 2²³: adding and subtracting it rounds a float32 below 2²² to the nearest whole number, half to even."""


@dataclass(frozen=True)
class Rows:
    """How a tile of `slots` tokens is laid out: `parts` blocks of `block` rows each."""

    slots: int
    block: int
    parts: int

    @classmethod
    def of(cls, slots: int, largest: int = 128) -> Rows:
        """The block (32 to `largest` rows) that pads least; the larger one of equals, which the tensor cores like better."""
        sizes = [size for size in (128, 64, 32) if size <= largest]
        block = min(sizes, key=lambda size: (-(-slots // size) * size, -size))
        return cls(slots, block, -(-slots // block))

    @property
    def rows(self) -> int:
        return self.block * self.parts


@triton.jit
def _measure(
    X, Order, Mean, TileMean, Scale, x_b, x_h, x_n, heads, slots, largest,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    CENTRE: tl.constexpr, CENTRE_TILE: tl.constexpr,
):  # fmt: skip
    """One program a tile: its mean (after the mean over all tokens is taken out), and its scale."""
    tile = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    X += (bh // heads) * x_b + (bh % heads) * x_h
    out = bh * tl.num_programs(0) + tile
    row = tl.arange(0, BLOCK)
    d = tl.arange(0, DP)
    inside = d < D
    mean = tl.zeros((DP,), tl.float32)
    if CENTRE:
        mean = tl.load(Mean + bh * D + d, mask=inside, other=0.0)
    tile_mean = tl.zeros((DP,), tl.float32)
    if CENTRE_TILE:
        count = 0
        for part in range(PARTS):
            slot = part * BLOCK + row
            token = tl.load(Order + tile * slots + slot, mask=slot < slots, other=-1)
            real = (token >= 0)[:, None] & inside[None, :]
            x = tl.load(X + token[:, None] * x_n + d[None, :], mask=real, other=0.0).to(tl.float32)
            tile_mean += tl.sum(tl.where(real, x - mean[None, :], 0.0), 0)
            count += tl.sum((token >= 0).to(tl.int32), 0)
        tile_mean = tile_mean / tl.maximum(count, 1)
        tl.store(TileMean + out * D + d, tile_mean, mask=inside)
    amax = 0.0
    for part in range(PARTS):
        slot = part * BLOCK + row
        token = tl.load(Order + tile * slots + slot, mask=slot < slots, other=-1)
        real = (token >= 0)[:, None] & inside[None, :]
        x = tl.load(X + token[:, None] * x_n + d[None, :], mask=real, other=0.0).to(tl.float32)
        x = tl.where(real, x - (mean + tile_mean)[None, :], 0.0)
        # A maximum drops NaN. 0·x adds it back, as it does infinity, so that the scale is not finite where x is not.
        amax = tl.maximum(amax, tl.max(tl.max(tl.abs(x), 1), 0)) + tl.sum(tl.sum(x * 0, 1), 0)
    tl.store(Scale + out, amax / largest)


@triton.jit
def _pack(
    X, Order, Mean, TileMean, Scale, Out, x_b, x_h, x_n, heads, slots, largest,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, FORMAT: tl.constexpr,
    CENTRE: tl.constexpr, CENTRE_TILE: tl.constexpr, CHANNEL: tl.constexpr, TRANSPOSE: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    """One program a block of rows. FORMAT "copy", "fp8", "int8" or "int4"; CHANNEL: one scale a channel, not a tile."""
    block = tl.program_id(0)
    tile = block // PARTS
    bh = tl.program_id(1).to(tl.int64)
    X += (bh // heads) * x_b + (bh % heads) * x_h
    row = tl.arange(0, BLOCK)
    slot = (block % PARTS) * BLOCK + row
    token = tl.load(Order + tile * slots + slot, mask=slot < slots, other=-1)
    d = tl.arange(0, DP)
    inside = d < D
    real = (token >= 0)[:, None] & inside[None, :]
    x = tl.load(X + token[:, None] * x_n + d[None, :], mask=real, other=0.0).to(tl.float32)
    if CENTRE:
        x -= tl.load(Mean + bh * D + d, mask=inside, other=0.0)[None, :]
    tiles = tl.num_programs(0) // PARTS
    if CENTRE_TILE:
        x -= tl.load(TileMean + (bh * tiles + tile) * D + d, mask=inside, other=0.0)[None, :]
    if FORMAT != "copy":
        if CHANNEL:
            x /= tl.load(Scale + bh * D + d, mask=inside, other=1.0)[None, :]
        else:
            x /= tl.load(Scale + bh * tiles + tile)
        x = tl.minimum(tl.maximum(x, -largest), largest)
        if FORMAT != "fp8":
            x = (x + ROUND) - ROUND
    x = tl.where(real, x, 0.0)
    y = x.to(Out.dtype.element_ty) if FORMAT != "int4" else x.to(tl.int8)
    blocks = tl.num_programs(0)
    if TRANSPOSE:
        tl.store(Out + (bh * DP + d[None, :]) * (blocks * BLOCK) + block * BLOCK + row[:, None], y)
    elif FORMAT == "int4":
        # The low nibbles hold the first half of the channels and the high ones the second: the kernel's two products.
        HALF: tl.constexpr = DP // 2
        low, high = tl.split(tl.permute(tl.reshape(y, (BLOCK, 2, HALF)), (0, 2, 1)))
        packed = (low & 0xF) | (high << 4)
        half = tl.arange(0, HALF)
        tl.store(Out + ((bh * blocks + block) * BLOCK + row[:, None]) * HALF + half[None, :], packed)
    else:
        tl.store(Out + ((bh * blocks + block) * BLOCK + row[:, None]) * DP + d[None, :], y)


@dataclass(frozen=True, eq=False)
class Packed:
    """Tensors in tile order. data [B·H, tiles·rows, DP] ([B·H, DP, tiles·rows] transposed; INT4: DP/2 bytes a row); scale
    [B·H, tiles] (V: [B·H, D]); mean [B·H, D]; tile_mean [B·H, tiles, D]: float32, None where not asked for."""

    data: Tensor
    scale: Tensor | None
    mean: Tensor | None
    tile_mean: Tensor | None


def pack(
    x: Tensor, order: Tensor, rows: Rows, fmt: str, width: int, centre: bool, centre_tile: bool = False,
    granularity: str = "tile", packed_int4: bool = False,
) -> Packed:  # fmt: skip
    """Q or K [B, H, N, D] in token order (D contiguous) -> tile order, `width` channels of which D are real."""
    B, H, _, D = x.shape
    tiles = len(order)
    mean = x.mean(2, dtype=torch.float32).view(B * H, D).contiguous() if centre else None
    tile_mean = x.new_empty(B * H, tiles, D, dtype=torch.float32) if centre_tile else None
    scale = None
    strides = (x.stride(0), x.stride(1), x.stride(2), H, rows.slots)
    sizes = {"D": D, "DP": width, "BLOCK": rows.block, "PARTS": rows.parts}
    if fmt != "none":
        scale = x.new_empty(B * H, tiles, dtype=torch.float32)
        _measure[(tiles, B * H)](
            x, order, mean, tile_mean, scale, *strides, LARGEST[fmt], **sizes, CENTRE=centre, CENTRE_TILE=centre_tile
        )
        if granularity != "tile":
            scale = scale.amax(1 if granularity == "head" else (0, 1), keepdim=True).expand(B * H, tiles).contiguous()
        scale = torch.where(scale == 0, 1.0, scale)
    kind = "copy" if fmt == "none" else "int4" if packed_int4 else "int8" if fmt == "int4" else fmt
    data = x.new_empty(B * H, tiles * rows.rows, width // 2 if packed_int4 else width, dtype=STORAGE.get(fmt, x.dtype))
    _pack[(tiles * rows.parts, B * H)](
        x, order, mean, tile_mean, scale, data, *strides, LARGEST.get(fmt, 0.0), **sizes, FORMAT=kind, CENTRE=centre,
        CENTRE_TILE=centre_tile, CHANNEL=False, TRANSPOSE=False, ROUND=ROUND,
    )  # fmt: skip
    return Packed(data, scale, mean, tile_mean)


def pack_values(v: Tensor, order: Tensor, rows: Rows, quant: Quant, width: int) -> Packed:
    """V [B, H, N, D] -> tile order; FP8 with one scale a channel, transposed (the FP8 tensor core wants keys contiguous)."""
    B, H, _, D = v.shape
    tiles = len(order)
    eight = quant.pv != "none"
    mean = v.mean(2, dtype=torch.float32).view(B * H, D).contiguous() if quant.smooth_v else None
    scale = None
    if eight:
        low, high = (x.float().view(B * H, D) for x in v.aminmax(dim=2))
        shift = 0.0 if mean is None else mean
        scale = torch.maximum(high - shift, shift - low) / LARGEST[quant.pv]
        scale = torch.where(scale == 0, 1.0, scale).contiguous()
    shape = (B * H, width, tiles * rows.rows) if eight else (B * H, tiles * rows.rows, width)
    data = v.new_empty(shape, dtype=STORAGE[quant.pv] if eight else v.dtype)
    _pack[(tiles * rows.parts, B * H)](
        v, order, mean, None, scale, data, v.stride(0), v.stride(1), v.stride(2), H, rows.slots,
        LARGEST.get(quant.pv, 0.0), D=D, DP=width, BLOCK=rows.block, PARTS=rows.parts, FORMAT=quant.pv if eight else "copy",
        CENTRE=quant.smooth_v, CENTRE_TILE=False, CHANNEL=True, TRANSPOSE=eight, ROUND=ROUND,
    )  # fmt: skip
    return Packed(data, scale, mean, None)
