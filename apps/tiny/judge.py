"""Judge clips against the captions they were asked for, by looking at the frames; no model is involved.

A frame's foreground is what differs from the border's median colour by half as much as the object does. Read off it:
the background's and the object's colour (nearest of the palette), the direction (slopes of the centroid), the shape
(overlap with each shape drawn into the foreground's own box), the box's aspect, the constancy of the area, and the
number of connected pieces. Two things are looked for in the two halves of the frame, in either order.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.apps.tiny import clips
from fastdit.apps.tiny.clips import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Clip
from fastdit.apps.tiny.words import caption

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
    """Connected pieces (8 neighbours) larger than `least` of the frame, counted in each of [F, H, W] boolean frames."""
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
    """The foreground in a region (rows, columns) of `video` [3, F, H, W] in 0..1: its mask [F, H, W], and its looks."""
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
    return asked, [caption(c, rng) for c in asked]
