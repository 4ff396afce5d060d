"""Train the world's model, on one device or on all GPUs of a host, in as many calls as it takes:

    python -m fastdit.apps.tiny.world.train vae --out DIR --minutes 9
    torchrun --nproc-per-node 4 -m fastdit.apps.tiny.world.train dit --out DIR --minutes 9 --compile
    torchrun --nproc-per-node 4 -m fastdit.apps.tiny.world.train few --out DIR --init DIR/dit --minutes 5 --compile

DIR gets the codec and the tokenizer, and NAME.pt, from which the same command goes on. `--light FOLDER` also leaves the
weights there in pieces of 15 MiB, which `--init FOLDER/NAME` begins from (`store.py`). Gradients are averaged over the
processes; every process draws its own clips. The learning rate warms up, stays and falls to zero over the last
`--anneal` part, by the clock: `--begin` and `--end` say which part of the whole schedule this call is.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from fastdit.apps.tiny.sizes import Size, parse_sizes, tokens
from fastdit.apps.tiny.world import latents, store
from fastdit.apps.tiny.world.run import Clock, Run
from fastdit.apps.tiny.world.tasks import TASKS, Batches, Task

EARLY = "17x64x64:1,17x96x96:1,9x128x128:2"
MIXED = (
    "17x128x128:.1,33x128x128:.15,17x128x224:.05,33x160x96:.04,9x256x256:.22,17x192x192:.08,17x256x256:.06,"
    "33x256x256:.22,33x192x320:.05,33x288x176:.03"
)
VAE_SIZES = "17x64x64:2,9x96x96:2,9x128x128:2,5x256x256:2,9x128x224:1"


def train(task: Task, args: argparse.Namespace, tokenizer: Any, start: float) -> Run:
    """Train until the clock says so, from and to the checkpoint; only the first process writes and speaks."""
    run = Run(task, args)
    rank = dist.get_rank() if dist.is_initialized() else 0
    clock, gen = Clock(args, task.device, start), torch.Generator(task.device)

    def loader(sizes: str) -> Iterator[Any]:
        data = Batches(parse_sizes(sizes), args.tokens, tokenizer, args.seed, run.step, task.drop, rank, args.several)
        return iter(DataLoader(data, batch_size=None, num_workers=args.workers))

    early = args.begin < args.early_part
    batches = loader(args.early if early else args.sizes)
    log_at, save_at, seen, warm = 5.0, 90.0, 0, 0.0
    shown: dict[Size, list[Tensor]] = {}
    while True:
        done = clock.done(run.step - run.first)
        if done >= 1:
            break
        place = args.begin + (args.end - args.begin) * done
        if early and place >= args.early_part:
            early, batches = False, loader(args.sizes)
        shape, rows, ids, mask = next(batches)
        size: Size = tuple(shape)
        gen.manual_seed((args.seed * 1_000_003 + run.step) * 64 + rank)
        loss, mse = task.loss(run.step, size, rows, ids.to(task.device), mask.to(task.device), gen)
        fall = min(1.0, max(0.002, (1 - place) / args.anneal)) if args.anneal else 1.0
        norm = run.update(loss, args.lr * min(1.0, (run.step - run.restarted + 1) / args.warmup) * fall, args.ema)
        elapsed = time.monotonic() - start
        if run.step == run.first + 20:
            warm, seen = elapsed, 0
        seen += len(rows) * tokens(size)
        if rank:
            continue
        shown.setdefault(size, []).append(mse)
        if elapsed > log_at or 0 < args.steps <= 5:
            log_at = elapsed + args.every
            by_size = " ".join(f"{f}x{h}x{w}:{torch.stack(v).mean():.4f}" for (f, h, w), v in sorted(shown.items()))
            speed = f"{seen / 1e6:.1f}M tokens a process, {seen / max(1e-3, time.monotonic() - start - warm):.0f}/s"
            print(f"{task.name} {elapsed:.0f}s step {run.step} {speed} norm {norm:.2f} mse {by_size}", flush=True)
            if not torch.isfinite(norm):
                raise SystemExit(f"error: {task.name} diverged at step {run.step}: delete {run.path}, use a lower rate")
            shown = {}
        if elapsed > save_at:
            save_at = elapsed + 90
            run.save()
    if not rank:
        run.save()
        if args.light:
            store.write_light(args.light, task.name, run.state(), raw=not args.averages)
        print(f"{task.name}: {run.step} steps, checkpoint in {run.path}", flush=True)
    return run


def parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(prog="fastdit.apps.tiny.world.train", description="Train the world's model.")
    add = ap.add_argument
    add("task", choices=list(TASKS))
    add("--out", type=Path, required=True, help="folder for codec, tokenizer and checkpoints")
    add("--init", type=Path, help="light checkpoint FOLDER/NAME to begin from")
    add("--light", type=Path, help="folder for a light checkpoint at the end")
    add("--averages", action="store_true", help="only the averaged weights in it")
    add("--minutes", type=float, default=9.0, help="time for this call, its imports not counted")
    add("--steps", type=int, default=0, help="steps for this call, instead of --minutes")
    add("--begin", type=float, default=0.0, help="where in the whole schedule this call begins, 0 to 1")
    add("--end", type=float, default=1.0, help="and where it ends")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true")
    add("--fp32", action="store_true", help="float32 instead of bfloat16 products")
    add("--heads", type=int, default=4, help="of 64")
    add("--layers", type=int, default=8)
    add("--ffn", type=int, default=1024)
    add("--lr", type=float, default=0.0, help="default 4e-3, 3e-3 for the autoencoder, 1e-3 for few steps")
    add("--tokens", type=int, default=0, help="a batch and process (default 98304, 8192 for the autoencoder; less on CPU)")
    add("--sizes", default="", help="FRAMESxHEIGHTxWIDTH:SHARE of the tokens, comma-separated")
    add("--early", default=EARLY, help="sizes for the first part of the schedule")
    add("--early-part", type=float, default=-1.0, help="how long that is (default .15 for the transformer)")
    add("--several", type=float, default=0.42, help="share of scenes with two or three solids")
    add("--shift", type=float, default=3.0, help="of the noise levels")
    add("--growth", type=float, default=0.35, help="exponent by which the shift grows with the number of tokens")
    add("--few", type=int, default=8, help="steps to learn")
    add("--parts", type=int, default=4, help="of the teacher for one of these")
    add("--few-shift", type=float, default=5.0, help="shift of the few steps' noise levels")
    add("--guidance", type=float, default=3.0, help="of the teacher")
    add("--warmup", type=int, default=100, help="steps")
    add("--anneal", type=float, default=0.6, help="part of the schedule over which the learning rate falls to zero")
    add("--ema", type=float, default=0.998)
    add("--every", type=float, default=20.0, help="seconds between lines of progress")
    add("--workers", type=int, default=-1, help="processes that prepare batches (default 4 on a GPU, 0 on CPU)")
    add("--seed", type=int, default=0)
    return ap


def main(argv: list[str] | None = None) -> None:
    start = time.monotonic()
    args = parser().parse_args(argv)
    gpu, vae = args.device.startswith("cuda"), args.task == "vae"
    args.sizes = args.sizes or (VAE_SIZES if vae else MIXED)
    for sizes in (args.sizes, args.early):
        parse_sizes(sizes)
    args.lr = args.lr or {"dit": 4e-3, "vae": 3e-3, "few": 1e-3}[args.task]
    args.tokens = args.tokens or ((8192 if vae else 98304) if gpu else 640)
    args.early_part = args.early_part if args.early_part >= 0 else (0.15 if args.task == "dit" else 0.0)
    args.workers = (4 if gpu else 0) if args.workers < 0 else args.workers
    device = torch.device(args.device)
    if "RANK" in os.environ:
        if gpu:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    if gpu:
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        torch._dynamo.config.recompile_limit = 64
    if not dist.is_initialized() or dist.get_rank() == 0:
        latents.prepare(args.out)
    if dist.is_initialized():
        dist.barrier()
    codec, tokenizer = latents.prepare(args.out)
    train(TASKS[args.task](args, codec.to(device), len(tokenizer), device), args, tokenizer, start)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
