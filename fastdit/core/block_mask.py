"""The kernel's form of a tile map: for each query tile, how many key tiles it attends and which.

`kv_num_blocks` and `kv_indices` are named after torch's `BlockMask` (`torch.nn.attention.flex_attention`). `q_order` and
`k_order` give the token in each slot of each tile. A kernel therefore gathers from and scatters to token order itself, and
the whole sequence is never permuted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fastdit.core.layout import Layout


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which key tiles each query tile attends.

    kv_num_blocks: int32 [b, h, q_tiles]. kv_indices: int32 [b, h, q_tiles, k_tiles], ascending; only the first kv_num_blocks
    entries of a row are valid. b and h are 1 where all batch elements or heads share the map. q_order [q_tiles, slots] and
    k_order [k_tiles, slots]: int64, the token in each slot; -1 (padding) follows a tile's real tokens. q_len, k_len: tokens.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    q_order: Tensor
    k_order: Tensor
    q_len: int
    k_len: int

    @classmethod
    def from_tile_map(cls, tile_map: Tensor, layout: Layout) -> BlockMask:
        """bool [b, h, num_tiles, num_tiles] of a layout -> BlockMask. Raises ValueError for another shape or dtype."""
        tiles = layout.num_tiles
        if tile_map.dtype != torch.bool or tile_map.ndim != 4 or tile_map.shape[2:] != (tiles, tiles):
            raise ValueError(f"tile map must be bool [b, h, {tiles}, {tiles}], got {tile_map.dtype} {tuple(tile_map.shape)}")
        order = layout.order(tile_map.device)
        column = torch.arange(tiles, dtype=torch.int32, device=tile_map.device)
        rank = tile_map.cumsum(-1, dtype=torch.int32)  # argsort would cost more on a GPU than most policies
        place = torch.where(tile_map, rank - 1, tiles - 1 - column + rank)  # dropped tiles fill the list from its end
        indices = torch.empty_like(rank).scatter_(-1, place.long(), column.expand_as(rank))
        return cls(rank[..., -1].contiguous(), indices, order, order, layout.length, layout.length)

    def for_queries(self, at: Tensor, roll: int = 0) -> BlockMask:
        """The block mask of a subset of the queries. at: int64 [n], each query's token in the sequence before it was rolled by
        `roll` positions. Keeps the latest result: ring attention asks for the same one at every site and step."""
        latest = _latest.get(self)
        if latest is None or latest[0] is not at or latest[1] != roll:
            latest = _latest[self] = at, roll, self._for_queries((at + roll) % self.q_len)
        return latest[2]

    def _for_queries(self, at: Tensor) -> BlockMask:
        new = torch.full((self.q_len,), -1, dtype=torch.long, device=at.device)
        new[at] = torch.arange(len(at), device=at.device)
        order = torch.where(self.q_order >= 0, new[self.q_order.clamp(min=0)], -1)
        order = order.gather(1, (order < 0).to(torch.int8).argsort(dim=1, stable=True))  # padding behind real tokens
        tiles = order[:, 0] >= 0
        return replace(
            self, kv_num_blocks=self.kv_num_blocks[..., tiles].contiguous(),
            kv_indices=self.kv_indices[..., tiles, :].contiguous(), q_order=order[tiles], q_len=len(at),
        )  # fmt: skip

    def to_tile_map(self) -> Tensor:
        """Inverse of `from_tile_map`: bool [b, h, q_tiles, k_tiles]."""
        return tile_map(self.kv_num_blocks, self.kv_indices)

    def density(self) -> float:
        """Share of (query, key) pairs attended, in [0, 1]; padding is excluded."""
        return float(density(self.to_tile_map(), self.q_order, self.k_order))


_latest: WeakKeyDictionary[BlockMask, tuple[Tensor, int, BlockMask]] = WeakKeyDictionary()


def density(tile_map: Tensor, q_order: Tensor, k_order: Tensor) -> Tensor:
    """Tile map bool [b, h, q_tiles, k_tiles] -> share of (query, key) pairs attended, without padding: float64 [] in [0, 1]."""
    q_counts, k_counts = ((order >= 0).sum(-1).double() for order in (q_order, k_order))
    keys = (tile_map.float() @ k_counts.float()).double()  # per query tile; integers below 2²⁴ are exact
    return (keys @ q_counts).mean() / (q_counts.sum() * k_counts.sum())


def tile_of(order: Tensor, length: int) -> Tensor:
    """int64 [length]: the tile of each token of an order [tiles, slots] (-1: padding), which must hold every token once."""
    tile = torch.empty(length + 1, dtype=torch.long, device=order.device)  # padding's goes last: a GPU is not waited for
    tile[order.masked_fill(order < 0, length)] = torch.arange(len(order), device=order.device)[:, None].expand_as(order)
    return tile[:length]


def version(x: Tensor) -> int:
    """How often a tensor was changed in place; -1 under `torch.inference_mode`, where PyTorch does not count."""
    return -1 if x.is_inference() else x._version


def tile_map(kv_num_blocks: Tensor, kv_indices: Tensor) -> Tensor:
    """Block mask -> bool tile map [b, h, q_tiles, k_tiles]."""
    kept = torch.arange(kv_indices.shape[-1], device=kv_indices.device) < kv_num_blocks[..., None]
    return torch.zeros_like(kept).scatter_(-1, kv_indices.long(), kept)
