"""Tile scores for policies that look at the data, on CUDA: where does attention's mass lie, before attention is computed?

    pooled (SpargeAttn, arXiv 2502.18137 §3.2): softmax_j(scale · q̄_i·k̄_j + log n_j) with the mean query and key of each tile
    antidiagonal (XAttention, arXiv 2503.16428 §3.1): cells of S consecutive tokens of a tile; the logit of cells a and b is the
        mean over s of scale · q[aS + S−1−s]·k[bS + s], one product for S² pairs; softmax over all key cells, summed by tiles

Both return mass [B, H, q_tiles, k_tiles] in float32 whose rows sum to 1 (to 0 for a tile without tokens). Tokens that are not
there weigh nothing: a cell without any is no cell; in a cell that lacks some, they count as zero vectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.kernels.quantize import tile_means


def pooled(q: Tensor, k: Tensor, q_order: Tensor, k_order: Tensor, scale: float | None = None) -> Tensor:
    """q [B, H, Nq, D], k [B, H, Nk, D] in token order, orders [tiles, slots] as in `BlockMask`; scale: default D^-½."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = (tile_means(q, q_order) @ tile_means(k, k_order).mT) * scale + (k_order >= 0).sum(-1).log()
    return logits.softmax(-1) * (q_order >= 0).any(-1, keepdim=True)


def antidiagonal(q: Tensor, k: Tensor, q_order: Tensor, k_order: Tensor, stride: int = 8, scale: float | None = None) -> Tensor:
    """The same arguments; stride: tokens of a cell. Costs 1/stride of the product of all queries and keys."""
    B, H, _, D = q.shape
    (queries, q_live), (keys, k_live) = (
        _cells(x, order, stride, flip) for x, order, flip in ((q, q_order, True), (k, k_order, False))
    )
    cells, q_tiles, k_tiles = q_live.shape[1], len(q_order), len(k_order)
    lse = q.new_empty(B * H, q_tiles * cells, k_tiles, dtype=torch.float32)
    columns = k_live.shape[1]
    tiles = max(1, 64 // columns)
    grid = (triton.cdiv(q_tiles * cells, 64), triton.cdiv(k_tiles, tiles), B * H)
    _cell_lse[grid](
        queries, keys, k_live, lse, q_tiles * cells, k_tiles, stride * D, (D**-0.5 if scale is None else scale) / stride,
        CELLS=columns, TILES=tiles, BM=64, BK=64, num_warps=4,
    )  # fmt: skip
    mass = lse.softmax(-1).view(B, H, q_tiles, cells, k_tiles) * q_live[..., None]
    return mass.sum(3) / q_live.sum(1).clamp(min=1)[:, None]


def _cells(x: Tensor, order: Tensor, stride: int, flip: bool) -> tuple[Tensor, Tensor]:
    """[B, H, N, D] -> cells [B·H, tiles · cells, stride · D], zeros where no token is, and which have one [tiles, cells];
    cells of a tile are padded to a power of two. flip: tokens of a cell in reverse."""
    cells = triton.next_power_of_2(-(-order.shape[1] // stride))
    order = torch.nn.functional.pad(order, (0, cells * stride - order.shape[1]), value=-1).view(len(order), cells, stride)
    taken = order.flip(-1) if flip else order
    x = x[:, :, taken.clamp(min=0)].masked_fill((taken < 0)[..., None], 0)
    return x.view(x.shape[0] * x.shape[1], len(order) * cells, -1), (order >= 0).any(-1)


@triton.jit
def _cell_lse(
    Q, K, Live, Lse, q_cells, k_tiles, depth, scale,
    CELLS: tl.constexpr, TILES: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """LSE of each query cell over the cells of each key tile: a matrix product whose answer is never stored."""
    bh = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    BN: tl.constexpr = TILES * CELLS
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    inside = column < k_tiles * CELLS
    d = tl.arange(0, BK)
    Q += (bh * q_cells + row[:, None]) * depth + d[None, :]
    K += (bh * k_tiles * CELLS + column[:, None]) * depth + d[None, :]
    s = tl.zeros((BM, BN), tl.float32)
    for start in range(0, depth, BK):
        left = (start + d < depth)[None, :]
        q = tl.load(Q + start, mask=(row < q_cells)[:, None] & left, other=0.0)
        k = tl.load(K + start, mask=inside[:, None] & left, other=0.0)
        s = tl.dot(q, tl.trans(k), s, input_precision="tf32x3")
    live = tl.load(Live + column, mask=inside, other=0) != 0
    s = tl.where(live[None, :], s * scale, -1e30)
    s = tl.reshape(s, (BM, TILES, CELLS))
    top = tl.max(s, 2)
    lse = top + tl.log(tl.sum(tl.exp(s - top[:, :, None]), 2))
    tile = tl.program_id(1) * TILES + tl.arange(0, TILES)
    where = Lse + (bh * q_cells + row[:, None]) * k_tiles + tile[None, :]
    tl.store(where, lse, mask=(row < q_cells)[:, None] & (tile < k_tiles)[None, :])
