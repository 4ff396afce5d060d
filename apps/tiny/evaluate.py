"""Let the tiny pipeline draw many captions, and judge its clips:

    python -m fastdit.apps.tiny.evaluate --sizes 17x64x64:200,33x128x128:200 --json judge.json --sheets DIR

Reported by size: the shares right, over all captions, by kind, and over the combinations never trained on; the same
clips against each other's captions, which is chance; the ceilings, real clips judged as they are and after the
autoencoder or the codec; and the autoencoder's PSNR on real clips.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.apps.render.outputs import write_json
from fastdit.apps.tiny import clips
from fastdit.apps.tiny.codec import Codec, psnr
from fastdit.apps.tiny.judge import MEASURES, ask, judge, summary
from fastdit.apps.tiny.tasks import Size, parse_sizes, tokens
from fastdit.pipelines import embedded


@torch.no_grad()
def generate(
    pipe: Any,
    captions: Sequence[str],
    size: tuple[int, int, int],
    steps: int = 20,
    guidance: float = 5.0,
    seed: int = 0,
    batch: int = 8,
) -> list[Tensor]:
    """Clips [3, F, H, W] in [-1, 1] on the CPU, by the pipeline itself; clip i starts from noise of seed `seed` + i."""
    frames, height, width = size
    out: list[Tensor] = []
    for i in range(0, len(captions), batch):
        chosen = list(captions[i : i + batch])
        gens = [torch.Generator().manual_seed(seed + i + j) for j in range(len(chosen))]
        video = pipe(
            prompt=chosen, negative_prompt=[""] * len(chosen), num_frames=frames, height=height, width=width,
            num_inference_steps=steps, guidance_scale=guidance, generator=gens, output_type="pt",
        ).frames  # fmt: skip
        out += list((video.transpose(1, 2) * 2 - 1).float().cpu())
    return out


def sheet(videos: Sequence[Tensor], path: Path, columns: int = 4, shots: int = 4) -> None:
    """A PNG with `shots` frames of each clip side by side."""
    from PIL import Image

    strips = []
    for v in videos:
        picks = torch.linspace(0, v.shape[1] - 1, shots).round().long()
        strips.append(F.pad(torch.cat([v[:, f] for f in picks], 2), (0, 4, 0, 4), value=1.0))
    strips += [torch.ones_like(strips[0])] * (-len(strips) % columns)
    rows = [torch.cat(strips[i : i + columns], 2) for i in range(0, len(strips), columns)]
    pixels = ((torch.cat(rows, 1).clamp(-1, 1) + 1) * 127.5).byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(path)


@torch.no_grad()
def ceilings(pipe: Any, codec: Codec, size: Size, asked: Sequence[clips.Clip], device: str) -> dict[str, Any]:
    """The judge on real clips, as drawn, through the autoencoder and through the codec; and the PSNR of these in dB."""
    real = [clips.render(clips.pack([c]).to(device), *size)[0] for c in asked]
    through = [pipe.vae.decode(pipe.vae.encode(v[None]).latent_dist.mode()).sample[0] for v in real]
    linear = [codec.decode(codec.encode(v[None]))[0].clamp(-1, 1) for v in real]
    decoded = [pipe.vae.decode(codec.encode(v[None])).sample[0] for v in real]
    judged = {"real clips": real, "through the autoencoder": through, "through the codec": linear}
    compared = {"autoencoder": through, "codec, then decoder": decoded, "codec": linear}
    return {
        "ceilings": {name: summary(judge(videos, asked), asked)["everything"] for name, videos in judged.items()},
        "psnr": {name: round(psnr(torch.stack(v), torch.stack(real)), 2) for name, v in compared.items()},
    }


def evaluate(pipe: Any, codec: Codec, size: Size, n: int, args: argparse.Namespace) -> tuple[dict[str, Any], list[Tensor]]:
    """One row of the report, and the clips."""
    asked, captions = ask(n)
    batch = args.batch or max(1, (5_000 if args.device == "cpu" else 200_000) // tokens(size))
    start = time.monotonic()
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
        videos = generate(pipe, captions, size, args.steps, args.guidance, args.seed, batch)
    took = time.monotonic() - start
    there = [v.to(args.device) for v in videos]
    rows, others = judge(there, asked), asked[1:] + asked[:1]
    row = {
        "size": "x".join(map(str, size)),
        "tokens": tokens(size),
        "steps": args.steps,
        "guidance": args.guidance,
        "scheduler": type(pipe.scheduler).__name__,
        "shift": pipe.scheduler.config.get("shift"),
        "seed": args.seed,
        "products": "bfloat16" if args.bf16 else "float32",
        "device": "cpu" if args.device == "cpu" else torch.cuda.get_device_name(),
        "seconds": round(took, 1),
        "judge": summary(rows, asked),
        "same clips, wrong captions": summary(judge(there, others), others)["everything"],
        **ceilings(pipe, codec, size, asked[: args.ceilings], args.device),
        "wrong": [captions[i] + ": " + ", ".join(m for m in MEASURES if not r[m]) for i, r in enumerate(rows) if not r["all"]],
    }
    return row, videos


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="fastdit.apps.tiny.evaluate", description="Judge the tiny pipeline.")
    add = ap.add_argument
    add("--pipeline", type=Path, help="folder of the pipeline (default: the shipped one)")
    add("--sizes", default="17x64x64:200", help="FRAMESxHEIGHTxWIDTH:CLIPS, comma-separated")
    add("--steps", type=int, default=20)
    add("--guidance", type=float, default=5.0)
    add("--shift", type=float, help="flow shift of the scheduler, if not the saved one")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=0, help="clips at a time (default by size)")
    add("--ceilings", type=int, default=32, help="real clips to measure the ceilings with")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--bf16", action="store_true", help="autocast products to bfloat16")
    add("--json", type=Path)
    add("--sheets", type=Path, help="folder for contact sheets")
    args = ap.parse_args(argv)

    try:
        pipe: Any = embedded.load(args.pipeline)
    except FileNotFoundError as err:
        raise SystemExit(f"error: {err}") from None
    pipe.to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if args.shift:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=args.shift)
    codec = Codec.load((args.pipeline or embedded.PATH) / "codec.safetensors").to(args.device)
    report = []
    for size, n in parse_sizes(args.sizes):
        row, videos = evaluate(pipe, codec, size, int(n), args)
        report.append(row)
        print(json.dumps(row, indent=1), flush=True)
        if args.sheets:
            args.sheets.mkdir(parents=True, exist_ok=True)
            sheet(videos[:32], args.sheets / f"{row['size']}.png")
        if args.json:
            write_json(args.json, report)


if __name__ == "__main__":
    main()
