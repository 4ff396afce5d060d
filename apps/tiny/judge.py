"""Judge clips against the captions they were asked for, by looking at the frames; no model is involved.

    python -m fastdit.apps.tiny.judge --sizes 17x64x64:200,33x128x128:200 --json judge.json --sheets DIR

A frame's foreground is what differs from the border's median colour by half as much as the object does. Read off it:
the background's and the object's colour (nearest of the palette), the direction (slopes of the centroid), the shape
(overlap with each shape drawn into the foreground's own box), the box's aspect, the constancy of the area, and the
number of connected pieces. Two things are looked for in the two halves of the frame, in either order.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.apps.tiny import clips
from fastdit.apps.tiny.clips import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Clip

MEASURES = ("color", "direction", "shape", "count", "background", "aspect", "size")
MOVED = 0.12  # of the frame: a shorter way along an axis counts as standing still
LEAST = 0.003  # of the frame: smaller pieces are not counted


@lru_cache
def _templates(n: int = 32) -> tuple[Tensor, dict[str, float]]:
    """Each shape filling an n×n box, and the width/height of its true box."""
    pictures, aspects = [], {}
    g = torch.linspace(-1.3, 1.3, 521)
    for k, name in enumerate(SHAPES):
        inside = clips.distance(k, g[None, :], g[:, None], 1.0) <= 0
        ys, xs = torch.where(inside.any(1))[0], torch.where(inside.any(0))[0]
        box = inside[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1].float()
        aspects[name] = box.shape[1] / box.shape[0]
        pictures.append(F.interpolate(box[None, None], (n, n), mode="area")[0, 0])
    return torch.stack(pictures), aspects


def _nearest(rgb: Tensor, palette: dict[str, tuple[int, int, int]]) -> str:
    table = torch.tensor(list(palette.values()), dtype=torch.float32, device=rgb.device) / 255
    return list(palette)[int((table - rgb).square().sum(1).argmin())]


def pieces(mask: Tensor, least: float = LEAST) -> Tensor:
    """Number of connected pieces (8 neighbours) larger than `least` of the frame in each of [F, H, W] boolean frames."""
    H, W = mask.shape[1:]
    if max(H, W) > 64:
        shrink = 64 / max(H, W)
        mask = F.adaptive_avg_pool2d(mask[:, None].float(), (round(H * shrink), round(W * shrink)))[:, 0] > 0.5
    count = mask[0].numel()
    label = torch.arange(1, count + 1, device=mask.device).view(1, *mask.shape[1:]) * mask
    label = label.float()
    for _ in range(count // 8):
        before = label
        for _ in range(8):
            label = F.max_pool2d(label[:, None], 3, 1, 1)[:, 0] * mask
        if torch.equal(before, label):
            break
    area = torch.zeros(len(mask), count + 1, device=mask.device)
    area.scatter_add_(1, label.flatten(1).long(), torch.ones_like(label).flatten(1))
    return (area[:, 1:] > least * count).sum(1)


def _look(video: Tensor, ground: Tensor, region: tuple[slice, slice]) -> tuple[Tensor, dict[str, Any]]:
    """What moves in a region (rows, columns) of `video` [3, F, H, W] in 0..1: its mask [F, H, W] and what was read off it."""
    _, frames, H, W = video.shape
    full = torch.zeros(frames, H, W, dtype=torch.bool, device=video.device)
    cover = torch.zeros(frames, H, W, device=video.device)
    part = video[:, :, region[0], region[1]]
    far = (part - ground.view(3, 1, 1, 1)).square().sum(0).sqrt()
    sample = far.flatten()[:: max(1, far.numel() // 200_000)]
    ref = torch.quantile(sample, 0.985).clamp(min=0.3)
    full[:, region[0], region[1]] = far > ref / 2
    cover[:, region[0], region[1]] = (far / ref).clamp(max=1)  # of each pixel by the object: shapes are compared softly
    seen: dict[str, Any] = {"color": None, "direction": None, "shape": None, "aspect": 0.0, "spread": 9.0}
    area = full.float().mean((1, 2))
    there = area > LEAST
    core = far > 0.8 * ref
    if there.float().mean() < 0.9 or not core.any():
        return full, seen
    seen["color"] = _nearest(part[:, core].mean(1), COLORS)
    ys = (torch.arange(H, device=video.device) + 0.5) / H
    xs = (torch.arange(W, device=video.device) + 0.5) / W
    weight = full.float()
    total = weight.sum((1, 2)).clamp(min=1)
    cx, cy = (weight.sum(1) @ xs) / total, (weight.sum(2) @ ys) / total
    t = torch.linspace(0, 1, frames, device=video.device)[there]
    t = t - t.mean()
    way = [float((t * c[there]).sum() / t.square().sum()) for c in (cx, cy)]
    step = tuple(0 if abs(w) < MOVED else (1 if w > 0 else -1) for w in way)
    seen["direction"] = next(m for m, s in MOTIONS.items() if s == step)
    inner = area[there]
    seen["spread"] = float(inner.std() / inner.mean())
    templates = _templates()[0].to(video.device)
    scores, aspects = [], []
    for f in range(0, frames, 4):
        rows, cols = torch.where(full[f].sum(1) >= 2)[0], torch.where(full[f].sum(0) >= 2)[0]
        if len(rows) < 4 or len(cols) < 4:
            continue
        box = cover[f, rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        aspects.append(box.shape[1] / box.shape[0])
        box = F.interpolate(box[None, None], templates.shape[1:], mode="area")[0, 0]
        scores.append(torch.minimum(box, templates).sum((1, 2)) / torch.maximum(box, templates).sum((1, 2)))
    if scores:
        seen["shape"] = SHAPES[int(torch.stack(scores).mean(0).argmax())]
        seen["aspect"] = sorted(aspects)[len(aspects) // 2]
    return full, seen


def judge_clip(video: Tensor, clip: Clip) -> dict[str, bool]:
    """`MEASURES` of one clip [3, F, H, W] in [-1, 1], each right or wrong, and `all`."""
    video = (video.float().clamp(-1, 1) + 1) / 2
    H, W = video.shape[2:]
    border = torch.cat([video[..., 0, :], video[..., -1, :], video[..., 0], video[..., -1]], -1).flatten(1)
    ground = border.median(1).values
    whole = slice(None)
    regions = [(whole, whole)]
    if len(clip.things) == 2:
        side_by_side = abs(clip.things[0].x - clip.things[1].x) > abs(clip.things[0].y - clip.things[1].y)
        regions = [(whole, slice(0, W // 2)), (whole, slice(W // 2, W))] if side_by_side else [
            (slice(0, H // 2), whole), (slice(H // 2, H), whole)]  # fmt: skip
    looks = [_look(video, ground, r) for r in regions]
    mask = torch.stack([m for m, _ in looks]).any(0)
    seen = [s for _, s in looks]

    def compare(order: list[dict[str, Any]]) -> dict[str, bool]:
        pairs = list(zip(clip.things, order, strict=True))
        aspects = _templates()[1]
        return {
            "color": all(t.color == s["color"] for t, s in pairs),
            "direction": all(t.motion == s["direction"] for t, s in pairs),
            "shape": all(t.shape == s["shape"] for t, s in pairs),
            "aspect": all(0.8 < s["aspect"] / aspects[t.shape] < 1.25 for t, s in pairs),
            "size": all(s["spread"] < 0.15 for _, s in pairs),
        }

    best = max((compare(seen), compare(seen[::-1])), key=lambda r: sum(r.values()))
    best["background"] = _nearest(ground, BACKGROUNDS) == clip.background
    best["count"] = bool((pieces(mask[::2]) == len(clip.things)).float().mean() >= 0.9)
    return {m: best[m] for m in MEASURES} | {"all": all(best.values())}


def judge(videos: Sequence[Tensor], asked: Sequence[Clip]) -> list[dict[str, bool]]:
    return [judge_clip(v, c) for v, c in zip(videos, asked, strict=True)]


def summary(rows: Sequence[dict[str, bool]], asked: Sequence[Clip]) -> dict[str, Any]:
    """Shares right, over all clips, by kind, and over the combinations never trained on."""

    def share(chosen: list[int]) -> dict[str, Any]:
        means = {m: round(sum(rows[i][m] for i in chosen) / len(chosen), 4) for m in (*MEASURES, "all")}
        return {"n": len(chosen)} | means

    groups = {"everything": list(range(len(rows)))}
    for i, clip in enumerate(asked):
        groups.setdefault(clip.kind, []).append(i)
        if clip.held_out:
            groups.setdefault("never trained on", []).append(i)
    return {name: share(chosen) for name, chosen in groups.items()}


def ask(n: int, seed: int = 77) -> tuple[list[Clip], list[str]]:
    """`n` clips and their captions, in many wordings; every tenth is a combination never trained on."""
    rng = random.Random(seed)
    held = sorted(clips.HELD_OUT)
    asked = [clips.sample(rng, triple=held[i // 10 % len(held)] if i % 10 == 9 else None) for i in range(n)]
    return asked, [clips.caption(c, rng) for c in asked]


@torch.no_grad()
def generate(
    pipe: Any, captions: Sequence[str], size: tuple[int, int, int], steps: int = 20, guidance: float = 3.0, seed: int = 0,
    batch: int = 8,
) -> list[Tensor]:  # fmt: skip
    """Clips [3, F, H, W] in [-1, 1] on the CPU, by the pipeline itself; clip i is drawn from noise of seed `seed` + i."""
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


def main(argv: list[str] | None = None) -> None:
    ap = argparse.ArgumentParser(prog="fastdit.apps.tiny.judge", description="Judge the tiny pipeline by its frames.")
    ap.add_argument("--pipeline", type=Path, help="folder of the pipeline (default: the one that ships with the package)")
    ap.add_argument("--sizes", default="17x64x64:200", help="FRAMESxHEIGHTxWIDTH:CLIPS, comma-separated")
    ap.add_argument("--steps", type=int, default=20)
    ap.add_argument("--guidance", type=float, default=3.0)
    ap.add_argument("--shift", type=float, help="flow shift of the scheduler, if not the saved one")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--batch", type=int, default=0, help="clips at a time (default by size)")
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--bf16", action="store_true", help="autocast products to bfloat16")
    ap.add_argument("--json", type=Path)
    ap.add_argument("--sheets", type=Path, help="folder for contact sheets")
    args = ap.parse_args(argv)

    from fastdit.apps.tiny.codec import Codec, psnr
    from fastdit.pipelines import tiny

    pipe = tiny.load(args.pipeline).to(args.device)
    if args.shift:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=args.shift)
    codec = Codec.load((args.pipeline or tiny.PATH) / "codec.safetensors").to(args.device)
    report: list[dict[str, Any]] = []
    for item in args.sizes.split(","):
        shape, n = item.split(":")
        size = tuple(int(s) for s in shape.split("x"))
        asked, captions = ask(int(n))
        batch = args.batch or max(1, (200_000 if args.device != "cpu" else 5_000) // ((size[0] + 3) // 4 * size[1] * size[2] // 64))
        start = time.monotonic()
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
            videos = generate(pipe, captions, size, args.steps, args.guidance, args.seed, batch)
        took = time.monotonic() - start
        row: dict[str, Any] = {
            "size": shape, "tokens": (size[0] + 3) // 4 * size[1] * size[2] // 64, "steps": args.steps,
            "guidance": args.guidance, "scheduler": type(pipe.scheduler).__name__,
            "shift": pipe.scheduler.config.get("shift"), "seed": args.seed, "bf16": args.bf16,
            "device": torch.cuda.get_device_name() if args.device != "cpu" else "cpu", "seconds": round(took, 1),
        }  # fmt: skip
        rows = judge([v.to(args.device) for v in videos], asked)
        row["judge"] = summary(rows, asked)
        half = judge([v.to(args.device) for v in videos], asked[1:] + asked[:1])
        row["same clips, wrong captions"] = summary(half, asked[1:] + asked[:1])["everything"]
        real = [clips.render(clips.pack([c]).to(args.device), *size)[0] for c in asked[:48]]
        with torch.no_grad():
            through = [pipe.vae.decode(pipe.vae.encode(v[None]).latent_dist.mode()).sample[0] for v in real]
            linear = [codec.decode(codec.encode(v[None]))[0].clamp(-1, 1) for v in real]
            fixed = [pipe.vae.decode(codec.encode(v[None])).sample[0] for v in real]
        row["ceilings"] = {
            name: summary(judge(vs, asked[: len(real)]), asked[: len(real)])["everything"]
            for name, vs in (("real clips", real), ("through the autoencoder", through), ("through the codec", linear))
        }
        pairs = (("autoencoder", through), ("codec, then decoder", fixed), ("codec", linear))
        row["psnr"] = {name: round(psnr(torch.stack(vs), torch.stack(real)), 2) for name, vs in pairs}
        row["wrong"] = [
            captions[i] + ": " + ", ".join(m for m in MEASURES if not r[m]) for i, r in enumerate(rows) if not r["all"]
        ]
        report.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "wrong"}, indent=1), *row["wrong"][:40], sep="\n", flush=True)
        if args.sheets:
            args.sheets.mkdir(parents=True, exist_ok=True)
            sheet(videos[:32], args.sheets / f"{shape}.png")
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
