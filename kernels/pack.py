"""Token order to tile order, and to the formats of `fastdit.core.quant`, in Triton: what the attention kernel reads.

A tile of `slots` tokens becomes `rows` ≥ slots rows, a whole number of the kernel's blocks; the rows behind its tokens are
zero. One launch per tensor measures and writes each tile (it is read once from memory; the second look hits the cache);
means and extremes over the whole sequence, where a format needs them, are one launch before it. Nothing waits for the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.core.quant import LARGEST, STORAGE, Quant

ROUND = tl.constexpr(12582912.0)
"""1.5 · 2²³: adding and subtracting it rounds a float32 below 2²² to the nearest whole number, half to even."""
CHUNK = 512
"""Tokens of one program of `_statistics`."""


@dataclass(frozen=True)
class Rows:
    """How a tile of `slots` tokens is laid out: `parts` blocks of `block` rows each."""

    slots: int
    block: int
    parts: int

    @classmethod
    def of(cls, slots: int, largest: int = 128, least: int = 32) -> Rows:
        """The block (`least` to `largest` rows) that pads least; of equals the larger, which the tensor cores like better."""
        sizes = [size for size in (128, 64, 32, 16) if least <= size <= largest]
        block = min(sizes, key=lambda size: (-(-slots // size) * size, -size))
        return cls(slots, block, -(-slots // block))

    @property
    def rows(self) -> int:
        return self.block * self.parts


@triton.jit
def _statistics(
    X, Sum, Low, High, x_b, x_h, x_n, heads, length, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """One program a chunk of tokens: sum, least and greatest of each channel."""
    chunk = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, DP)
    X += (bh // heads) * x_b + (bh % heads) * x_h + d[None, :]
    total = tl.zeros((DP,), tl.float32)
    low = tl.full((DP,), float("inf"), tl.float32)
    high = tl.full((DP,), float("-inf"), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        token = chunk.to(tl.int64) * CHUNK + start + tl.arange(0, BLOCK)
        real = (token < length)[:, None] & (d < D)[None, :]
        x = tl.load(X + token[:, None] * x_n, mask=real, other=0.0).to(tl.float32)
        total += tl.sum(x, 0)
        low = tl.minimum(low, tl.min(tl.where(real, x, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(real, x, float("-inf")), 0))
    where = (bh * tl.num_programs(0) + chunk) * D + d
    tl.store(Sum + where, total, mask=d < D)
    tl.store(Low + where, low, mask=d < D)
    tl.store(High + where, high, mask=d < D)


@triton.jit
def _finish(Sum, Low, High, Mean, Scale, chunks, length, largest, D: tl.constexpr, DP: tl.constexpr, CENTRE: tl.constexpr):
    """One program a head: the mean of each channel, and the scale that fits what is left when it is taken out."""
    bh = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, DP)
    inside = d < D
    total = tl.zeros((DP,), tl.float32)
    low = tl.full((DP,), float("inf"), tl.float32)
    high = tl.full((DP,), float("-inf"), tl.float32)
    for chunk in range(chunks):
        where = (bh * chunks + chunk) * D + d
        total += tl.load(Sum + where, mask=inside, other=0.0)
        low = tl.minimum(low, tl.load(Low + where, mask=inside, other=0.0))
        high = tl.maximum(high, tl.load(High + where, mask=inside, other=0.0))
    mean = total / length
    tl.store(Mean + bh * D + d, mean, mask=inside)
    if CENTRE:
        low -= mean
        high -= mean
    # A maximum drops NaN. 0·x adds it back, as it does infinity, so that the scale is not finite where x is not.
    scale = tl.maximum(high, -low) / largest + total * 0
    tl.store(Scale + bh * D + d, tl.where(scale == 0, 1.0, scale), mask=inside)


@triton.jit
def _pack(
    X, Order, Mean, TileMean, Scale, Out, x_b, x_h, x_n, heads, slots, largest,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, FORMAT: tl.constexpr,
    CENTRE: tl.constexpr, TILE_MEAN: tl.constexpr, CENTRE_TILE: tl.constexpr, SCALE: tl.constexpr, TRANSPOSE: tl.constexpr,
):  # fmt: skip
    """One program a tile. FORMAT "copy", "fp8", "int8" or "int4"; SCALE "none", "tile" (measured here), "measure" (only
    measured, nothing is written), "given" (a tile's) or "channel". TRANSPOSE: each block channels × rows, its rows relabelled
    inside groups of 16 in the order in which the attention kernel has P."""
    tile = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, DP)
    inside = d < D
    X += (bh // heads) * x_b + (bh % heads) * x_h + d[None, :]
    Order += tile * slots
    row = tl.arange(0, BLOCK)
    tiles = tl.num_programs(0)
    mean = tl.zeros((DP,), tl.float32)
    if CENTRE:
        mean = tl.load(Mean + bh * D + d, mask=inside, other=0.0)
    if TILE_MEAN:
        total = tl.zeros((DP,), tl.float32)
        count = 0
        for part in range(PARTS):
            slot = part * BLOCK + row
            token = tl.load(Order + slot, mask=slot < slots, other=-1)
            real = (token >= 0)[:, None] & inside[None, :]
            x = tl.load(X + token[:, None] * x_n, mask=real, other=0.0).to(tl.float32)
            total += tl.sum(tl.where(real, x - mean[None, :], 0.0), 0)
            count += tl.sum((token >= 0).to(tl.int32), 0)
        total = total / tl.maximum(count, 1)
        tl.store(TileMean + (bh * tiles + tile) * D + d, total, mask=inside)
        if CENTRE_TILE:
            mean += total
    scale = 1.0
    if SCALE == "tile" or (SCALE == "measure" and FORMAT != "copy"):
        amax = 0.0
        for part in range(PARTS):
            slot = part * BLOCK + row
            token = tl.load(Order + slot, mask=slot < slots, other=-1)
            real = (token >= 0)[:, None] & inside[None, :]
            x = tl.load(X + token[:, None] * x_n, mask=real, other=0.0).to(tl.float32)
            x = tl.where(real, x - mean[None, :], 0.0)
            amax = tl.maximum(amax, tl.max(tl.max(tl.abs(x), 1), 0)) + tl.sum(tl.sum(x * 0, 1), 0)  # as in _finish
        scale = amax / largest
        if SCALE == "tile":
            scale = tl.where(amax == 0, 1.0, scale)
        tl.store(Scale + bh * tiles + tile, scale)
    elif SCALE == "given":
        scale = tl.load(Scale + bh * tiles + tile)
    for part in range(0 if SCALE == "measure" else PARTS):
        slot = part * BLOCK + row
        if TRANSPOSE:  # row 16g + 4t + 2j + e holds slot 16g + 8j + 2t + e
            slot = part * BLOCK + (row & -16) + ((row >> 1) & 1) * 8 + ((row >> 2) & 3) * 2 + (row & 1)
        token = tl.load(Order + slot, mask=slot < slots, other=-1)
        real = (token >= 0)[:, None] & inside[None, :]
        x = tl.load(X + token[:, None] * x_n, mask=real, other=0.0).to(tl.float32) - mean[None, :]
        if SCALE == "channel":
            x = x / tl.load(Scale + bh * D + d, mask=inside, other=1.0)[None, :]
        elif SCALE != "none":
            x = x / scale
        if FORMAT != "copy":
            # A minimum may drop NaN; in FP8 it must stay. Codes of whole numbers have none: their scale carries it.
            x = tl.where(x != x, x, tl.minimum(tl.maximum(x, -largest), largest))
            if FORMAT != "fp8":
                x = (x + ROUND) - ROUND
        x = tl.where(real, x, 0.0)
        first = (tile * PARTS + part) * BLOCK
        if TRANSPOSE:
            where = (bh * tiles * PARTS * BLOCK + first) * DP + d[None, :] * BLOCK + row[:, None]
            tl.store(Out + where, x.to(Out.dtype.element_ty))
        elif FORMAT == "int4":
            # The low nibbles hold the first half of the channels and the high ones the second: the kernel's two products.
            HALF: tl.constexpr = DP // 2
            low, high = tl.split(tl.permute(tl.reshape(x.to(tl.int8), (BLOCK, 2, HALF)), (0, 2, 1)))
            half = tl.arange(0, HALF)
            where = (bh * tiles * PARTS * BLOCK + first + row[:, None]) * HALF + half[None, :]
            tl.store(Out + where, (low & 0xF) | (high << 4))
        else:
            where = (bh * tiles * PARTS * BLOCK + first + row[:, None]) * DP + d[None, :]
            tl.store(Out + where, x.to(Out.dtype.element_ty))


@dataclass(frozen=True, eq=False)
class Packed:
    """Tensors in tile order. data [B·H, tiles·rows, DP] (transposed: [DP, block] in each block; INT4: DP/2 bytes a row); scale
    [B·H, tiles] (V: [B·H, D]); mean [B·H, D]; tile_mean [B·H, tiles, D], of what smoothing left: float32 or None."""

    data: Tensor
    scale: Tensor | None
    mean: Tensor | None
    tile_mean: Tensor | None


def statistics(x: Tensor, largest: float, centre: bool) -> tuple[Tensor, Tensor]:
    """Mean and scale [B·H, D] of each channel of x [B, H, N, D] over all its tokens."""
    B, H, N, D = x.shape
    width, chunks = triton.next_power_of_2(D), -(-N // CHUNK)
    parts = x.new_empty(3, B * H, chunks, D, dtype=torch.float32)
    mean, scale = x.new_empty(2, B * H, D, dtype=torch.float32).unbind()
    strides = (x.stride(0), x.stride(1), x.stride(2), H)
    _statistics[(chunks, B * H)](x, *parts.unbind(), *strides, N, D=D, DP=width, BLOCK=8192 // width, CHUNK=CHUNK)
    _finish[(B * H,)](*parts.unbind(), mean, scale, chunks, N, largest, D=D, DP=width, CENTRE=centre)
    return mean, scale


def pack(
    x: Tensor, order: Tensor, rows: Rows, fmt: str, width: int, centre: bool = False, centre_tile: bool = False,
    granularity: str = "tile", packed_int4: bool = False,
) -> Packed:  # fmt: skip
    """Q or K [B, H, N, D] in token order (D contiguous) -> tile order, `width` channels of which D are real."""
    mean = statistics(x, 1.0, True)[0] if centre else None
    kind = "copy" if fmt == "none" else "int4" if packed_int4 else "int8" if fmt == "int4" else fmt
    work = (x, order, rows, kind, fmt, width, mean)
    if fmt == "none":
        return _launch(*work, None, "none", centre_tile=centre_tile)
    scale = x.new_empty(x.shape[0] * x.shape[1], len(order), dtype=torch.float32)
    if granularity == "tile":
        return _launch(*work, scale, "tile", centre_tile=centre_tile)
    _launch(*work, scale, "measure", centre_tile=centre_tile)
    scale = scale.amax(1 if granularity == "head" else (0, 1), keepdim=True).expand_as(scale)
    return _launch(*work, torch.where(scale == 0, 1.0, scale), "given", centre_tile=centre_tile)


def pack_values(v: Tensor, order: Tensor, rows: Rows, quant: Quant, width: int) -> Packed:
    """V [B, H, N, D] -> tile order; FP8 and INT8 with one scale a channel, transposed (their tensor cores want keys
    contiguous)."""
    if quant.pv == "none":
        return _launch(v, order, rows, "copy", "none", width, None, None, "none")
    mean, scale = statistics(v, LARGEST[quant.pv], quant.smooth_v)
    return _launch(v, order, rows, quant.pv, quant.pv, width, mean if quant.smooth_v else None, scale, "channel",
                   transpose=True)  # fmt: skip


def _launch(
    x: Tensor, order: Tensor, rows: Rows, kind: str, fmt: str, width: int, mean: Tensor | None, scale: Tensor | None,
    scaling: str, tile_mean: bool = False, centre_tile: bool = False, transpose: bool = False,
) -> Packed:  # fmt: skip
    B, H, _, D = x.shape
    tiles, channels = len(order), width // 2 if kind == "int4" else width
    means = x.new_empty(B * H, tiles, D, dtype=torch.float32) if tile_mean or centre_tile else None
    written = 0 if scaling == "measure" else tiles * rows.rows
    data = x.new_empty(B * H, written, channels, dtype=STORAGE.get(fmt, x.dtype))
    _pack[(tiles, B * H)](
        x, order, mean, means, scale, data, x.stride(0), x.stride(1), x.stride(2), H, rows.slots, LARGEST.get(fmt, 0.0),
        D=D, DP=width, BLOCK=rows.block, PARTS=rows.parts, FORMAT=kind, CENTRE=mean is not None, TILE_MEAN=means is not None,
        CENTRE_TILE=centre_tile, SCALE=scaling, TRANSPOSE=transpose, num_warps=4,
    )  # fmt: skip
    return Packed(data, scale, mean, means)


def strides(x: Tensor, unit: int | None = None) -> tuple[int, int]:
    """Steps from one batch element and head of x to the next, 0 where all share one; in elements, or in `unit`s of a head."""
    b, h = x.stride(0), x.stride(1)
    if unit is not None:
        b, h = x.shape[1] * unit, unit
    return (b if x.shape[0] > 1 else 0), (h if x.shape[1] > 1 else 0)


def tile_means(x: Tensor, order: Tensor) -> Tensor:
    """[B, H, N, D] in token order -> the mean of each tile's tokens, float32 [B, H, tiles, D]."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    work = (x, order, Rows.of(order.shape[1]), "copy", "none", triton.next_power_of_2(x.shape[-1]), None, None)
    means = _launch(*work, "measure", tile_mean=True).tile_mean
    assert means is not None
    return means.view(*x.shape[:2], len(order), -1)
