"""Shared by the dynamic policies: scores of tile pairs, and the selection of tiles by score.

A score is attention mass: float32 [B, H, tiles, tiles], rows sum to 1. Nothing of size N × N is ever in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit import ops
from fastdit.core.layout import Layout
from fastdit.core.quant import Quant

ROWS_BYTES = 64 << 20
"""Bound on the logits in memory at a time."""


def means(x: Tensor, layout: Layout) -> Tensor:
    """[B, H, tiles, tokens, D] in tile order -> mean over each tile's real tokens, float32 [B, H, tiles, D]."""
    return x.float().sum(3) / layout.counts(x.device)[: layout.video_tiles, None]


def pooled(q: Tensor, k: Tensor, layout: Layout) -> Tensor:
    """softmax_j(q̄_i·k̄_j·D^-½ + log n_j): exact if a tile's tokens are all equal (SpargeAttn, arXiv 2502.18137 §3.2)."""
    if _has_kernel(q):  # in float32, q and k of a 14B model are 1.5 GB each
        from fastdit.kernels import tile_scores

        flat = _flat(layout, q.device)
        with ops.on_device(q):
            return tile_scores.pooled(q.flatten(2, 3), k.flatten(2, 3), flat, flat)
    logits = (means(q, layout) @ means(k, layout).mT) * q.shape[-1] ** -0.5
    return (logits + layout.counts(q.device)[: layout.video_tiles].float().log()).softmax(-1)


def _has_kernel(q: Tensor) -> bool:
    return q.is_cuda and ops.unsupported(q, Quant()) is None


def _flat(layout: Layout, device: torch.device) -> Tensor:
    """int64 [tiles, tokens]: the index of each slot in a tensor that is already in tile order, -1 for padding."""
    order = layout.order(device)[: layout.video_tiles]
    return torch.arange(order.numel(), device=device).view_as(order).masked_fill(order < 0, -1)


def antidiagonal(q: Tensor, k: Tensor, layout: Layout, stride: int) -> Tensor:
    """XAttention's score (arXiv 2503.16428 §3.1), at 1/stride of the cost of Q·Kᵀ.

    A cell is `stride` consecutive tokens of a tile. The logit of cells a and b is the mean of q[aS + S−1−s]·k[bS + s]·D^-½
    over s: one product of the flattened cells, one of them reversed. Softmax runs over all cells and is summed by tile.
    Cells of padding only are ignored; missing tokens in a partly filled cell count as zero vectors.
    """
    order = layout.order(q.device)[: layout.video_tiles]
    if _has_kernel(q):
        from fastdit.kernels import tile_scores

        with ops.on_device(q):
            return tile_scores.antidiagonal(q, k, order >= 0, stride)
    pad = -order.shape[1] % stride
    cells = (order.shape[1] + pad) // stride
    live = torch.nn.functional.pad(order, (0, pad), value=-1).view(-1, cells, stride).ge(0).any(-1).flatten()
    queries, keys = (
        torch.nn.functional.pad(x.float(), (0, 0, 0, pad)).unflatten(3, (cells, stride)).flatten(2, 3) for x in (q, k)
    )
    keys = keys.flatten(3)
    queries = queries.flip(3).flatten(3) * (q.shape[-1] ** -0.5 / stride)
    rows = max(1, ROWS_BYTES // (4 * cells * keys.shape[0] * keys.shape[1] * keys.shape[2])) * cells
    hidden = torch.zeros(len(live), dtype=torch.float32, device=q.device).masked_fill(~live, float("-inf"))
    tiles = []
    for part, seen in zip(queries.split(rows, 2), live.split(rows), strict=True):
        mass = (part @ keys.mT).add_(hidden).softmax(-1).unflatten(-1, (-1, cells)).sum(-1)
        tiles.append((mass * seen[:, None]).unflatten(2, (-1, cells)).sum(3))
    return torch.cat(tiles, 2) / live.view(-1, cells).sum(1)[:, None]


def select_tiles(mass: Tensor, tau: float | None, density: float | None) -> Tensor:
    """In each row, keep the fewest tiles whose mass sums to tau of the total, or the heaviest `density` share of tiles.

    mass [B, H, tiles, tiles] -> bool of that shape. A row with NaN or Inf (from q or k) keeps every tile, so that the fault
    shows in the output.
    """
    tiles = mass.shape[-1]
    if 1 in (tau, density):
        return torch.ones_like(mass, dtype=torch.bool)
    weights, order = mass.sort(dim=-1, descending=True, stable=True)
    if tau is None:
        kept = (torch.arange(tiles, device=mass.device) < max(1, round((density or 0) * tiles))).expand_as(mass)
    else:
        before = weights.double().cumsum(-1) - weights  # mass of heavier tiles
        kept = before < tau * weights.double().sum(-1, keepdim=True)
    found = torch.zeros_like(kept).scatter_(-1, order, kept)
    return found | ~mass.isfinite().all(-1, keepdim=True)


def tile_coordinates(layout: Layout, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates (t, h, w) of each video tile in the tile grid, int64 [video_tiles] each."""
    t, h, w = (torch.arange(n, device=device) for n in layout.tile_grid)
    grid = torch.meshgrid(t, h, w, indexing="ij")
    return grid[0].flatten(), grid[1].flatten(), grid[2].flatten()
