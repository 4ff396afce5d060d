"""The small world as data: solids on a floor, how they move, and how a camera looks at them.

A `Scene` says what is seen in words (`words.caption`) and in numbers, so that one scene renders at any size and length
(`render.render`). Lengths are in units of which the frame's shorter side shows about 4.4 at the middle of the scene; x
points right, y up and z away from the camera. A motion takes the whole clip, however many frames that is.

What the words leave open is drawn at random (place, path, turn, the exact radius); what they say is fixed, the camera's
way and the floor's pattern too. So a judge who knows the caption knows the background to the pixel.

Every (colour, solid, motion) in `HELD_OUT` is never sampled for training; the judge asks for them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 38),
    "orange": (245, 132, 20),
    "yellow": (240, 215, 35),
    "green": (40, 170, 60),
    "cyan": (35, 205, 215),
    "blue": (40, 80, 225),
    "purple": (140, 50, 205),
    "pink": (250, 105, 175),
}
SOLIDS = ("ball", "cube", "cylinder", "cone", "ring")
FLOORS = ("plain", "checker", "stripes")
BACKDROPS = ("sky", "wall")
MOTIONS = ("still", "right", "left", "towards", "away", "diagonal", "diagonal left", "bouncing", "spinning")
WAYS = {  # unit steps (x, z) of the motions that lead somewhere
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "towards": (0.0, -1.0),
    "away": (0.0, 1.0),
    "diagonal": (0.72, 0.72),  # to the right and away
    "diagonal left": (-0.72, 0.72),
}
SPINS = ("cube", "ring")  # the others look the same from every side
IN_PLACE = ("still", "bouncing", "spinning")
CAMERAS = ("still", "panning right", "panning left", "circling")
# radius and half-extents: (default, small, large) by the number of solids
RADII = {1: (0.72, 0.48, 1.0), 2: (0.58, 0.42, 0.78), 3: (0.46, 0.46, 0.46)}
SIZES = ("", "small", "large")
PLACES = {1: (0.0,), 2: (-0.9, 0.9), 3: (-1.2, 0.0, 1.2)}  # x, from left to right
# mean lengths of a path sideways and in depth, for one thing and for each of several, which must keep apart
PATHS = {1: (2.15, 2.8), 2: (0.85, 2.1), 3: (0.85, 2.1)}
SPIN = 3.5  # radians a clip
BOUNCES = 2
PAN, ORBIT = 0.16, 1.0  # radians a clip
OBJECT = 13  # numbers of one solid in `pack`

TRIPLES = tuple((c, s, m) for c in COLORS for s in SOLIDS for m in MOTIONS if m != "spinning" or s in SPINS)
HELD_OUT = frozenset(random.Random(21).sample(TRIPLES, round(0.06 * len(TRIPLES))))


@dataclass(frozen=True)
class Thing:
    """One solid: its words, then its radius, mid-clip place (`x`, `z`), path (`dx`, `dz`), hop and turn."""

    color: str
    solid: str
    motion: str
    size: str
    radius: float
    x: float
    z: float
    dx: float = 0.0
    dz: float = 0.0
    hop: float = 0.0  # height of a bounce
    yaw: float = 0.0  # radians
    spin: float = 0.0  # radians a clip


@dataclass(frozen=True)
class Scene:
    """One to three things, from left to right, on a floor before a backdrop, seen by a camera."""

    things: tuple[Thing, ...]
    floor: str = "plain"
    backdrop: str = "sky"
    camera: str = "still"

    @property
    def kind(self) -> str:
        """The group under which the judge reports it."""
        if len(self.things) > 1:
            return ("two", "three")[len(self.things) - 2]
        return "camera" if self.camera != "still" else "one"

    @property
    def held_out(self) -> bool:
        return any((t.color, t.solid, t.motion) in HELD_OUT for t in self.things)


def paths(count: int, size: str) -> tuple[float, float]:
    """Mean lengths of the paths sideways and in depth of one of `count` things."""
    x, z = PATHS[count]
    return x * (0.78 if size == "large" else 1.0), z


def leap(radius: float) -> float:
    """Height of a bounce: as high as the frame allows."""
    return min(1.1, max(0.42, 2.45 - 2 * radius))


def _thing(rng: random.Random, triple: tuple[str, str, str], size: str, count: int, x: float) -> Thing:
    color, solid, motion = triple
    radius = RADII[count][SIZES.index(size)] * rng.uniform(0.95, 1.05)
    ways = WAYS.get(motion, (0.0, 0.0))
    path_x, path_z = (p * rng.uniform(0.94, 1.06) for p in paths(count, size))
    dx, dz = ways[0] * path_x, ways[1] * path_z
    loose = 0.3 if count == 1 else 0.1
    x += rng.uniform(-1, 1) * min(loose, max(0.0, 2.0 - radius - abs(dx) / 2)) if count == 1 else rng.uniform(-loose, loose)
    z = rng.uniform(-0.25, 0.25) if not dz else rng.uniform(-0.1, 0.2)
    hop = leap(radius) if motion == "bouncing" else 0.0
    yaw = {"cube": rng.uniform(0.35, 0.95), "ring": rng.uniform(-0.3, 0.3)}.get(solid, 0.0)
    return Thing(color, solid, motion, size, radius, x, z, dx, dz, hop, yaw, SPIN if motion == "spinning" else 0.0)


def _triple(rng: random.Random, motions: Sequence[str], banned: set[str]) -> tuple[str, str, str]:
    while True:
        triple = (rng.choice(list(COLORS)), rng.choice(SOLIDS), rng.choice(list(motions)))
        if triple in HELD_OUT or triple[0] in banned or (triple[2] == "spinning" and triple[1] not in SPINS):
            continue
        return triple


def sample(rng: random.Random, triple: tuple[str, str, str] | None = None, kind: str = "any", several: float = 0.42) -> Scene:
    """A random scene. With `triple`, one thing of that (colour, solid, motion); without, never one of `HELD_OUT`.

    `kind`: `any`, of which a share `several` shows two or three things, or one of `Scene.kind`.
    """
    count, camera = 1, "still"
    if kind in ("two", "three") or (kind == "any" and triple is None):
        count = {"two": 2, "three": 3}.get(kind) or rng.choices((1, 2, 3), (1 - several, 0.64 * several, 0.36 * several))[0]
    if kind == "camera" or (kind == "any" and triple is None and rng.random() < 0.22):
        camera = rng.choice(CAMERAS[1:] if count < 3 else CAMERAS[3:])  # three would leave the frame
    motions: Sequence[str] = MOTIONS if camera == "still" else IN_PLACE
    if count == 3:
        motions = [m for m in motions if m not in ("right", "left", "diagonal", "diagonal left")]
    if rng.random() < 0.3 and count > 1:  # all alike, so that "both moving right" is often seen
        motions = [rng.choice([m for m in motions if m != "spinning"])]
    things, banned = [], set[str]()
    for i in range(count):
        chosen = triple or _triple(rng, motions, banned)
        banned.add(chosen[0])
        size = rng.choices(SIZES, (0.6, 0.2, 0.2))[0] if count < 3 else ""
        things.append(_thing(rng, chosen, size, count, PLACES[count][i]))
    floor = rng.choices(FLOORS, (0.4, 0.35, 0.25))[0]
    return Scene(tuple(things), floor, rng.choices(BACKDROPS, (0.6, 0.4))[0], camera)


def another(scene: Scene, rng: random.Random) -> Scene:
    """A scene that the same words describe: other places, paths and turns, and where there are two, sides exchanged."""
    n = len(scene.things)
    places = PLACES[n][::-1] if n == 2 else PLACES[n]
    things = [_thing(rng, (t.color, t.solid, t.motion), t.size, n, x) for t, x in zip(scene.things, places, strict=True)]
    return Scene(tuple(things), scene.floor, scene.backdrop, scene.camera)


def pack(scenes: Sequence[Scene]) -> Tensor:
    """float32 [B, 4, 13]: three things (solid, or -1 where absent; radius, x, z, dx, dz, hop, yaw, spin, 0, rgb in
    0..1), then the scene (floor, backdrop, pan and orbit in radians a clip, zeros)."""
    rows = torch.zeros(len(scenes), 4, OBJECT)
    rows[:, :3, 0] = -1
    for b, s in enumerate(scenes):
        for i, t in enumerate(s.things):
            rgb = [c / 255 for c in COLORS[t.color]]
            values = [SOLIDS.index(t.solid), t.radius, t.x, t.z, t.dx, t.dz, t.hop, t.yaw, t.spin, 0.0, *rgb]
            rows[b, i] = torch.tensor(values)
        pan = {"panning right": PAN, "panning left": -PAN}.get(s.camera, 0.0)
        orbit = ORBIT if s.camera == "circling" else 0.0
        rows[b, 3, :4] = torch.tensor([FLOORS.index(s.floor), BACKDROPS.index(s.backdrop), pan, orbit])
    return rows
