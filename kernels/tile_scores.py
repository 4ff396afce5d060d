"""Tile scores for policies that look at the data, on CUDA: where does attention's mass lie, before attention is computed?

    pooled (SpargeAttn, arXiv 2502.18137 §3.2): softmax_j(scale · q̄_i·k̄_j + log n_j) with the mean query and key of each tile
    antidiagonal (XAttention, arXiv 2503.16428 §3.1): cells of S consecutive tokens of a tile; the logit of cells a and b is the
        mean over s of scale · q[aS + S−1−s]·k[bS + s], one product for S² pairs; softmax over all key cells, summed by tiles

Both give mass [B, H, q_tiles, k_tiles] in float32 whose rows sum to 1 (to 0 for a tile without tokens). Tokens that are not
there weigh nothing: a cell without any is no cell; in a cell that lacks some, they count as zero vectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels.pack import tile_means

BLOCKS = {2: 64, 4: 32}
"""Of query cells, key cells and channels, by bytes of a number: they spill on no GPU (tests/kernels/test_compile.py), and on an
H200 blocks of 128 could not be told apart from them (docs/benchmarks.md)."""
LSE_BYTES = 256 << 20
"""Of the heads whose LSEs, one for each cell of queries and tile of keys, are held at a time."""


def pooled(q: Tensor, k: Tensor, q_order: Tensor, k_order: Tensor, scale: float | None = None) -> Tensor:
    """q [B, H, Nq, D], k [B, H, Nk, D] in token order, orders [tiles, slots] as in `BlockMask`; scale: default D^-½."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (tile_means(q, q_order) @ tile_means(k, k_order).mT) * scale + (k_order >= 0).sum(-1).float().log()
    return logits.softmax(-1) * (q_order >= 0).any(-1, keepdim=True)


def antidiagonal(q: Tensor, k: Tensor, real: Tensor, stride: int = 8, scale: float | None = None) -> Tensor:
    """q and k [B, H, tiles, slots, D] in tile order with zeros where no token is; real: bool [tiles, slots], where one is;
    stride: tokens of a cell. Costs 1/stride of the product of all queries and keys."""
    B, H, tiles, slots, D = q.shape
    cells = triton.next_power_of_2(-(-slots // stride))
    pad = cells * stride - slots
    if pad:
        q, k, real = (*(torch.nn.functional.pad(x, (0, 0, 0, pad)) for x in (q, k)), torch.nn.functional.pad(real, (0, pad)))
    q, k = (x.flatten(2, 3) if x.stride(-1) == 1 else x.flatten(2, 3).contiguous() for x in (q, k))
    live = real.view(tiles, cells, stride).any(-1)
    weight = (live.float() / live.sum(1, keepdim=True).clamp(min=1))[:, None]
    block = BLOCKS[q.element_size()]
    together = max(1, block // cells)
    turn = max(1, LSE_BYTES // (4 * tiles * cells * tiles))
    mass = q.new_empty(B * H, tiles, tiles, dtype=torch.float32)
    for first in range(0, B * H, turn):
        part = mass[first : first + turn]
        lse = part.new_empty(len(part), tiles * cells, tiles)
        grid = (triton.cdiv(tiles * cells, block), triton.cdiv(tiles, together), len(part))
        _cell_lse[grid](
            q, k, live, lse, q.stride(0), q.stride(1), q.stride(2), k.stride(0), k.stride(1), k.stride(2), first, H, tiles,
            (D**-0.5 if scale is None else scale) / stride,
            D=D, STRIDE=stride, CELLS=cells, TILES=together, BM=block, BK=block, num_warps=4,
        )  # fmt: skip
        torch.matmul(weight, lse.softmax(-1).unflatten(1, (tiles, cells)), out=part.unsqueeze(2))
    return mass.view(B, H, tiles, tiles)


@triton.jit
def _cell_lse(
    Q, K, Live, Lse, q_b, q_h, q_n, k_b, k_h, k_n, first, heads, tiles, scale,
    D: tl.constexpr, STRIDE: tl.constexpr, CELLS: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """LSE of each query cell over the cells of each key tile: a matrix product whose answer is never stored."""
    bh = (first + tl.program_id(2)).to(tl.int64)
    cells = tiles * CELLS
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    BN: tl.constexpr = TILES * CELLS
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    d = tl.arange(0, BK)
    Q += (bh // heads) * q_b + (bh % heads) * q_h + row.to(tl.int64)[:, None] * (STRIDE * q_n) + d[None, :]
    K += (bh // heads) * k_b + (bh % heads) * k_h + column.to(tl.int64)[:, None] * (STRIDE * k_n) + d[None, :]
    s = tl.zeros((BM, BN), tl.float32)
    PARTS: tl.constexpr = (D + BK - 1) // BK
    for step in range(STRIDE * PARTS):
        at, start = step // PARTS, step % PARTS * BK
        left = (start + d < D)[None, :]
        q = tl.load(Q + (STRIDE - 1 - at) * q_n + start, mask=(row < cells)[:, None] & left, other=0.0)
        k = tl.load(K + at * k_n + start, mask=(column < cells)[:, None] & left, other=0.0)
        s = tl.dot(q, tl.trans(k), s, input_precision="tf32x3")
    live = tl.load(Live + column, mask=column < cells, other=0) != 0
    s = tl.where(live[None, :], s * scale, -1e30)
    s = tl.reshape(s, (BM, TILES, CELLS))
    top = tl.max(s, 2)
    lse = top + tl.log(tl.sum(tl.exp(s - top[:, :, None]), 2))
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    where = Lse + (tl.program_id(2).to(tl.int64) * cells + row[:, None]) * tiles + tile[None, :]
    tl.store(where, lse, mask=(row < cells)[:, None] & (tile < tiles)[None, :])
