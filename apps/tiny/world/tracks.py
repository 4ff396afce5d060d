"""How a solid moves through a clip, off the mask of it in every frame, and whether that is the motion asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch
from torch import Tensor

from fastdit.apps.tiny.world.scene import PLACES, RADII, SIZES, SPINS, WAYS, Scene, leap, paths

ANGLE, WAY = 15.0, 0.6  # degrees; share of the mean true displacement


def nominal(scene: Scene, seen: Sequence[Sequence[tuple[float, float, float]]] = ()) -> Scene:
    """The scene at the middle of everything that its words leave open, each thing where it was seen.

    A caption does not say who stands where, and the way on the frame of a thing that comes nearer depends on its place.
    `seen`: for each thing, when (-.5 to .5 over the clip) and where (x, z) it was; where it was never seen clearly, the
    usual place stands in.
    """
    things = []
    n = len(scene.things)
    for i, (t, x) in enumerate(zip(scene.things, PLACES[n], strict=True)):
        way, (path_x, path_z) = WAYS.get(t.motion, (0.0, 0.0)), paths(n, t.size)
        radius = RADII[n][SIZES.index(t.size)]
        hop = leap(radius) if t.motion == "bouncing" else 0.0
        yaw = 0.65 if t.solid == "cube" else 0.0
        dx, dz, z = way[0] * path_x, way[1] * path_z, 0.0
        if i < len(seen) and seen[i]:  # the middle of its way
            x = median(there - dx * when for when, there, _ in seen[i])
            z = median(there - dz * when for when, _, there in seen[i])
        things.append(replace(t, radius=radius, x=x, z=z, dx=dx, dz=dz, hop=hop, yaw=yaw))
    return replace(scene, things=tuple(things))


def track(mask: Tensor) -> dict[str, Tensor]:
    """Middle (x right, y up), area and width over height of a mask [F, H, W], in units of the shorter side."""
    _, H, W = mask.shape
    short = min(H, W)
    w = mask.float()
    n = w.sum((1, 2)).clamp(min=1)
    xs, ys = torch.arange(W, device=w.device) / short, -torch.arange(H, device=w.device) / short
    x, y = (w.sum(1) @ xs) / n, (w.sum(2) @ ys) / n
    vx = (w.sum(1) @ xs.square()) / n - x * x
    vy = (w.sum(2) @ ys.square()) / n - y * y
    return {"x": x, "y": y, "area": n / short**2, "wide": (vx.clamp(min=1e-9) / vy.clamp(min=1e-9)).sqrt()}


def _slope(values: Tensor) -> float:
    """Change over the clip of the straight line through the values."""
    t = torch.linspace(-0.5, 0.5, len(values), device=values.device)
    return float((t * (values - values.mean())).sum() / t.square().sum())


def moves(motion: str, solid: str, seen: dict[str, Tensor], true: dict[str, Tensor], spun: float) -> bool:
    """Whether a track is that of the motion; `true`: that of the nominal scene, `spun`: how `wide` changes in a spin."""
    d, e = ((_slope(k["x"]), _slope(k["y"])) for k in (seen, true))
    turned = float(seen["wide"].max() - seen["wide"].min())
    if motion in WAYS:
        turn = abs(math.degrees(math.atan2(d[1], d[0]) - math.atan2(e[1], e[0])))
        grown, should = (_slope(k["area"].log()) for k in (seen, true))
        right = abs(should) < 0.3 or grown / should > WAY
        return min(turn, 360 - turn) <= ANGLE and math.hypot(*d) >= WAY * math.hypot(*e) and right
    if math.hypot(d[0] - e[0], d[1] - e[1]) > 0.07:
        return False
    if motion == "spinning":
        return turned >= WAY * spun
    line, ideal = (k["y"] - k["y"].mean() for k in (seen, true))
    if motion == "bouncing":
        alike = float((line * ideal).sum() / (line.norm() * ideal.norm()).clamp(min=1e-6))
        return alike > 0.8 and float(line.std()) >= WAY * float(ideal.std())
    still = solid not in SPINS or turned <= 0.4 * spun or spun == 0
    return still and float(line.std()) < 0.03
