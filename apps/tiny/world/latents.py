"""The linear codec and the tokenizer of the world: both are fixed before anything is trained, from random scenes.

`python -m fastdit.apps.tiny.world.latents DIR` writes codec.safetensors and tokenizer/ to DIR.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit.apps.tiny.codec import CHANNELS, Codec, to_blocks
from fastdit.apps.tiny.tokenizer import load_tokenizer, make_tokenizer, save_tokenizer
from fastdit.apps.tiny.world.render import Renderer
from fastdit.apps.tiny.world.scene import pack, sample
from fastdit.apps.tiny.world.words import caption

FITTED = ((128, 17, 40), (256, 9, 30), (64, 17, 20))  # side, frames, clips


def fit(channels: int = CHANNELS, seed: int = 0, fitted: tuple[tuple[int, int, int], ...] = FITTED) -> Codec:
    """Principal components of blocks of random scenes, drawn in proportion to what they show beyond one flat colour."""
    rng, gen, renderer = random.Random(seed), torch.Generator().manual_seed(seed), Renderer()

    def blocks(side: int, frames: int) -> Tensor:
        return to_blocks(renderer(pack([sample(rng)]), frames, side, side)).flatten(0, 3)

    rows = []
    for side, frames, clips in fitted:
        for _ in range(clips):
            b = blocks(side, frames)
            detail = b.view(len(b), 3, -1).std(-1).sum(1) + 0.01
            rows.append(b[torch.multinomial(detail, len(b) // 4, generator=gen)])
    return Codec.of_blocks(torch.cat(rows), torch.cat([blocks(128, 9) for _ in range(fitted[0][2])]), channels)


def prepare(folder: Path) -> tuple[Codec, Any]:
    """The codec and tokenizer in `folder`, made there at first."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer").exists():
        rng = random.Random(0)
        save_tokenizer(make_tokenizer([caption(sample(rng), rng) for _ in range(20000)]), folder / "tokenizer")
    if not (folder / "codec.safetensors").exists():
        fit().save(folder / "codec.safetensors")
    return Codec.load(folder / "codec.safetensors"), load_tokenizer(folder / "tokenizer")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
