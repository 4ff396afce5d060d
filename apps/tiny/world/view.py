"""Where the camera is, where things are, and where on the frame they are seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdit.apps.tiny.world.scene import BOUNCES

View = tuple[Tensor, ...]
HALF = 0.306  # tangent of half the angle of view along the shorter side
DISTANCE_TO = 7.0  # of the camera from the middle of the scene, along the floor
LOOK_AT, PITCH = 0.75, 0.192  # height looked at, radians downwards
SIN, COS = math.sin(PITCH), math.cos(PITCH)
HEIGHT = LOOK_AT + DISTANCE_TO * SIN / COS  # of the camera


def camera(scene: Tensor, frames: int) -> View:
    """Where the camera is (x, z) and the sine and cosine of its yaw, each [B, F], from `pack`'s scene rows [B, 13]."""
    t = torch.linspace(-0.5, 0.5, frames, device=scene.device)
    orbit = scene[:, 3:4] * t
    x, z = -DISTANCE_TO * orbit.sin(), -DISTANCE_TO * orbit.cos()
    yaw = orbit + scene[:, 2:3] * t
    return x, z, yaw.sin(), yaw.cos()


def rays(u: Tensor, v: Tensor, sin: Tensor, cos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Directions of rays through the points (u right, v up; 1 is half the shorter side), for cameras of that yaw."""
    x, y = u * HALF, v * HALF
    up, forward = COS * y - SIN, COS + SIN * y
    return cos * x + sin * forward, up + torch.zeros_like(x), cos * forward - sin * x


def motion(things: Tensor, frames: int) -> View:
    """x, y (of the lowest point), z, sine and cosine of the turn, each [n, F], of packed things [n, 13]."""
    t = torch.linspace(-0.5, 0.5, frames, device=things.device)
    phase = torch.frac((t + 0.5) * BOUNCES)
    yaw = things[:, 7:8] + things[:, 8:9] * t
    return (
        things[:, 2:3] + things[:, 4:5] * t,
        things[:, 6:7] * 4 * phase * (1 - phase),
        things[:, 3:4] + things[:, 5:6] * t,
        yaw.sin(),
        yaw.cos(),
    )


def middle(things: Tensor, scene: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Where things' middles are seen: pixels (x, y), [n, F, 2]; one thing [n, 13] and one scene row a clip."""
    cx, cz, sin, cos = camera(scene, frames)
    x, y, z, _, _ = motion(things, frames)
    return project(x - cx, y + things[:, 1:2] - HEIGHT, z - cz, sin, cos, height, width)


def project(x: Tensor, y: Tensor, z: Tensor, sin: Tensor, cos: Tensor, height: int, width: int) -> Tensor:
    """Pixels (x, y), stacked last, of points given relative to cameras of that yaw."""
    side, ahead = cos * x - sin * z, sin * x + cos * z
    depth, up = COS * ahead - SIN * y, COS * y + SIN * ahead
    scale = min(height, width) / 2 / HALF
    return torch.stack([width / 2 + scale * side / depth, height / 2 - scale * up / depth], -1)
