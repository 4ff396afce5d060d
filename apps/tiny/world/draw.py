"""Draw clips with a checkpoint in training, many at a time on a GPU, without a pipeline: for judging and for looking.

`python -m fastdit.apps.tiny.world.draw FOLDER/NAME --base DIR --out sheet.png` draws `PROMPTS` (or `--prompts FILE`) from a
light checkpoint; DIR holds the codec and the tokenizer. The levels of noise are those of `sigmas`, without the tiny last
step of the stock Euler scheduler.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit.apps.tiny.codec import Codec, make_vae
from fastdit.apps.tiny.model import encode_text, forward, make_text_encoder, make_transformer, rotary
from fastdit.apps.tiny.sheet import sheet
from fastdit.apps.tiny.sizes import Size
from fastdit.apps.tiny.tokenizer import tokenize
from fastdit.apps.tiny.world import latents, store
from fastdit.apps.tiny.world.tasks import WORDS, shifted

PROMPTS = (
    "a red ball moving right",
    "a blue cube spinning on a checkered floor",
    "a green cone standing still on a striped floor before a wall",
    "a yellow ring moving left on a checkered floor before a wall",
    "a large purple ball bouncing on a checkered floor",
    "an orange cylinder moving diagonally on a striped floor",
    "a pink ring spinning before a wall",
    "a small cyan ball moving towards the camera on a checkered floor",
    "a red cube and a blue ball both moving right on a checkered floor",
    "a green ball bouncing and a purple cone standing still before a wall",
    "a yellow cube, a blue ring and a red cone standing still on a striped floor",
    "a large orange ball standing still on a checkered floor, the camera circling",
)


def build(state: dict[str, dict[str, Tensor]], vocab: int) -> dict[str, Any]:
    """Transformer and text encoder of a checkpoint's weights, their shapes read off them."""
    dit, text = state["transformer"], state["text_encoder"]

    def layers(weights: dict[str, Tensor], prefix: str) -> int:
        return 1 + max(int(k.removeprefix(prefix).split(".")[0]) for k in weights if k.startswith(prefix))

    dim, channels = dit["patch_embedding.weight"].shape[:2]
    text_dim = text["shared.weight"].shape[1]
    ffn = dit["blocks.0.ffn.net.0.proj.weight"].shape[0]
    models = {
        "transformer": make_transformer(channels, dim // 64, layers(dit, "blocks."), ffn, text_dim),
        "text_encoder": make_text_encoder(vocab, text_dim, layers(text, "encoder.block.")),
    }
    for name, model in models.items():
        model.load_state_dict(state[name])
    return models


def sigmas(steps: int, shift: float) -> Tensor:
    """Noise levels [steps + 1] from 1 to 0."""
    return shifted(1 - torch.arange(steps + 1) / steps, shift)


class Painter:
    """A checkpoint ready to draw: `latents` for captions, `decode` to clips, by the autoencoder if there is one."""

    def __init__(self, models: dict[str, Any], codec: Codec, tokenizer: Any, device: torch.device, vae: Any = None) -> None:
        self.models = {k: m.to(device).eval() for k, m in models.items()}
        self.codec, self.tokenizer, self.device = codec.to(device), tokenizer, device
        self.vae = None if vae is None else vae.to(device).eval()
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    @torch.no_grad()
    def latents(self, captions: Sequence[str], size: Size, steps: int, guidance: float, shift: float, seed: int = 0) -> Tensor:
        """[B, C, f, h, w]; clip i starts from noise of seed `seed` + i. Guidance 1 takes one forward a step."""
        shape = (len(self.codec.scale), (size[0] + 3) // 4, size[1] // 8, size[2] // 8)
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(captions))])
        x = x.to(self.device)
        asked = list(captions) + ([""] * len(captions) if guidance != 1 else [])
        ids, mask = (t.to(self.device) for t in tokenize(self.tokenizer, asked, WORDS))
        text, bias = encode_text(self.models["text_encoder"], ids, mask)
        dit = self.models["transformer"]
        rope, levels = rotary(dit, x), sigmas(steps, shift).tolist()
        for i in range(steps):
            both = x if guidance == 1 else x.repeat(2, 1, 1, 1, 1)
            t = torch.full((len(both),), levels[i] * 1000, device=self.device)
            v = forward(dit, both, t, text, bias, rope, self.dtype)
            if guidance != 1:
                told, untold = v.chunk(2)
                v = untold + guidance * (told - untold)
            x = x + (levels[i + 1] - levels[i]) * v
        return x

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """[B, 3, F, H, W] in [-1, 1]"""
        if self.vae is None:
            return self.codec.decode(z).clamp(-1, 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return torch.cat([self.vae.decode(one[None]).sample for one in z]).float()

    def clips(self, captions: Sequence[str], size: Size, batch: int = 8, **how: Any) -> Tensor:
        """As `latents`, decoded, `batch` at a time; clips on the CPU."""
        seed, done = how.pop("seed", 0), []
        for i in range(0, len(captions), batch):
            done.append(self.decode(self.latents(captions[i : i + batch], size, seed=seed + i, **how)).cpu())
        return torch.cat(done)


def load(checkpoint: Path, base: Path, device: torch.device, vae: Path | None = None) -> Painter:
    """A painter from light checkpoints FOLDER/NAME."""
    codec, tokenizer = latents.prepare(base)
    models = build(store.read_light(checkpoint.parent, checkpoint.name)["ema"], len(tokenizer))
    return Painter(models, codec, tokenizer, device, load_vae(vae, codec) if vae else None)


def load_vae(checkpoint: Path, codec: Codec) -> Any:
    net = make_vae(len(codec.scale))
    net.load_state_dict(store.read_light(checkpoint.parent, checkpoint.name)["ema"]["vae"])
    return net


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="fastdit.apps.tiny.world.draw", description=__doc__.splitlines()[0])
    add = ap.add_argument
    add("checkpoint", type=Path, help="FOLDER/NAME of a light checkpoint")
    add("--base", type=Path, required=True, help="folder of the codec and the tokenizer")
    add("--vae", type=Path, help="FOLDER/NAME of the autoencoder's; the linear codec decodes without")
    add("--out", type=Path, required=True, help="PNG to write")
    add("--size", default="33x256x256", help="FRAMESxHEIGHTxWIDTH")
    add("--steps", type=int, default=30)
    add("--guidance", type=float, default=3.0)
    add("--shift", type=float, default=5.0)
    add("--seed", type=int, default=0)
    add("--prompts", type=Path, help="a file with one a line")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = ap.parse_args(argv)
    prompts = args.prompts.read_text().splitlines() if args.prompts else PROMPTS
    frames, height, width = (int(n) for n in args.size.split("x"))
    painter = load(args.checkpoint, args.base, torch.device(args.device), args.vae)
    how = {"steps": args.steps, "guidance": args.guidance, "shift": args.shift, "seed": args.seed}
    sheet(list(painter.clips(prompts, (frames, height, width), 4, **how)), args.out, columns=2, shots=4)


if __name__ == "__main__":
    main()
