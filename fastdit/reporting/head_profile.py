"""Measure once how much of each head's attention a static pattern retains, and choose a pattern per head.

The mass of a query that a pattern retains is exp(LSE_pattern − LSE_full), called ρ in Re-ttention (arXiv 2505.22918 §3.2). It
replaces the squared error of Sliding Tile Attention's search over windows (arXiv 2502.04507 §3.3) and needs no values V. The
specialisation of heads hardly depends on the prompt, so a few prompts are enough.

    config, seen = profile.watching(layers=30, tile=(1, 8, 8))
    with fastdit.accelerate(pipe, config):  # dense, and slow: exact masses are computed in every call
        pipe(prompt, num_inference_steps=5)
    config = profile.choose(seen, [Window(density=0.125), Radial(density=0.125)])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdit.config import Config, Phase
from fastdit.core.layout import Grid, Layout
from fastdit.policies import HeadProfile, Policy

LOGITS_BYTES = 64 << 20


@dataclass(eq=False)
class Seen:
    """True mass of each tile pair by layer, [1, heads, tiles, tiles], summed over `calls` calls of one layout."""

    layout: Layout | None = None
    mass: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)

    def add(self, layer: int, layout: Layout, q: Tensor, k: Tensor) -> None:
        """q and k: video tokens in tile order, [B, H, tiles, tokens, D]. Raises ValueError for a second layout."""
        if self.layout not in (None, layout):
            raise ValueError(f"a profile is for one size: it was measured on {self.layout}, this call has {layout}")
        self.layout = layout
        mass = tile_mass(q, k, layout).mean(0, keepdim=True).cpu()
        self.mass[layer] = self.mass[layer] + mass if layer in self.mass else mass
        self.calls[layer] = self.calls.get(layer, 0) + 1


@dataclass(frozen=True, eq=False)
class _Watch(Policy):
    """Keeps every tile, and records the tile masses of one layer."""

    seen: Seen
    layer: int
    name: ClassVar[str] = "watch"

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        assert q is not None
        assert k is not None
        self.seen.add(self.layer, layout, q, k)
        return torch.ones(1, 1, layout.video_tiles, layout.video_tiles, dtype=torch.bool, device=q.device)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "layer": self.layer}


def watching(layers: int, tile: Grid) -> tuple[Config, Seen]:
    """A configuration that computes densely and fills `Seen`, for a denoiser with this many self-attention layers."""
    seen = Seen()
    phases = [Phase(policy=_Watch(seen, layer), layers=(layer, layer + 1)) for layer in range(layers)]
    return Config(tuple(phases), tile, min_tokens=0, max_density=1), seen


def tile_mass(q: Tensor, k: Tensor, layout: Layout) -> Tensor:
    """Softmax attention summed over key tiles and averaged over the queries of a tile: [B, H, tiles, tiles], rows sum to 1.

    q and k: [B, H, tiles, tokens, D] in tile order. Computed exactly, a few query tiles at a time: O(N²) time, not memory.
    """
    real = (layout.order(q.device)[: layout.video_tiles] >= 0).flatten()
    keys = k.flatten(2, 3).float()
    hidden = torch.zeros(len(real), dtype=torch.float32, device=q.device).masked_fill(~real, float("-inf"))
    step = max(1, LOGITS_BYTES // (4 * keys.shape[0] * keys.shape[1] * len(real) * layout.tile_tokens))
    rows = []
    for part, live in zip(q.split(step, 2), real.view(-1, layout.tile_tokens).split(step), strict=True):
        logits = (part.flatten(2, 3).float() @ keys.mT) * q.shape[-1] ** -0.5 + hidden
        mass = logits.softmax(-1).unflatten(-1, (-1, layout.tile_tokens)).sum(-1).unflatten(2, (-1, layout.tile_tokens))
        rows.append((mass * live[..., None]).sum(3) / live.sum(1)[:, None])
    return torch.cat(rows, 2)


def retained(mass: Tensor, kept: Tensor, layout: Layout) -> Tensor:
    """Share of attention in the kept tiles, mean over queries: mass and kept [b, h, tiles, tiles] -> [b, h] in [0, 1]."""
    counts = layout.counts(mass.device)[: layout.video_tiles]
    return ((mass * kept).sum(-1) * counts).sum(-1) / counts.sum()


def choose(seen: Seen, policies: Sequence[Policy]) -> Config:
    """The configuration that uses, in each head of each layer, the policy that retains most mass; one phase per layer.

    policies: static, of about equal density. Raises ValueError if nothing was measured or a policy is dynamic.
    """
    if seen.layout is None:
        raise ValueError("nothing was seen: accelerate a pipeline with the configuration of `watching`, and run it")
    if any(not policy.static for policy in policies):
        raise ValueError("a profile chooses among static policies: dynamic ones adapt to each head in every call anyway")
    maps = [policy.select(seen.layout) for policy in policies]
    phases = []
    for layer, total in sorted(seen.mass.items()):
        mass = total / seen.calls[layer]
        best = torch.stack([retained(mass, kept, seen.layout)[0] for kept in maps]).argmax(0)
        profile = HeadProfile(tuple(policies), tuple(best.tolist()), seen.layout.grid)
        phases.append(Phase(policy=profile, layers=(layer, layer + 1)))
    return Config(tuple(phases), seen.layout.tile, min_tokens=0)
