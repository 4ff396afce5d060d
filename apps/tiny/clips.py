"""Captioned clips of moving coloured shapes: what the tiny pipeline is trained on and judged by.

A `Clip` says what is seen, in words and in numbers relative to the frame, so that one clip renders at any size; its
motion always takes the whole clip, however many frames that is. `words.caption` says it in words. `pack` turns clips
into plain tensors and `render` draws those in batch on any device, so that rendering never waits for Python.

Every (colour, shape, motion) in `HELD_OUT` is never trained on; the judge asks for them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "green": (40, 190, 70),
    "blue": (50, 90, 235),
    "yellow": (245, 220, 50),
    "purple": (165, 60, 215),
    "orange": (250, 140, 30),
    "cyan": (50, 215, 225),
    "white": (245, 245, 245),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (14, 14, 20),
    "gray": (105, 105, 110),
    "navy": (20, 28, 80),
    "white": (228, 228, 228),
}
SHAPES = ("circle", "square", "triangle", "star")
# Unit steps (x, y), y pointing down as in an image.
MOTIONS: dict[str, tuple[int, int]] = {
    "standing still": (0, 0),
    "moving right": (1, 0),
    "moving left": (-1, 0),
    "moving up": (0, -1),
    "moving down": (0, 1),
    "moving up and right": (1, -1),
    "moving up and left": (-1, -1),
    "moving down and right": (1, 1),
    "moving down and left": (-1, 1),
}
SIZES: dict[str, tuple[float, float]] = {"small": (0.13, 0.145), "": (0.17, 0.21), "large": (0.255, 0.28)}
REACH = 1.2  # no shape reaches further than this many radii from its centre

TRIPLES = tuple((c, s, m) for c in COLORS for s in SHAPES for m in MOTIONS)
HELD_OUT = frozenset(random.Random(20).sample(TRIPLES, round(0.05 * len(TRIPLES))))


@dataclass(frozen=True)
class Thing:
    """One moving shape; `radius`, centre (`x`, `y`) at mid-clip and path (`dx`, `dy`) are fractions of the frame."""

    color: str
    shape: str
    motion: str
    size: str
    radius: float
    x: float
    y: float
    dx: float
    dy: float


@dataclass(frozen=True)
class Clip:
    """One or two things before a background. Of two, the first is above the other, or left of it."""

    things: tuple[Thing, ...]
    background: str = "black"

    @property
    def kind(self) -> str:
        """What is asked beyond the plainest caption: `plain`, `diagonal`, `size`, `background` or `two`."""
        if len(self.things) == 2:
            return "two"
        if self.background != "black":
            return "background"
        if self.things[0].size:
            return "size"
        return "diagonal" if all(MOTIONS[self.things[0].motion]) else "plain"

    @property
    def held_out(self) -> bool:
        return any((t.color, t.shape, t.motion) in HELD_OUT for t in self.things)


def sample(rng: random.Random, triple: tuple[str, str, str] | None = None, kind: str = "any", two: float = 0.27) -> Clip:
    """A random clip. With `triple`, one thing of that (colour, shape, motion); without, never one of `HELD_OUT`.

    `kind`: `any`, of which a share `two` shows two things, or one of `Clip.kind` (`plain` gives diagonal motion too).
    """
    if kind == "two" or (kind == "any" and triple is None and rng.random() < two):
        return _sample_two(rng)
    background = "black"
    if kind == "background" or (kind == "any" and rng.random() < 0.3):
        background = rng.choice([b for b in BACKGROUNDS if b != "black"])
    size = ""
    if kind == "size" or (kind == "any" and rng.random() < 0.3):
        size = rng.choice(["small", "large"])
    color, shape, motion = triple or _triple(rng, list(MOTIONS))
    while triple is None and color == background:
        color, shape, motion = _triple(rng, list(MOTIONS))
    if color == background:
        background = "black"
    radius = rng.uniform(*SIZES[size])
    path = rng.uniform(0.30, 0.35) if size == "large" else rng.uniform(0.38, 0.46)
    sx, sy = MOTIONS[motion]
    path *= 0.8 if sx and sy else 1
    return Clip((_place(rng, color, shape, motion, size, radius, path, 0.5, 0.5, 0.1),), background)


def _triple(rng: random.Random, motions: list[str]) -> tuple[str, str, str]:
    while True:
        triple = (rng.choice(list(COLORS)), rng.choice(SHAPES), rng.choice(motions))
        if triple not in HELD_OUT:
            return triple


def _place(
    rng: random.Random,
    color: str,
    shape: str,
    motion: str,
    size: str,
    radius: float,
    path: float,
    x: float,
    y: float,
    j: float,
) -> Thing:
    """Jitter the centre by up to `j` along each axis, less where the path would leave the frame."""
    sx, sy = MOTIONS[motion]

    def shift(step: int) -> float:
        return rng.uniform(-1, 1) * min(j, max(0.0, 0.49 - REACH * radius - abs(step) * path / 2))

    return Thing(color, shape, motion, size, radius, x + shift(sx), y + shift(sy), sx * path, sy * path)


def _sample_two(rng: random.Random) -> Clip:
    """Two things of different colours in lanes of their own, so that they never meet."""
    background = "black" if rng.random() < 0.8 else rng.choice([b for b in BACKGROUNDS if b != "black"])
    rows = rng.random() < 0.5
    lane_motions = ["standing still", "moving right", "moving left"] if rows else ["standing still", "moving up", "moving down"]
    while True:
        a, b = _triple(rng, lane_motions), _triple(rng, lane_motions)
        still = a[2] == b[2] == "standing still"
        if a[0] != b[0] and background not in (a[0], b[0]) and not (rows and still):  # two still things stand side by side
            break
    things = []
    for lane, (color, shape, motion) in zip((0.27, 0.73), (a, b), strict=True):
        x, y = (0.5, lane) if rows else (lane, 0.5)
        radius, path = rng.uniform(0.13, 0.155), rng.uniform(0.38, 0.46)
        thing = _place(rng, color, shape, motion, "", radius, path, 0.5, 0.5, 0.1)
        wobble = rng.uniform(-0.03, 0.03)
        x, y = (thing.x, lane + wobble) if rows else (lane + wobble, thing.y)
        things.append(Thing(color, shape, motion, "", radius, x, y, thing.dx, thing.dy))
    return Clip(tuple(things), background)


def pack(clips: Sequence[Clip]) -> Tensor:
    """float32 [B, 3, 9]: two things (shape, radius or 0 if absent, x, y, dx, dy, rgb), then the background's rgb."""
    rows = torch.zeros(len(clips), 3, 9)
    for b, clip in enumerate(clips):
        for i, t in enumerate(clip.things):
            values = [SHAPES.index(t.shape), t.radius, t.x, t.y, t.dx, t.dy, *(c / 127.5 - 1 for c in COLORS[t.color])]
            rows[b, i] = torch.tensor(values)
        rows[b, 2, 6:] = torch.tensor([c / 127.5 - 1 for c in BACKGROUNDS[clip.background]])
    return rows


def distance(shape: int, x: Tensor, y: Tensor, r: Tensor | float) -> Tensor:
    """Signed distance to the shape's edge (negative inside), in the units of `x`, `y` and the radius `r`."""
    if SHAPES[shape] == "circle":
        return (x * x + y * y).sqrt() - r
    if SHAPES[shape] == "square":
        return torch.maximum(x.abs(), y.abs()) - r * 0.88
    if SHAPES[shape] == "triangle":
        return torch.maximum(y - r * 0.7, (x.abs() * math.sqrt(3) - y) / 2 - r * 0.55)
    # A five-pointed star: fold the plane into one tenth of it, where the star is what lies inside of one line, from the
    # tip (1.2 r, 0) to the notch at 36 degrees and half that length.
    fifth = 2 * math.pi / 5
    angle = (torch.remainder(torch.atan2(x, -y) + fifth / 2, fifth) - fifth / 2).abs()
    rho = (x * x + y * y).sqrt()
    tip, notch = REACH, REACH / 2
    ex, ey = notch * math.cos(fifth / 2) - tip, notch * math.sin(fifth / 2)
    norm = math.hypot(ex, ey)
    return ((rho * angle.cos() - r * tip) * ey - rho * angle.sin() * ex) / norm


def render(rows: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Draw `pack`ed clips on their device: float32 [B, 3, frames, height, width] in [-1, 1], edges one pixel soft."""
    device, short = rows.device, min(height, width)
    video = rows[:, 2, 6:].view(-1, 3, 1, 1, 1).expand(-1, -1, frames, height, width).contiguous()
    t = torch.linspace(-0.5, 0.5, frames, device=device)
    px = (torch.arange(width, device=device) + 0.5) / width
    py = (torch.arange(height, device=device) + 0.5) / height
    for i in range(2):
        kind, r, cx, cy, dx, dy = rows[:, i, :6, None].unbind(1)
        x = ((px - (cx + dx * t)[..., None]) * (width / short))[:, :, None, :]
        y = ((py - (cy + dy * t)[..., None]) * (height / short))[:, :, :, None]
        r = r.view(-1, 1, 1, 1)
        edge = torch.zeros(len(rows), frames, height, width, device=device)
        for k in range(len(SHAPES)):
            edge = torch.where((kind == k).view(-1, 1, 1, 1), distance(k, x, y, r), edge)
        cover = ((0.5 - edge * short).clamp(0, 1) * (r > 0)).unsqueeze(1)
        video += (rows[:, i, 6:].view(-1, 3, 1, 1, 1) - video) * cover
    return video
