"""A pattern written down twice, by tiles and by tokens: what sparse models are held against is stock attention with a mask."""

import contextlib
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from fastdit import Config, Phase
from fastdit.policies import Policy

TILE = (1, 4, 4)


@dataclass(frozen=True)
class Chequer(Policy):
    """Tiles whose coordinates together are even: easy to write down for tokens as well."""

    name: ClassVar[str] = "chequer"
    reads: ClassVar[str] = ""

    def select(self, layout, q=None, k=None, v=None):
        at = torch.cartesian_prod(*(torch.arange(n) for n in layout.tile_grid)).sum(-1)
        return ((at[:, None] + at) % 2 == 0)[None, None]


SPARSE = Config((Phase(policy=Chequer()),), TILE, min_tokens=0, max_density=1)


def token_mask(grid, before, after):
    """The same by tokens: written without `Layout`."""
    t, h, w = torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij")
    at = torch.stack([t // TILE[0], h // min(TILE[1], grid[1]), w // min(TILE[2], grid[2])], -1).flatten(0, 2)
    video = ((at.sum(-1)[:, None] + at.sum(-1)) % 2 == 0) | (at[:, None] == at).all(-1)
    n = len(at)
    kept = torch.ones(before + n + after, before + n + after, dtype=torch.bool)
    kept[before : before + n, before : before + n] = video
    return kept


@contextlib.contextmanager
def masked(case, seen=None):
    """Stock attention with the token mask added to every self-attention of a known length."""
    stock = F.scaled_dot_product_attention

    def core(query, key, value, attn_mask=None, *args, **kwargs):
        q, k, v = query, key, value
        if q.shape[-2] == k.shape[-2] and q.shape[-2] in case.places:
            if seen is not None:
                seen.append(k)
            kept = token_mask(*case.places[q.shape[-2]])
            if attn_mask is None:
                attn_mask = kept
            else:
                attn_mask = attn_mask & kept if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~kept, float("-inf"))
        return stock(q, k, v, attn_mask, *args, **kwargs)

    F.scaled_dot_product_attention = core
    try:
        yield
    finally:
        F.scaled_dot_product_attention = stock
