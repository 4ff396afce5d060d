"""What is trained on the world: the transformer on latents, the same in fewer steps, and the autoencoder on pixels.

A step's size, scenes, captions and noise follow from the seed, the step's number and the process's rank, so that a
resumed run repeats an uninterrupted one and processes never see the same clip. All processes draw the same size.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from fastdit.apps.tiny.codec import Codec, make_vae, vae_loss
from fastdit.apps.tiny.model import block_forward, encode_text, forward, make_text_encoder, make_transformer, rotary
from fastdit.apps.tiny.sizes import Size, tokens
from fastdit.apps.tiny.tokenizer import tokenize
from fastdit.apps.tiny.world.render import Renderer
from fastdit.apps.tiny.world.scene import pack, sample
from fastdit.apps.tiny.world.words import caption

WORDS = 48  # tokens of a caption in training
TEXT_DIM, TEXT_LAYERS = 192, 3
Batch = tuple[Size, Tensor, Tensor, Tensor]


class Batches(IterableDataset):
    """Endless batches of about `budget` tokens: (size, packed scenes [B, 4, 13], token ids [B, L], mask [B, L])."""

    def __init__(
        self,
        sizes: list[tuple[Size, float]],
        budget: int,
        tokenizer: Any,
        seed: int,
        start: int,
        drop: float,
        rank: int = 0,
        several: float = 0.42,
    ) -> None:
        self.sizes, self.budget, self.tokenizer = sizes, budget, tokenizer
        self.seed, self.start, self.drop, self.rank, self.several = seed, start, drop, rank, several

    def batch(self, step: int) -> Batch:
        """A share `drop` of the captions is empty, for guidance."""
        rng = random.Random(f"{self.seed}/{step}")
        size = rng.choices([s for s, _ in self.sizes], [w for _, w in self.sizes])[0]
        rng = random.Random(f"{self.seed}/{step}/{self.rank}")
        scenes = [sample(rng, several=self.several) for _ in range(max(2, round(self.budget / tokens(size))))]
        words = ["" if rng.random() < self.drop else caption(s, rng) for s in scenes]
        return size, pack(scenes), *tokenize(self.tokenizer, words, WORDS)

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        step, stride = (self.start, 1) if info is None else (self.start + info.id, info.num_workers)
        while True:
            yield self.batch(step)
            step += stride


def shifted(s: Tensor, shift: float) -> Tensor:
    """Noise levels in [0, 1] moved towards 1."""
    return shift * s / (1 + (shift - 1) * s)


class DitTask:
    """The transformer and its text encoder: at noise level s, see (1 - s) · latents + s · noise, tell noise - latents.

    s is logit-normal, shifted by `shift` · max(1, tokens / 1296)^`growth`: the more tokens show one thing, the more
    noise it takes to hide it.
    """

    name, drop = "dit", 0.1

    def __init__(self, args: argparse.Namespace, codec: Codec, vocab: int, device: torch.device) -> None:
        self.codec, self.device, self.args = codec, device, args
        self.dtype = torch.float32 if args.fp32 else torch.bfloat16
        self.renderer = Renderer(device)
        self.models = self.build(vocab)
        self.block = torch.compile(block_forward, dynamic=True) if args.compile else block_forward

    def build(self, vocab: int) -> dict[str, Any]:
        a = self.args
        dit = make_transformer(len(self.codec.scale), a.heads, a.layers, a.ffn, TEXT_DIM, a.seed)
        return {
            "transformer": dit.to(self.device),
            "text_encoder": make_text_encoder(vocab, TEXT_DIM, TEXT_LAYERS, a.seed).to(self.device),
        }

    def matrices(self) -> list[Tensor]:
        """The parameters for Muon."""
        return [p for p in self.models["transformer"].blocks.parameters() if p.ndim == 2]

    def velocity(self, models: dict[str, Any], x: Tensor, s: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """Of latents x at noise levels s [B], under the captions."""
        text, bias = encode_text(models["text_encoder"], ids, mask)
        dit = models["transformer"]
        return forward(dit, x, s * 1000, text, bias, rotary(dit, x), self.dtype, self.block)

    def loss(
        self, step: int, size: Size, rows: Tensor, ids: Tensor, mask: Tensor, gen: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(loss, mean square error)"""
        x = self.codec.encode(self.renderer(rows, *size))
        noise = torch.randn(x.shape, generator=gen, device=x.device)
        s = torch.sigmoid(torch.randn(len(x), generator=gen, device=x.device))
        s = shifted(s, self.args.shift * max(1.0, tokens(size) / 1296) ** self.args.growth)
        v = self.velocity(self.models, torch.lerp(x, noise, s.view(-1, 1, 1, 1, 1)), s, ids, mask)
        loss = (v - (noise - x)).square().mean()
        return loss, loss.detach()


class FewTask(DitTask):
    """The same model in `few` steps, guidance folded in (after Salimans & Ho 2022, arXiv 2202.00512, and Meng et al. 2022,
    arXiv 2210.03142): from each of its noise levels the student must go in one step where the frozen teacher goes in
    `parts` guided ones. The target is the straight line between the two ends, so the student stays a velocity model and
    the stock scheduler draws with it. The student begins as the teacher.
    """

    name, drop = "few", 0.0

    def __init__(self, args: argparse.Namespace, codec: Codec, vocab: int, device: torch.device) -> None:
        super().__init__(args, codec, vocab, device)
        self.teacher = self.build(vocab)
        for model in self.teacher.values():
            model.requires_grad_(False)

    def guided(self, x: Tensor, s: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """The teacher's velocity at guidance `args.guidance`."""
        empty, none = torch.zeros_like(ids), torch.zeros_like(mask)
        empty[:, 0], none[:, 0] = 1, 1  # `</s>` alone: the empty prompt
        ids, mask = torch.cat([ids, empty]), torch.cat([mask, none])
        both = self.velocity(self.teacher, x.repeat(2, 1, 1, 1, 1), s.repeat(2), ids, mask)
        told, untold = both.chunk(2)
        return untold + self.args.guidance * (told - untold)

    def loss(
        self, step: int, size: Size, rows: Tensor, ids: Tensor, mask: Tensor, gen: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        n, parts, shift = self.args.few, self.args.parts, self.args.few_shift
        with torch.no_grad():
            x0 = self.codec.encode(self.renderer(rows, *size))
            noise = torch.randn(x0.shape, generator=gen, device=x0.device)
            i = torch.randint(n, (len(x0),), generator=gen, device=x0.device)
            levels = [shifted(1 - (i + j / parts) / n, shift) for j in range(parts + 1)]
            first = levels[0].view(-1, 1, 1, 1, 1)
            start = torch.lerp(x0, noise, first)
            x = start
            for s, less in itertools.pairwise(levels):
                x = x + (less - s).view(-1, 1, 1, 1, 1) * self.guided(x, s, ids, mask)
            target = (x - start) / (levels[-1].view(-1, 1, 1, 1, 1) - first)
        loss = F.mse_loss(self.velocity(self.models, start, levels[0], ids, mask), target)
        return loss, loss.detach()


class VaeTask:
    """The autoencoder: its encoder learns the codec's latents, its decoder the clip from noisy ones of these."""

    name, drop = "vae", 1.0

    def __init__(self, args: argparse.Namespace, codec: Codec, vocab: int, device: torch.device) -> None:
        self.codec, self.device = codec, device
        torch.manual_seed(args.seed)
        self.renderer = Renderer(device)
        self.models = {"vae": make_vae(len(codec.scale)).to(device)}
        # not on the CPU: there the backward of a bfloat16 convolution corrupts memory (torch 2.13)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and not args.fp32)

    def matrices(self) -> list[Tensor]:
        vae = self.models["vae"]
        ends = {id(vae.encoder.conv_in.weight), id(vae.decoder.conv_out.weight)}
        return [p for n, p in vae.named_parameters() if p.ndim >= 4 and "gamma" not in n and id(p) not in ends]

    def loss(
        self, step: int, size: Size, rows: Tensor, ids: Tensor, mask: Tensor, gen: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """(loss, mean square error of the decoded clips); the encoder, the easier half, is trained every third step."""
        video = self.renderer(rows, *size)
        shape = (len(video), len(self.codec.scale), (size[0] + 3) // 4, size[1] // 8, size[2] // 8)
        level = 0.12 * torch.rand((len(video), 1, 1, 1, 1), generator=gen, device=video.device).square()
        noise = level * torch.randn(shape, generator=gen, device=video.device)
        with self.autocast:
            return vae_loss(self.models["vae"], self.codec, video, noise, encoder=step % 3 == 0)


Task = DitTask | VaeTask
TASKS: dict[str, type[DitTask] | type[VaeTask]] = {"dit": DitTask, "few": FewTask, "vae": VaeTask}
