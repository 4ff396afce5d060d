"""Block-sparse attention on CPU tensors: real sparsity, not a masked dense product.

Query tiles that attend to the same key tiles are answered together: with a clamped window whole corners of the grid share
one list, so a call meets hundreds of queries instead of one tile's, and torch's CPU flash kernel runs near its dense
throughput. Per group the kept keys are gathered once, from token order (no permutation of the whole sequence) and real
tokens only (no padding), and handed to ATen's flash kernel, which also returns the LSE. Groups of equal shape are stacked
into one call of bounded size, so that many small groups (maps per head, maps from data) still fill the cores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastdit.core.block_mask import tile_map, tile_of, version
from fastdit.core.quant import Quant, emulate, rounded_attention
from fastdit.core.reference import attention, merge

CHUNK_BYTES = 4 << 20
"""Gathered keys and values of one call. 4 MB stays in a core's caches; 64 MB was 1.2-2 × slower on two Zen 4 cores."""

UNSEEN = -1e30
"""What minus infinity in a bias becomes: ATen's kernel makes NaN of a row of infinities."""


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention, [B, H, N, D] -> (out, lse [B, H, N] in float32 or float64), by ATen's CPU flash kernel.

    float16 is computed in float32: CPUs without native float16 arithmetic run it 2-12 × slower.
    """
    if q.dtype == torch.float16:
        out, lse = attend(q.float(), k.float(), v.float(), scale)
        return out.half(), lse
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
    wrong = q.sum(-1) * 0  # NaN where a query is not finite: with fewer keys than a vector holds, the kernel hides that
    if not bool((wrong == 0).all()):
        out, lse = out + wrong[..., None], lse + wrong
    return out, lse.to(torch.promote_types(lse.dtype, torch.float32))


def attend_quantized(q: Tensor, k: Tensor, v: Tensor, scale: float, pv: str) -> tuple[Tensor, Tensor]:
    """The same over `quant.Operands`: q and k may be wider than v, P is rounded to `pv`."""
    if pv == "none":
        out, lse = attend(q, k, torch.nn.functional.pad(v, (0, q.shape[-1] - v.shape[-1])), scale)
        return out[..., : v.shape[-1]], lse
    rows = max(1, CHUNK_BYTES // (k.shape[-2] * k.element_size()))
    parts = [rounded_attention(part, k, v, scale, pv) for part in q.split(rows, -2)]
    return torch.cat([out for out, _ in parts], -2), torch.cat([lse for _, lse in parts], -1)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, quant: Quant, bias_q: Tensor | None = None, bias_k: Tensor | None = None,
    fault: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every query attends every key. Quantization is emulated: the numbers are the format's, the time is not."""
    k, v = _for_every_head(q, k, v)
    if quant.is_none and bias_k is None:
        return _judged(*attend(q, k, v, scale), fault)
    x = emulate(q, k, v, quant)
    out, lse = x.finish(*_see(*attend_quantized(*_widen(x.q, x.k, scale, bias_q, bias_k), x.v, scale, quant.pv)), scale)
    return _judged(out.to(q.dtype), lse, fault)


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
    bias_q: Tensor | None = None,
    bias_k: Tensor | None = None,
    pooled: bool = False,
    fault: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, H, Nq, D], k and v [B, Hkv, Nk, D] in token order; masks as in `BlockMask`, biases and pooled as in
    `ops.attention`, fault as in `ops.run`. Returns out like q and lse [B, H, Nq]."""
    k, v = _for_every_head(q, k, v)
    masks = (kv_num_blocks, kv_indices, q_order, k_order)
    if quant.is_none and bias_k is None:
        out, lse = _sparse(q, k, v, *masks, scale, attend)
    else:
        x = emulate(q, k, v, quant, q_order, k_order)
        core = partial(attend_quantized, pv=quant.pv)
        out, lse = _sparse(*_widen(x.q, x.k, scale, bias_q, bias_k), x.v, *masks, scale, core)
        out, lse = x.finish(*_see(out, lse), scale)
    if pooled:
        out, lse = merge([(out, lse), _dropped(q, k, v, *masks, scale)])
    return _judged(out.to(q.dtype), lse, fault)


def repair(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, fault: Tensor, lse: Tensor | None = None) -> None:
    """Dense attention in the inputs' own dtype, as `ops.repair` has it. There is no GPU to wait for: it looks at the flag."""
    if not int(fault) & 1:
        return
    whole, total = dense_attention(q, k, v, scale, Quant())
    out.copy_(whole)
    if lse is not None:
        lse.copy_(total)
    if not _sound(whole, total):
        fault |= 2


def _judged(out: Tensor, lse: Tensor, fault: Tensor | None) -> tuple[Tensor, Tensor]:
    """out and lse as they are; ORs 1 into `fault` if they are not finite."""
    if fault is not None and not _sound(out, lse):
        fault |= 1
    return out, lse


def _sound(out: Tensor, lse: Tensor) -> bool:
    """Is it finite? The LSE of a query that saw no key is −inf."""
    return bool(out.isfinite().all()) and bool((lse < float("inf")).all())


def _for_every_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of grouped heads, once for each query head."""
    group = q.shape[1] // k.shape[1]
    return (k, v) if group == 1 else (k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))


def _widen(q: Tensor, k: Tensor, scale: float, bias_q: Tensor | None, bias_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """A low-rank bias as more channels (FlashBias, arXiv 2505.12044): [q, bias_q]·[k, bias_k / scale] · scale."""
    if bias_k is None:
        return q, k
    right = (bias_k.to(k.dtype) / scale).clamp(min=UNSEEN).expand(*k.shape[:2], -1, -1)
    left = torch.ones_like(q[..., :1]) if bias_q is None else bias_q.to(q.dtype).expand(*q.shape[:2], -1, -1)
    return torch.cat([q, left], -1), torch.cat([k, right], -1)


def _see(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Queries all of whose keys a bias of minus infinity hides: out = 0, lse = −inf."""
    hidden = lse < UNSEEN / 1e4
    return out.masked_fill(hidden[..., None], 0), lse.masked_fill(hidden, float("-inf"))


def _dropped(
    q: Tensor, k: Tensor, v: Tensor, kv_num_blocks: Tensor, kv_indices: Tensor, q_order: Tensor, k_order: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention to the tiles a mask drops: of each one key and value, the means of its own, with log n on the logit."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    real, count = (k_order >= 0)[..., None], (k_order >= 0).sum(-1)
    keys, values = ((x.to(dtype)[:, :, k_order.clamp(min=0)] * real).sum(3) / count.clamp(min=1)[:, None] for x in (k, v))
    dropped = ~tile_map(kv_num_blocks, kv_indices) & (count > 0)
    wide = _widen(q.to(dtype), keys, scale, None, count.clamp(min=1).to(dtype).log()[:, None])
    rows = max(1, CHUNK_BYTES // (len(k_order) * q.shape[0] * q.shape[1] * dtype.itemsize))
    parts = zip(wide[0].split(rows, 2), tile_of(q_order, q.shape[2]).split(rows), strict=True)
    done = [attention(part, wide[1], values, dropped[:, :, tiles], scale) for part, tiles in parts]
    return torch.cat([out for out, _ in done], 2), torch.cat([lse for _, lse in done], 2)


def _sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    scale: float,
    core: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    B, H, Nq, _ = q.shape
    D = v.shape[-1]
    groups = _groups(kv_num_blocks, kv_indices, q_order, k_order)
    # diffusers keeps [B, N, H, D] in memory and hands out a transposed view, so rows of that memory are gathered without
    # a copy: all heads of a token where all heads share one map, else one head of it.
    heads = H if kv_indices.shape[1] == 1 else 1
    sources = [x.transpose(1, 2).reshape(-1, heads, x.shape[-1]) for x in (q, k, v)]
    out = sources[2].new_zeros(B * Nq * H // heads, heads, D)
    lse = out.new_full(out.shape[:2], float("-inf"), dtype=torch.promote_types(q.dtype, torch.float32))

    row_bytes = 2 * heads * D * k.element_size()
    for queries, keys in _batches(groups, B, H // heads, Nq, k.shape[2], row_bytes):
        index = (queries, keys, keys)
        gathered = [
            x.index_select(0, i.flatten()).unflatten(0, i.shape).transpose(1, 2) for x, i in zip(sources, index, strict=True)
        ]
        o, s = core(*gathered, scale)
        out.index_copy_(0, queries.flatten(), o.transpose(1, 2).flatten(0, 1))
        lse.index_copy_(0, queries.flatten(), s.transpose(1, 2).flatten(0, 1))
    return out.view(B, Nq, H, D).transpose(1, 2), lse.view(B, Nq, H).transpose(1, 2)


Groups = dict[tuple[int, int], list[tuple[Tensor, Tensor]]]
"""For each map (b, h): queries and the keys they all attend to, int64 tokens."""

_known: MutableMapping[Tensor, tuple[int, Groups]] = WeakIdKeyDictionary()
"""Groups of masks that are still alive, by their `kv_indices`: a static mask serves every layer and step of a run."""


def _groups(kv_num_blocks: Tensor, kv_indices: Tensor, q_order: Tensor, k_order: Tensor) -> Groups:
    known = _known.get(kv_indices)
    if known is not None and known[0] == version(kv_indices):
        return known[1]
    kept = tile_map(kv_num_blocks, kv_indices)
    groups: Groups = {}
    for b, h in product(*map(range, kept.shape[:2])):
        lists, group = kept[b, h].unique(dim=0, return_inverse=True)
        pairs = [(q_order[group == i], k_order[tiles]) for i, tiles in enumerate(lists)]
        pairs = [(queries[queries >= 0], keys[keys >= 0]) for queries, keys in pairs]
        groups[b, h] = [pair for pair in pairs if len(pair[1])]  # a query without keys keeps out = 0, lse = -inf
    _known[kv_indices] = version(kv_indices), groups
    return groups


def _batches(groups: Groups, B: int, stride: int, Nq: int, Nk: int, row_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Stacks of equally long (query rows [G, nq], key rows [G, nk]) with at most CHUNK_BYTES of keys and values each.

    A row is one token of a batch element, with all heads of it (stride 1) or one of `stride` heads. Maps with one batch
    element or head serve all of them.
    """
    buckets: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    shared = all(b == 0 for b, _ in groups)
    for (b, h), pairs in groups.items():
        for queries, keys in pairs:
            rows = [((queries + e * Nq) * stride + h, (keys + e * Nk) * stride + h) for e in (range(B) if shared else (b,))]
            buckets[len(queries), len(keys)] += rows
    for (_, n_keys), items in buckets.items():
        stack = max(1, CHUNK_BYTES // (n_keys * row_bytes))
        for start in range(0, len(items), stack):
            queries_of, keys_of = zip(*items[start : start + stack], strict=True)
            yield torch.stack(queries_of), torch.stack(keys_of)
