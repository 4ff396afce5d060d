"""Train the tiny pipeline: `python -m fastdit.apps.tiny.train --out DIR --minutes M`.

One command for everything: it makes the codec and the tokenizer, trains the autoencoder for a third of the time and the
transformer with its text encoder for the rest, checkpoints every minute, and writes a `WanPipeline` to DIR/pipeline.
Started again on the same DIR it goes on where it stopped. `--only vae` and `--only dit` may run side by side; `--init`
begins from a saved pipeline's weights instead.

The learning rate warms up, stays flat and falls to zero over the last `--anneal` part of each run; the weights that go
into the pipeline are exponential averages.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastdit.apps.tiny.build import build, load_tokenizer, save_tokenizer
from fastdit.apps.tiny.codec import Codec
from fastdit.apps.tiny.model import make_tokenizer
from fastdit.apps.tiny.muon import Muon
from fastdit.apps.tiny.tasks import Batches, DitTask, Size, Task, VaeTask, load_weights, parse_sizes, tokens

EARLY = "9x64x64:1,17x64x64:2,17x96x96:1"
MIXED = "17x64x64:.15,17x64x96:.04,33x96x96:.08,33x96x160:.05,33x128x128:.28,9x256x256:.15,33x256x256:.25"
VAE_SIZES = "17x64x64:3,9x96x96:2,9x128x128:2,5x256x256:1"


class Run:
    """One task's training state: models, averages, optimisers and step, and its checkpoint."""

    def __init__(self, task: Task, args: argparse.Namespace) -> None:
        self.task, self.path = task, args.out / f"{task.name}.pt"
        self.params = [p for m in task.models.values() for p in m.parameters()]
        matrices = task.matrices()
        chosen = {id(p) for p in matrices}
        rest = [p for p in self.params if id(p) not in chosen]
        fused = task.device.type == "cuda"
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, 0.0),
            torch.optim.AdamW(rest, 0.0, betas=(0.9, 0.98), weight_decay=0.01, fused=fused),
        ]
        self.step = 0
        if args.init and not self.path.exists():
            load_weights(task, args.init)
            print(f"{task.name}: starting from the weights in {args.init}", flush=True)
        self.ema = {k: {n: t.clone() for n, t in m.state_dict().items()} for k, m in task.models.items()}
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        try:
            saved = torch.load(self.path, map_location=self.task.device, weights_only=True)
            for k, m in self.task.models.items():
                m.load_state_dict(saved["models"][k])
            for opt, state in zip(self.optimizers, saved["optimizers"], strict=True):
                opt.load_state_dict(state)
        except Exception as err:
            raise SystemExit(f"error: {self.path} does not fit these options; name another --out ({err})") from None
        self.ema, self.step = saved["ema"], saved["step"]
        print(f"{self.task.name}: going on from {self.path} at step {self.step}", flush=True)

    def save(self) -> None:
        state = {
            "step": self.step,
            "ema": self.ema,
            "models": {k: m.state_dict() for k, m in self.task.models.items()},
            "optimizers": [opt.state_dict() for opt in self.optimizers],
        }
        part = self.path.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.path)

    def update(self, loss: Tensor, rate: float, decay: float) -> Tensor:
        """One step of both optimisers, AdamW at half of Muon's rate; returns the gradient's norm before clipping."""
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for opt, share in zip(self.optimizers, (1.0, 0.5), strict=True):
            opt.param_groups[0]["lr"] = rate * share
            opt.step()
            opt.zero_grad(set_to_none=True)
        averages = [t for s in self.ema.values() for t in s.values()]
        weights = [t for m in self.task.models.values() for t in m.state_dict().values()]
        with torch.no_grad():
            torch._foreach_lerp_(averages, weights, 1 - min(decay, (self.step + 1) / (self.step + 10)))
        self.step += 1
        return norm


def train(task: Task, args: argparse.Namespace, seconds: float, tokenizer: Any) -> None:
    """Train `task` for `seconds`, or for `args.steps` steps, from and to its checkpoint."""
    run = Run(task, args)
    dit = isinstance(task, DitTask)
    peak, budget = (args.lr, args.tokens) if dit else (args.vae_lr, args.vae_tokens)
    gen = torch.Generator(task.device)

    def loader(sizes: str, two: float) -> Iterator[Any]:
        data = Batches(parse_sizes(sizes), budget, tokenizer, args.seed, run.step, task.drop, two)
        return iter(DataLoader(data, batch_size=None, num_workers=args.workers))

    early = dit and args.early_part > 0
    batches = loader(args.early, args.early_two) if early else loader(args.sizes if dit else VAE_SIZES, args.two)
    first, start, log_at, save_at = run.step, time.monotonic(), 10.0, 60.0
    shown: dict[Size, list[Tensor]] = {}
    seen = 0
    while True:
        elapsed = time.monotonic() - start
        done = (run.step - first) / args.steps if args.steps else elapsed / seconds
        if done >= 1:
            break
        if early and done >= args.early_part:
            early, batches = False, loader(args.sizes, args.two)
        shape, *batch = next(batches)
        size: Size = tuple(shape)
        rows, ids, mask = (t.to(task.device, non_blocking=True) for t in batch)
        gen.manual_seed(args.seed * 1_000_003 + run.step)
        loss, mse = task.loss(run.step, size, rows, ids, mask, gen)
        fall = min(1.0, max(0.002, (1 - done) / args.anneal)) if args.anneal else 1.0
        rate = peak * min(1.0, (run.step + 1) / args.warmup) * fall
        norm = run.update(loss, rate, args.ema)
        seen += len(rows) * tokens(size)
        shown.setdefault(size, []).append(mse)
        if elapsed > log_at or 0 < args.steps <= 5:
            log_at = elapsed + args.log
            by_size = " ".join(f"{f}x{h}x{w}:{torch.stack(v).mean():.4f}" for (f, h, w), v in sorted(shown.items()))
            took = time.monotonic() - start
            speed = f"{seen / 1e6:.2f}M tokens {seen / took:.0f}/s"
            print(
                f"{task.name} {took:.0f}s step {run.step} {speed} lr {rate:.1e} norm {norm:.2f} mse {by_size}",
                flush=True,
            )
            if not torch.isfinite(norm):
                raise SystemExit(f"error: {task.name} diverged at step {run.step}: delete {run.path}, use a lower rate")
            shown = {}
        if elapsed > save_at:
            save_at = elapsed + 60
            run.save()
    run.save()
    print(f"{task.name}: {run.step} steps, checkpoint in {run.path}", flush=True)


def parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(prog="fastdit.apps.tiny.train", description="Train the tiny text-to-video pipeline.")
    add = ap.add_argument
    add("--out", type=Path, required=True, help="folder for checkpoints and the finished pipeline")
    add("--minutes", type=float, default=30.0, help="time for this run, all parts together")
    add("--steps", type=int, default=0, help="steps for this run and each part, instead of --minutes")
    add("--only", choices=["vae", "dit"], help="train one part alone")
    add("--init", type=Path, help="start from the weights, codec and tokenizer of this saved pipeline")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true", help="torch.compile the transformer's blocks")
    add("--fp32", action="store_true", help="float32 instead of bfloat16 products")
    add("--heads", type=int, default=3)
    add("--layers", type=int, default=6)
    add("--ffn", type=int, default=768)
    add("--lr", type=float, default=4e-3)
    add("--vae-lr", type=float, default=3e-3)
    add("--tokens", type=int, default=0, help="tokens per transformer batch (default 98304 on a GPU, 3200 on CPU)")
    add("--vae-tokens", type=int, default=0, help="latents per autoencoder batch (default 8192 on a GPU, 640 on CPU)")
    add("--sizes", default=MIXED, help="FRAMESxHEIGHTxWIDTH:SHARE of the tokens, comma-separated")
    add("--two", type=float, default=0.4, help="share of clips that show two things")
    add("--early", default=EARLY, help="sizes for the first part of a run")
    add("--early-part", type=float, default=0.25, help="how long that is, of the run")
    add("--early-two", type=float, default=0.4, help="share of clips that show two things, there")
    add("--shift", type=float, default=3.0, help="of the noise levels")
    add("--growth", type=float, default=0.35, help="exponent by which the shift grows with the number of tokens")
    add("--warmup", type=int, default=100, help="steps")
    add("--anneal", type=float, default=0.6, help="part of the run over which the learning rate falls to zero")
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
    for sizes in (args.sizes, args.early):
        parse_sizes(sizes)
    args.tokens = args.tokens or (98304 if gpu else 3200)
    args.vae_tokens = args.vae_tokens or (8192 if gpu else 640)
    args.workers = (4 if gpu else 0) if args.workers < 0 else args.workers
    if gpu:
        torch.set_float32_matmul_precision("high")
    if args.init and not (args.init / "codec.safetensors").is_file():
        raise SystemExit(f"error: --init: {args.init} is no pipeline saved by this command: codec.safetensors is missing")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise SystemExit(f"error: --out: cannot make {args.out} ({err.strerror}); name a folder you may write to") from None
    device = torch.device(args.device)

    if (args.out / "codec.safetensors").exists():
        codec, tokenizer = Codec.load(args.out / "codec.safetensors"), load_tokenizer(args.out / "tokenizer")
    else:
        if args.init:
            codec, tokenizer = Codec.load(args.init / "codec.safetensors"), load_tokenizer(args.init / "tokenizer")
            shutil.copytree(args.init / "vae", args.out / "vae", dirs_exist_ok=True)
        else:
            codec, tokenizer = Codec.fit(), make_tokenizer()
        save_tokenizer(tokenizer, args.out / "tokenizer")
        codec.save(args.out / "codec.safetensors")
    codec = codec.to(device)
    seconds = args.minutes * 60
    if args.only != "dit":
        train(VaeTask(args, codec, device), args, seconds * (1 if args.only else 1 / 3), tokenizer)
    if args.only != "vae":
        train(DitTask(args, codec, len(tokenizer), device), args, seconds * (1 if args.only else 2 / 3), tokenizer)
    if (args.out / "dit.pt").exists() and ((args.out / "vae.pt").exists() or (args.out / "vae").exists()):
        build(args.out, args.out / "pipeline")
        print(f"pipeline in {args.out / 'pipeline'}", flush=True)


if __name__ == "__main__":
    main()
