"""Attention of a sequence that diffusers' `enable_parallelism` has split over processes.

Ulysses (arXiv 2309.14509) exchanges heads for tokens: each process gets the whole sequence of some heads, and attention is
computed as usual. A ring (arXiv 2310.01889) keeps the queries in place and moves the keys: each process computes its own
queries over all keys, with the tile map's rows of its queries. diffusers' ring gathers every key before it begins, so one call
over all of them needs no more memory than merging the pieces by their LSE, and gives the same sum.

Text and picture are split separately, so the gathered sequence is text₀, picture₀, text₁, picture₁, …; it is reordered here.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.attention_dispatch import _templated_context_parallel_attention
from torch import Tensor

from fastdit.attach import diffusers_hooks
from fastdit.attach.handle import Denoiser
from fastdit.attach.site_op import attend
from fastdit.core.byte_cache import byte_cache
from fastdit.planning.adapter import REST


def refusal(denoiser: Denoiser, config: Any, mask: Tensor | None) -> str | None:
    """Why this attention is left to diffusers; None if fastdit computes it."""
    parallel = config.context_parallel_config
    if parallel.ring_degree > 1 and parallel.ulysses_degree > 1:
        return "split over processes by ring and Ulysses at once: use one of them"
    if parallel.ring_degree > 1 and mask is not None:
        return "split over processes by a ring, with a mask: use Ulysses"
    facts = getattr(denoiser.call, "facts", None)
    if facts is not None and (facts.before or facts.after) and not _splits_text(denoiser, config):
        return "split over processes with text and picture in one piece"
    return None


def _splits_text(denoiser: Denoiser, config: Any) -> bool:
    """`diffusers_hooks.splits_text`, cached for each configuration of `enable_parallelism`, because it walks the model."""
    if torch.compiler.is_compiling():  # a cached value on the denoiser would be a guard of the graph
        return diffusers_hooks.splits_text(denoiser.model())
    if denoiser.text_split is None or denoiser.text_split[0] is not config:
        denoiser.text_split = config, diffusers_hooks.splits_text(denoiser.model())
    return denoiser.text_split[1]


def attention(
    denoiser: Denoiser,
    layer: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    backend: str,
    config: Any,
) -> Tensor:
    """q, k, v [B, n, H, D] of this process's tokens -> out, shaped like q. A collective: every process must call it."""
    parallel = config.context_parallel_config
    if parallel.ulysses_degree == 1:
        group = parallel._ring_mesh.get_group()
        sizes = _sizes(q, group) if getattr(parallel, "ring_anything", False) else None
        k, v = (_gather(x, sizes, group) for x in (k, v))
        start = dist.get_rank(group) * q.shape[1] if sizes is None else sum(sizes[: dist.get_rank(group)])
        token, order = tokens(denoiser, k.shape[1], parallel.ring_degree, k.device)
        at = _own(token, start, q.shape[1], q.device)
        return attend(denoiser.call.token, layer, q, _taken(k, order), _taken(v, order), None, scale, backend, at)

    def whole(_: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        token, order = tokens(denoiser, q.shape[1], parallel.ulysses_degree, q.device)
        if mask is not None and order is not None:
            mask = mask[..., order] if mask.shape[-2] == 1 else mask[..., order, :][..., order]
        query, key, value = (_taken(x, order) for x in (q, k, v))
        return _taken(attend(denoiser.call.token, layer, query, key, value, mask, scale, backend), token)

    return _templated_context_parallel_attention(
        q, k, v, mask, 0.0, False, scale, False, False, forward_op=whole, backward_op=None, _parallel_config=config
    )


def tokens(denoiser: Denoiser, length: int, ranks: int, device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """int64 [length] each: the sequence's token at each position of the gathered sequence, and the position of each token.
    (None, None) without text, where the order is the same."""
    facts = getattr(denoiser.call, "facts", None)
    if facts is None or facts.before == facts.after == 0:
        return None, None
    video = 0 if isinstance(facts.grid, Tensor) else math.prod(facts.grid)
    first = facts.before or video
    if first == REST:
        first = length - video
    return _interleaved(first, length - first, ranks, device)


@byte_cache(16 << 20)
def _interleaved(first: int, second: int, ranks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    both = torch.arange(first + second, device=device)
    pieces = (both[:first].tensor_split(ranks), both[first:].tensor_split(ranks))
    token = torch.cat(list(chain.from_iterable(zip(*pieces, strict=True))))
    return token, token.argsort()


def _taken(x: Tensor, order: Tensor | None) -> Tensor:
    """x [B, N, …] with its tokens in this order; x itself for None."""
    return x if order is None else x[:, order]


@lru_cache(maxsize=64)
def _own(token: Tensor | None, start: int, count: int, device: torch.device) -> Tensor:
    """int64 [count]: tokens at positions [start, start + count) of the gathered sequence. Cached: one tensor for all calls."""
    return torch.arange(start, start + count, device=device) if token is None else token[start : start + count]


def _sizes(x: Tensor, group: Any) -> list[int]:
    """The number of tokens n of x [B, n, H, D] in each process."""
    mine = torch.tensor([x.shape[1]], device=x.device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, mine, group=group)
    return [int(each) for each in found]


def _gather(x: Tensor, sizes: list[int] | None, group: Any) -> Tensor:
    """Concatenate the [B, n, H, D] of all processes: [B, N, H, D]. sizes: None if all have the same n."""
    most = x.shape[1] if sizes is None else max(sizes)
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, most - x.shape[1])).contiguous()
    found = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, padded, group=group)
    return torch.cat(found if sizes is None else [each[:, :size] for each, size in zip(found, sizes, strict=True)], 1)
