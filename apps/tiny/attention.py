"""The attention of the embedded model on real clips: for its benchmarks, for `fastdit show policy` and for the page."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

import fastdit
from fastdit import Config, Phase
from fastdit.apps.tiny.codec import Codec
from fastdit.apps.tiny.model import encode_text
from fastdit.apps.tiny.tokenizer import tokenize
from fastdit.apps.tiny.world.render import Renderer
from fastdit.apps.tiny.world.scene import pack, sample
from fastdit.apps.tiny.world.tasks import WORDS
from fastdit.apps.tiny.world.words import caption
from fastdit.core.layout import Grid, Layout
from fastdit.pipelines import embedded
from fastdit.policies import Policy


@dataclass(frozen=True, eq=False)
class Recording(Policy):
    """Keeps every tile, and records q, k and v of every call."""

    calls: list[tuple[Tensor, ...]] = field(default_factory=list)
    name: ClassVar[str] = "recording"
    reads: ClassVar[str] = "qkv"

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        assert q is not None
        assert k is not None
        assert v is not None
        self.calls.append((q.clone(), k.clone(), v.clone()))
        return torch.ones(1, 1, layout.video_tiles, layout.video_tiles, dtype=torch.bool)


def captions(count: int, seed: int) -> list[str]:
    """Captions of random scenes, in their plain wording."""
    rng = random.Random(seed)
    return [caption(sample(rng)) for _ in range(count)]


def clean_latents(pipe: Any, count: int, size: tuple[int, int, int], seed: int = 11) -> tuple[Tensor, Tensor]:
    """Latents of `count` drawn scenes of a size (frames, height, width), and the embeddings of their captions."""
    rng = random.Random(seed)
    asked = [sample(rng) for _ in range(count)]
    codec, renderer = Codec.load(embedded.PATH / "codec.safetensors"), Renderer()
    latents = torch.cat([codec.encode(renderer(pack([scene]), *size)) for scene in asked])
    ids, mask = tokenize(pipe.tokenizer, [caption(scene) for scene in asked], WORDS)
    text = torch.zeros(count, 512, pipe.transformer.config.text_dim)
    states, _ = encode_text(pipe.text_encoder, ids, mask)
    text[:, : states.shape[1]] = states
    return latents, text


def add_noise(latents: Tensor, text: Tensor, sigma: float, seed: int) -> tuple[Tensor, ...]:
    """The denoiser's inputs at a noise level."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    return torch.lerp(latents, noise, sigma), torch.full((len(latents),), sigma * 1000), text


def recorded_attention(pipe: Any, inputs: tuple[Tensor, ...], tile: Grid) -> list[tuple[Tensor, ...]]:
    """q, k and v [B, H, tiles, tokens, D] of every layer in a dense call."""
    seen = Recording()
    velocity_under(pipe, Config((Phase(policy=seen),), tile, min_tokens=0, max_density=1), inputs)
    return seen.calls


def velocity_under(pipe: Any, config: Config, inputs: tuple[Tensor, ...]) -> tuple[Tensor, float]:
    """The denoiser's velocity under a configuration, and the density that was reached."""
    with fastdit.accelerate(pipe.transformer, config):
        return pipe.transformer(*inputs, return_dict=False)[0], fastdit.report(pipe.transformer).density
