"""Block-sparse attention on CPU tensors: real sparsity, not a masked dense product.

Query tiles that attend to the same key tiles are answered together: with a clamped window whole corners of the grid share
one list, so a call meets hundreds of queries instead of one tile's, and torch's CPU flash kernel runs near its dense
throughput. Per group the kept keys are gathered once, from token order (no permutation of the whole sequence) and real
tokens only (no padding), and handed to ATen's flash kernel, which also returns the LSE. Groups of equal shape are stacked
into one call of bounded size, so that many small groups (maps per head, maps from data) still fill the cores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from fastdit.blockmask import tile_map
from fastdit.quant import Quant, emulate

CHUNK_BYTES = 4 << 20
"""Gathered keys and values of one call. 4 MB stays in a core's caches; 64 MB was 1.2-2 × slower on two Zen 4 cores."""


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention, [B, H, N, D] -> (out, lse [B, H, N] in float32 or float64), by ATen's CPU flash kernel.

    float16 is computed in float32: CPUs without native float16 arithmetic run it 2-12 × slower.
    """
    if q.dtype == torch.float16:
        out, lse = attend(q.float(), k.float(), v.float(), scale)
        return out.half(), lse
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
    return out, lse.to(torch.promote_types(lse.dtype, torch.float32))


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, quant: Quant) -> tuple[Tensor, Tensor]:
    """Every query attends every key. Quantization is emulated: the numbers are the format's, the time is not."""
    return attend(q, k, v, scale) if quant.is_none else emulate(q, k, v, quant).attend(scale=scale)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    scale: float,
    quant: Quant,
) -> tuple[Tensor, Tensor]:
    """q [B, H, Nq, D], k and v [B, H, Nk, D] in token order; masks as in `BlockMask`. Returns out like q and lse [B, H, Nq]."""
    B, H, Nq, D = q.shape
    kept = tile_map(kv_num_blocks, kv_indices)
    # diffusers keeps [B, N, H, D] in memory and hands out a transposed view, so rows of that memory are gathered without
    # a copy: all heads of a token where the whole batch shares one map, else one head of it.
    stride = 1 if kept.shape[:2] == (1, 1) else H
    sources = [x.transpose(1, 2).reshape(-1, H // stride, D) for x in (q, k, v)]
    out = torch.zeros_like(sources[0])
    lse = torch.full(out.shape[:2], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))

    row_bytes = 2 * out.shape[1] * D * k.element_size()
    for queries, keys in _batches(_problems(kept, B, H, stride), q_order, k_order, Nq, k.shape[2], stride, row_bytes):
        index = (queries, keys, keys)
        gathered = [x.index_select(0, i.flatten()).unflatten(0, i.shape).transpose(1, 2) for x, i in zip(sources, index, strict=True)]
        o, s = attend(*gathered, scale)
        out.index_copy_(0, queries.flatten(), o.transpose(1, 2).flatten(0, 1))
        lse.index_copy_(0, queries.flatten(), s.transpose(1, 2).flatten(0, 1))
    return out.view(B, Nq, H, D).transpose(1, 2), lse.view(B, Nq, H).transpose(1, 2)


def _tile_of(order: Tensor, length: int) -> Tensor:
    """[tiles, slots] -> int64 [length]: the tile of each token."""
    tiles = torch.empty(length, dtype=torch.long)
    real = order >= 0
    tiles[order[real]] = torch.arange(len(order))[:, None].expand_as(order)[real]
    return tiles


def _problems(kept: Tensor, B: int, H: int) -> list[tuple[Tensor, list[int]]]:
    """[(map [q_tiles, k_tiles], the sequences it holds for)]: sequences are batch elements when all share one map, else
    b·H + h."""
    b_maps, h_maps = kept.shape[:2]
    if b_maps == h_maps == 1:
        return [(kept[0, 0], list(range(B)))]
    return [
        (kept[b, h], [i * H + j for i in (range(B) if b_maps == 1 else [b]) for j in (range(H) if h_maps == 1 else [h])])
        for b, h in product(range(b_maps), range(h_maps))
    ]


def _batches(
    problems: list[tuple[Tensor, list[int]]], q_order: Tensor, k_order: Tensor, Nq: int, Nk: int, row_bytes: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Stacks of equally long (query rows [G, nq], key rows [G, nk]) with at most CHUNK_BYTES of keys and values each."""
    buckets: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for kept, sequences in problems:
        lists, group = kept.unique(dim=0, return_inverse=True)
        for i, tiles in enumerate(lists):
            queries, keys = q_order[group == i], k_order[tiles]
            queries, keys = queries[queries >= 0], keys[keys >= 0]
            if len(keys):  # a query without keys keeps out = 0, lse = -inf
                buckets[len(queries), len(keys)] += [(queries + s * Nq, keys + s * Nk) for s in sequences]
    for (_, n_keys), items in buckets.items():
        stack = max(1, CHUNK_BYTES // (n_keys * row_bytes))
        for start in range(0, len(items), stack):
            queries_of, keys_of = zip(*items[start : start + stack], strict=True)
            yield torch.stack(queries_of), torch.stack(keys_of)
