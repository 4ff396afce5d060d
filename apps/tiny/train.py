"""Train the tiny pipeline: `python -m fastdit.apps.tiny.train --out DIR --minutes M`.

One command for everything: it makes the codec and the tokenizer, trains the autoencoder for a part of the time and the
transformer with its text encoder for the rest, checkpoints every minute, and writes a `WanPipeline` to DIR/pipeline.
Started again on the same DIR it goes on where it stopped; `--only vae` and `--only dit` may run side by side.
Batches, noise and sizes depend on nothing but the seed and the step number, so a resumed run repeats an uninterrupted one.

The transformer learns the velocity noise - latents at noise level s (timestep 1000 s), s logit-normal and shifted; the
learning rate warms up, stays flat and falls to zero over the last `--anneal` part of each run; the weights written are
exponential averages.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from fastdit.apps.tiny import clips
from fastdit.apps.tiny.codec import CHANNELS, Codec, make_vae, vae_loss
from fastdit.apps.tiny.model import (
    block_forward,
    encode_text,
    forward,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    rotary,
    tokenize,
)  # fmt: skip
from fastdit.apps.tiny.muon import Muon

# frames × height × width : share of the tokens
EARLY = "9x64x64:1,17x64x64:2,17x96x96:1"
MIXED = "17x64x64:.17,17x64x96:.04,33x64x64:.04,33x96x96:.12,33x96x160:.05,33x128x128:.33,33x256x256:.25"
VAE_SIZES = "17x64x64:3,9x96x96:2,9x128x128:2,5x256x256:1"
Size = tuple[int, int, int]


def parse_sizes(text: str) -> list[tuple[Size, float]]:
    """"17x64x64:2,33x96x96:1" -> [((17, 64, 64), 2.0), …]"""
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
    return (size[0] + 3) // 4 * (size[1] // 8) * (size[2] // 8)


class Batches(IterableDataset):
    """Endless (size, packed clips, ids, mask) of about `budget` tokens each; step k depends on `seed` and k alone."""

    def __init__(self, sizes: list[tuple[Size, float]], budget: int, seed: int, start: int, tokenizer: Any, drop: float) -> None:
        self.sizes, self.budget, self.seed, self.start = sizes, budget, seed, start
        self.tokenizer, self.drop = tokenizer, drop

    def batch(self, step: int) -> tuple[Size, Tensor, Tensor, Tensor]:
        rng = random.Random(f"{self.seed}/{step}")
        size = rng.choices([s for s, _ in self.sizes], [w for _, w in self.sizes])[0]
        batch = [clips.sample(rng) for _ in range(max(1, round(self.budget / tokens(size))))]
        words = ["" if rng.random() < self.drop else clips.caption(c, rng) for c in batch]
        return size, clips.pack(batch), *tokenize(self.tokenizer, words)

    def __iter__(self) -> Iterator[tuple[Size, Tensor, Tensor, Tensor]]:
        info = torch.utils.data.get_worker_info()
        step, stride = (self.start, 1) if info is None else (self.start + info.id, info.num_workers)
        while True:
            yield self.batch(step)
            step += stride


class DitTask:
    """The transformer and the text encoder on codec latents."""

    def __init__(self, args: argparse.Namespace, codec: Codec, tokenizer: Any, device: torch.device) -> None:
        self.codec, self.device, self.dtype = codec, device, torch.float32 if args.fp32 else torch.bfloat16
        dit = make_transformer(len(codec.scale), args.heads, args.layers, args.ffn, seed=args.seed)
        self.models = {"transformer": dit, "text_encoder": make_text_encoder(len(tokenizer), seed=args.seed)}
        for m in self.models.values():
            m.to(device)
        self.block = torch.compile(block_forward, dynamic=args.compile == "dynamic") if args.compile != "no" else block_forward
        self.drop, self.shift = 0.1, args.shift

    def matrices(self) -> list[Tensor]:
        return [p for p in self.models["transformer"].blocks.parameters() if p.ndim == 2]

    def loss(self, step: int, size: Size, rows: Tensor, ids: Tensor, mask: Tensor, gen: torch.Generator) -> tuple[Tensor, Tensor]:
        x = self.codec.encode(clips.render(rows, *size))
        noise = torch.randn(x.shape, generator=gen, device=x.device)
        s = torch.sigmoid(torch.randn(len(x), generator=gen, device=x.device))
        # the more tokens show one thing, the more noise it takes to hide it
        shift = self.shift * max(1.0, (tokens(size) / 1296) ** 0.35)
        s = shift * s / (1 + (shift - 1) * s)
        text, bias = encode_text(self.models["text_encoder"], ids, mask)
        dit = self.models["transformer"]
        mix = torch.lerp(x, noise, s.view(-1, 1, 1, 1, 1))
        v = forward(dit, mix, s * 1000, text, bias, rotary(dit, x), self.dtype, self.block)
        loss = (v - (noise - x)).square().mean()
        return loss, loss.detach()


class VaeTask:
    """The autoencoder against the codec."""

    def __init__(self, args: argparse.Namespace, codec: Codec, device: torch.device) -> None:
        self.codec, self.device, self.drop = codec, device, 1.0
        torch.manual_seed(args.seed)
        self.models = {"vae": make_vae(len(codec.scale)).to(device)}
        # not on the CPU: there the backward of a bfloat16 convolution corrupts memory (torch 2.13)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and not args.fp32)

    def matrices(self) -> list[Tensor]:
        vae = self.models["vae"]
        ends = {id(vae.encoder.conv_in.weight), id(vae.decoder.conv_out.weight)}
        return [p for n, p in vae.named_parameters() if p.ndim >= 4 and "gamma" not in n and id(p) not in ends]

    def loss(self, step: int, size: Size, rows: Tensor, ids: Tensor, mask: Tensor, gen: torch.Generator) -> tuple[Tensor, Tensor]:
        video = clips.render(rows, *size)
        z_shape = (len(video), len(self.codec.scale), (size[0] + 3) // 4, size[1] // 8, size[2] // 8)
        level = 0.12 * torch.rand((len(video), 1, 1, 1, 1), generator=gen, device=video.device).square()
        noise = level * torch.randn(z_shape, generator=gen, device=video.device)
        with self.autocast:
            return vae_loss(self.models["vae"], self.codec, video, noise, encoder=step % 3 == 0)


def run(task: Any, name: str, args: argparse.Namespace, seconds: float, tokenizer: Any) -> None:
    """Train `task` for `seconds` (or `args.steps`), from and to the checkpoint DIR/`name`.pt."""
    device, path = task.device, args.out / f"{name}.pt"
    params = [p for m in task.models.values() for p in m.parameters()]
    chosen = task.matrices()
    ids = {id(p) for p in chosen}
    rest = [p for p in params if id(p) not in ids]
    peak = args.lr if name == "dit" else args.vae_lr
    optimizers = [
        Muon(chosen, peak),
        torch.optim.AdamW(rest, peak, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda"),
    ]
    state_of = {k: m.state_dict() for k, m in task.models.items()}
    ema = {k: {n: t.clone() for n, t in s.items()} for k, s in state_of.items()}
    step = 0
    if path.exists():
        saved = torch.load(path, map_location=device, weights_only=True)
        for k, m in task.models.items():
            m.load_state_dict(saved["models"][k])
            ema[k] = saved["ema"][k]
        for opt, state in zip(optimizers, saved["optimizers"], strict=True):
            opt.load_state_dict(state)
        step = saved["step"]
        print(f"{name}: going on from {path} at step {step}", flush=True)
    elif args.init:
        load_init(task, args.init)
        ema = {k: {n: t.clone() for n, t in m.state_dict().items()} for k, m in task.models.items()}
        print(f"{name}: starting from the weights in {args.init}", flush=True)

    def save() -> None:
        state = {"step": step, "ema": ema, "models": {k: m.state_dict() for k, m in task.models.items()}}
        state["optimizers"] = [opt.state_dict() for opt in optimizers]
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def loader(sizes: str) -> Iterator[Any]:
        data = Batches(parse_sizes(sizes), args.tokens if name == "dit" else args.vae_tokens, args.seed, step, tokenizer, task.drop)
        return iter(DataLoader(data, batch_size=None, num_workers=args.workers))

    gen = torch.Generator(device)
    averages = [t for s in ema.values() for t in s.values()]
    weights = [t for s in (m.state_dict() for m in task.models.values()) for t in s.values()]
    first, start, log_at, save_at = step, time.monotonic(), 10.0, 60.0
    early = name == "dit" and not args.init
    batches = loader(args.early if early else args.sizes if name == "dit" else VAE_SIZES)
    sums: dict[Size, list[Tensor]] = {}
    seen = clips_seen = 0
    while True:
        elapsed = time.monotonic() - start
        done = (step - first) / args.steps if args.steps else elapsed / seconds
        if done >= 1:
            break
        if early and done >= args.early_part:
            early, batches = False, loader(args.sizes)
        shape, *batch = next(batches)
        size: Size = tuple(shape)
        rate = peak * min(1, (step + 1) / args.warmup) * min(1, max(0.002, (1 - done) / max(args.anneal, 1e-9)))
        optimizers[0].param_groups[0]["lr"] = rate
        optimizers[1].param_groups[0]["lr"] = rate * 0.5
        gen.manual_seed(args.seed * 1_000_003 + step)
        rows, tok, mask = (t.to(device, non_blocking=True) for t in batch)
        loss, shown = task.loss(step, size, rows, tok, mask, gen)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        for opt in optimizers:
            opt.step()
            opt.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - min(args.ema, (step + 1) / (step + 10)))
        step += 1
        seen, clips_seen = seen + len(rows) * tokens(size), clips_seen + len(rows)
        sums.setdefault(size, []).append(shown)
        if elapsed > log_at or (args.steps and args.steps <= 5):
            log_at = elapsed + args.log
            by_size = " ".join(f"{f}x{w}:{torch.stack(v).mean():.4f}" for (f, _, w), v in sorted(sums.items()))
            took = time.monotonic() - start
            print(f"{name} {took:.0f}s step {step} clips {clips_seen} tok/s {seen / took:.0f} lr {rate:.1e} norm {norm:.2f} mse {by_size}", flush=True)
            if not torch.isfinite(norm):
                raise SystemExit(f"error: {name} diverged at step {step}; try a lower --lr, delete {path} and start again")
            sums = {}
        if elapsed > save_at:
            save_at = elapsed + 60
            save()
    save()
    print(f"{name}: {step} steps, checkpoint in {path}", flush=True)


def load_init(task: Any, folder: Path) -> None:
    """Weights of a saved pipeline into the task's models."""
    from safetensors.torch import load_file

    for name, m in task.models.items():
        files = sorted((folder / name).glob("*.safetensors"))
        if not files:
            raise SystemExit(f"error: --init: no weights in {folder / name}")
        weights = {k: t.float() for k, t in load_file(files[0]).items()}
        missing, unexpected = m.load_state_dict(weights, strict=False)
        if unexpected or any("embed_tokens" not in k for k in missing):
            raise SystemExit(f"error: --init: {files[0]} is not of this shape (missing {missing}, unexpected {unexpected})")


def parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(prog="fastdit.apps.tiny.train", description="Train the tiny text-to-video pipeline.")
    add = ap.add_argument
    add("--out", type=Path, required=True, help="folder for checkpoints and the finished pipeline")
    add("--minutes", type=float, default=30.0, help="time for this run, all parts together")
    add("--steps", type=int, default=0, help="steps for this run and each part, instead of --minutes")
    add("--only", choices=["vae", "dit"], help="train one part alone")
    add("--init", type=Path, help="start from the weights, codec and tokenizer of this saved pipeline")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", choices=["no", "static", "dynamic"], default="no", help="torch.compile for the transformer's blocks")
    add("--fp32", action="store_true", help="float32 instead of bfloat16 products")
    add("--heads", type=int, default=3)
    add("--layers", type=int, default=6)
    add("--ffn", type=int, default=768)
    add("--lr", type=float, default=4e-3)
    add("--vae-lr", type=float, default=3e-3)
    add("--tokens", type=int, default=0, help="tokens per transformer batch (default 65536 on a GPU, 3200 on CPU)")
    add("--vae-tokens", type=int, default=0, help="latents per autoencoder batch (default 8192 on a GPU, 640 on CPU)")
    add("--early", default=EARLY, help="sizes for the first part of a run without --init")
    add("--early-part", type=float, default=0.25)
    add("--sizes", default=MIXED)
    add("--shift", type=float, default=3.0)
    add("--warmup", type=int, default=100)
    add("--anneal", type=float, default=0.5)
    add("--ema", type=float, default=0.999)
    add("--log", type=float, default=20.0, help="seconds between lines of progress")
    add("--workers", type=int, default=-1, help="processes that prepare batches (default 4 on a GPU, 0 on CPU)")
    add("--seed", type=int, default=0)
    return ap


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    gpu = args.device.startswith("cuda")
    if gpu and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda: torch sees no GPU here; leave --device out to train on the CPU")
    args.tokens = args.tokens or (65536 if gpu else 3200)
    args.vae_tokens = args.vae_tokens or (8192 if gpu else 640)
    args.workers = (4 if gpu else 0) if args.workers < 0 else args.workers
    torch.set_float32_matmul_precision("high")
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)

    from fastdit.apps.tiny.build import build, load_tokenizer, save_tokenizer

    source = args.init if args.init and not (args.out / "codec.safetensors").exists() else args.out
    if (source / "codec.safetensors").exists():
        codec, tokenizer = Codec.load(source / "codec.safetensors"), load_tokenizer(source / "tokenizer")
    else:
        codec, tokenizer = Codec.fit(CHANNELS), make_tokenizer()
    if source != args.out or not (args.out / "codec.safetensors").exists():
        save_tokenizer(tokenizer, args.out / "tokenizer")
        codec.save(args.out / "codec.safetensors")
    codec = codec.to(device)
    seconds = args.minutes * 60
    if args.only != "dit":
        run(VaeTask(args, codec, device), "vae", args, seconds * (1 if args.only else 0.3), tokenizer)
    if args.only != "vae":
        run(DitTask(args, codec, tokenizer, device), "dit", args, seconds * (1 if args.only else 0.7), tokenizer)
    if (args.out / "vae.pt").exists() and (args.out / "dit.pt").exists():
        build(args.out, args.out / "pipeline")
        print(f"pipeline in {args.out / 'pipeline'}", flush=True)


if __name__ == "__main__":
    main()
