"""What is trained: batches of captioned clips, and the two losses, transformer on latents and autoencoder on pixels.

Everything about a step, its size, clips, captions and noise, follows from the seed and the step's number, so that a
resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fastdit.apps.tiny import clips
from fastdit.apps.tiny.codec import Codec, make_vae, vae_loss
from fastdit.apps.tiny.model import (
    block_forward,
    encode_text,
    forward,
    make_text_encoder,
    make_transformer,
    rotary,
    tokenize,
)
from fastdit.apps.tiny.words import caption

Size = tuple[int, int, int]
Batch = tuple[Size, Tensor, Tensor, Tensor]


def parse_sizes(text: str) -> list[tuple[Size, float]]:
    """ "17x64x64:2,33x96x96:1" -> [((17, 64, 64), 2.0), …]: frames × height × width and its share of the tokens."""
    sizes = []
    for item in text.split(","):
        try:
            shape, weight = item.split(":")
            f, h, w = (int(n) for n in shape.split("x"))
            sizes.append(((f, h, w), float(weight)))
        except ValueError:
            raise SystemExit(f"error: sizes: {item!r} is not FRAMESxHEIGHTxWIDTH:SHARE, such as 17x64x64:2") from None
        if f % 4 != 1 or h % 16 or w % 16:
            raise SystemExit(f"error: sizes: {item!r}: frames must be 4k+1, height and width multiples of 16")
    return sizes


def tokens(size: Size) -> int:
    """Of one clip: a token is 4 frames × 8 × 8 pixels."""
    return (size[0] + 3) // 4 * (size[1] // 8) * (size[2] // 8)


class Batches(IterableDataset):
    """Endless batches of about `budget` tokens: (size, packed clips [B, 3, 9], token ids [B, L], mask [B, L])."""

    def __init__(
        self,
        sizes: list[tuple[Size, float]],
        budget: int,
        tokenizer: Any,
        seed: int = 0,
        start: int = 0,
        drop: float = 0.1,
        two: float = 0.27,
    ) -> None:
        self.sizes, self.budget, self.tokenizer = sizes, budget, tokenizer
        self.seed, self.start, self.drop, self.two = seed, start, drop, two

    def clips(self, step: int) -> tuple[Size, list[clips.Clip], list[str]]:
        """Size, clips and captions of one step; a share `drop` of the captions is empty, for guidance."""
        rng = random.Random(f"{self.seed}/{step}")
        size = rng.choices([s for s, _ in self.sizes], [w for _, w in self.sizes])[0]
        batch = [clips.sample(rng, two=self.two) for _ in range(max(1, round(self.budget / tokens(size))))]
        return size, batch, ["" if rng.random() < self.drop else caption(c, rng) for c in batch]

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        step, stride = (self.start, 1) if info is None else (self.start + info.id, info.num_workers)
        while True:
            size, batch, words = self.clips(step)
            yield size, clips.pack(batch), *tokenize(self.tokenizer, words)
            step += stride


class DitTask:
    """The transformer and the text encoder, on the codec's latents.

    At noise level s the model sees (1 - s) · latents + s · noise at timestep 1000 s and learns noise - latents. s is
    logit-normal and shifted by `shift` · max(1, tokens / 1296)^`growth`: the more tokens show one thing, the more
    noise it takes to hide it.
    """

    name, drop = "dit", 0.1

    def __init__(self, args: argparse.Namespace, codec: Codec, vocab: int, device: torch.device) -> None:
        self.codec, self.device = codec, device
        self.dtype = torch.float32 if args.fp32 else torch.bfloat16
        dit = make_transformer(len(codec.scale), args.heads, args.layers, args.ffn, seed=args.seed).to(device)
        self.models = {"transformer": dit, "text_encoder": make_text_encoder(vocab, seed=args.seed).to(device)}
        self.block = torch.compile(block_forward, dynamic=True) if args.compile else block_forward
        self.shift, self.growth = args.shift, args.growth

    def matrices(self) -> list[Tensor]:
        """The parameters for Muon."""
        return [p for p in self.models["transformer"].blocks.parameters() if p.ndim == 2]

    def loss(
        self, step: int, size: Size, rows: Tensor, ids: Tensor, mask: Tensor, gen: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(loss, mean square error)"""
        x = self.codec.encode(clips.render(rows, *size))
        noise = torch.randn(x.shape, generator=gen, device=x.device)
        s = torch.sigmoid(torch.randn(len(x), generator=gen, device=x.device))
        shift = self.shift * max(1.0, tokens(size) / 1296) ** self.growth
        s = shift * s / (1 + (shift - 1) * s)
        text, bias = encode_text(self.models["text_encoder"], ids, mask)
        dit = self.models["transformer"]
        mix = torch.lerp(x, noise, s.view(-1, 1, 1, 1, 1))
        v = forward(dit, mix, s * 1000, text, bias, rotary(dit, x), self.dtype, self.block)
        loss = (v - (noise - x)).square().mean()
        return loss, loss.detach()


class VaeTask:
    """The autoencoder: its encoder learns the codec's latents, its decoder the clip from noisy ones of these."""

    name, drop = "vae", 1.0

    def __init__(self, args: argparse.Namespace, codec: Codec, device: torch.device) -> None:
        self.codec, self.device = codec, device
        torch.manual_seed(args.seed)
        self.models = {"vae": make_vae(len(codec.scale)).to(device)}
        # not on the CPU: there the backward of a bfloat16 convolution corrupts memory (torch 2.13)
        bf16 = device.type == "cuda" and not args.fp32
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    def matrices(self) -> list[Tensor]:
        vae = self.models["vae"]
        ends = {id(vae.encoder.conv_in.weight), id(vae.decoder.conv_out.weight)}
        return [p for n, p in vae.named_parameters() if p.ndim >= 4 and "gamma" not in n and id(p) not in ends]

    def loss(
        self, step: int, size: Size, rows: Tensor, ids: Tensor, mask: Tensor, gen: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(loss, mean square error of the decoded clips); the encoder, the easier half, is trained every third step."""
        video = clips.render(rows, *size)
        shape = (len(video), len(self.codec.scale), (size[0] + 3) // 4, size[1] // 8, size[2] // 8)
        level = 0.12 * torch.rand((len(video), 1, 1, 1, 1), generator=gen, device=video.device).square()
        noise = level * torch.randn(shape, generator=gen, device=video.device)
        with self.autocast:
            return vae_loss(self.models["vae"], self.codec, video, noise, encoder=step % 3 == 0)


Task = DitTask | VaeTask


def load_weights(task: Task, folder: Path) -> None:
    """Weights of the pipeline saved in `folder` into the task's models."""
    from safetensors.torch import load_file

    for name, model in task.models.items():
        files = sorted((folder / name).glob("*.safetensors"))
        if not files:
            raise SystemExit(f"error: --init: no weights in {folder / name}")
        weights = {k: t.float() for k, t in load_file(files[0]).items()}
        try:
            missing, unexpected = model.load_state_dict(weights, strict=False)
        except RuntimeError as err:
            raise SystemExit(f"error: --init: {files[0]} has other shapes than asked for: {err}") from None
        if unexpected or any("embed_tokens" not in k for k in missing):
            raise SystemExit(f"error: --init: {files[0]} lacks {missing} or has too much: {unexpected}")
