"""Draw packed scenes in batch on any device, as fast as a GPU trains on them, with the truth the judge needs.

Every pixel is the mean of `GRID` rays in a rotated grid. A ray meets at most one surface of the solids (`solids.py`), the
floor with its pattern, or the backdrop: a sky, or a round wall around the scene. Shadows are soft: how near a ray from
the floor to the light passes by a solid, in units of the way there, gives the share of the light that arrives. Solids
are grouped by their form, so that each form's code runs only where it is needed. On a GPU `render_gpu.py` draws the same
in one kernel; the truth is always drawn here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdit.apps.tiny.world.light import AMBIENT, DARK, DIFFUSE, GLOSS, LIGHT, SOFT, WALL
from fastdit.apps.tiny.world.scene import OBJECT
from fastdit.apps.tiny.world.solids import DISTANCE, FAR, MEET
from fastdit.apps.tiny.world.view import HALF, HEIGHT, View, camera, middle, motion, rays

GRID = ((0.375, 0.125), (0.875, 0.375), (0.125, 0.625), (0.625, 0.875))  # a rotated grid of four rays a pixel


@dataclass
class Truth:
    """What was drawn. Masks are coverage in 0..1."""

    masks: Tensor  # [B, 3, F, H, W], what is seen of each solid
    whole: Tensor  # [B, 3, F, H, W], its projection as if alone
    place: Tensor  # [B, 3, F, 2], x and y of each solid's middle in pixels


def _local(x: Tensor, z: Tensor, sin: Tensor, cos: Tensor) -> tuple[Tensor, Tensor]:
    return cos * x - sin * z, sin * x + cos * z


def _draw(meet: Callable[..., Any], view: View, pose: View, u: Tensor, v: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(t, light, gloss) [n, F, P] along one ray a pixel for n solids of one form. view, pose: [n, F, 1] each; u, v: [P]."""
    cx, cz, sin, cos = view
    px, py, pz, ps, pc = pose
    dx, dy, dz = rays(u, v, sin, cos)
    ox, oz = _local(cx - px, cz - pz, ps, pc)
    dx, dz = _local(dx, dz, ps, pc)
    lx, lz = _local(torch.full_like(ps, LIGHT[0]), torch.full_like(ps, LIGHT[2]), ps, pc)
    t, nx, ny, nz = meet(ox, HEIGHT - py, oz, dx, dy, dz, r)
    lit = nx * lx + ny * LIGHT[1] + nz * lz
    length = (dx * dx + dy * dy + dz * dz).sqrt()
    hx, hy, hz = lx - dx / length, LIGHT[1] - dy / length, lz - dz / length
    shine = (nx * hx + ny * hy + nz * hz).clamp(min=0) / (hx * hx + hy * hy + hz * hz).sqrt().clamp(min=1e-3)
    light = AMBIENT + 0.08 * ny + DIFFUSE * lit.clamp(min=0)
    return t, light, GLOSS * shine**24


def _shade(far: Callable[..., Tensor], view: View, pose: View, u: Tensor, v: Tensor, r: Tensor) -> Tensor:
    """Share [n, F, P] of the light that arrives at the floor under each pixel past n solids of one form."""
    cx, cz, sin, cos = view
    px, py, pz, ps, pc = pose
    dx, dy, dz = rays(u, v, sin, cos)
    t = -HEIGHT / dy.clamp(max=-1e-3)
    x, z = _local(cx + t * dx - px, cz + t * dz - pz, ps, pc)
    lx, lz = _local(torch.full_like(ps, LIGHT[0]), torch.full_like(ps, LIGHT[2]), ps, pc)
    middle = -(x * lx + (-py - r) * LIGHT[1] + z * lz)
    least = torch.full_like(x, 1.0)
    for i in range(10):
        s = (middle + r * (0.24 * i - 1.08)).clamp(min=0.02)
        near = far(x + s * lx, s * LIGHT[1] - py, z + s * lz, r)
        least = torch.minimum(least, SOFT * near / (s + 1.2))
    share = (0.5 + 0.5 * least).clamp(0, 1)
    return share * share * (3 - 2 * share)


def _ramp(a: tuple[float, float, float], b: tuple[float, float, float], t: Tensor) -> Tensor:
    return torch.stack([x + (y - x) * t for x, y in zip(a, b, strict=True)], 1)


def _background(view: View, u: Tensor, v: Tensor, floor: Tensor, wall: Tensor, pixel: Tensor, shade: Tensor) -> Tensor:
    """[B, 3, F, P] in 0..1: floor, sky or wall, one ray a pixel of `pixel` half-sides; floor, wall: [B, 1, 1]."""
    cx, cz, sin, cos = view
    dx, dy, dz = rays(u, v, sin, cos)
    down = dy < -1e-3
    t = torch.where(down, -HEIGHT / dy.clamp(max=-1e-3), 1e3)
    a, b = dx * dx + dz * dz, cx * dx + cz * dz
    t_wall = (-b + (b * b - a * (cx * cx + cz * cz - WALL * WALL)).clamp(min=0).sqrt()) / a
    on_floor = down & ((wall < 0.5) | (t < t_wall))
    x, z = cx + t * dx, cz + t * dz
    # patterns, blurred where a pixel covers much of them
    wide = t * pixel * HALF
    long = wide / (-dy).clamp(min=0.02)

    def wave(p: Tensor, width: Tensor, side: float) -> Tensor:
        """A square wave of -1 and 1 in `p`, averaged over `width`."""
        half = (width / side).clamp(min=0.01, max=4.0) / 2

        def integral(q: Tensor) -> Tensor:
            return (torch.frac(q / 2 + 64) - 0.5).abs() * 2

        q = p / side
        return (integral(q + half) - integral(q - half)) / (2 * half)

    forward = (sin * dx + cos * dz).abs() / a.sqrt()
    wx = wide + (long - wide) * (1 - forward)
    checker = wave(x, wx, 1.0) * wave(z, long, 1.0)
    stripes = wave(x, wx, 0.75)
    pattern = torch.where(floor == 1, checker, torch.where(floor == 2, stripes, 0.0))
    gray = 0.56 + pattern * torch.where(floor == 1, 0.2, 0.15)
    haze = (1 - torch.exp(-((t / 17) ** 2))) * (wall < 0.5)
    ground = torch.stack([gray * c for c in (1.0, 0.985, 0.96)], 1) * (1 - DARK * (1 - shade)).unsqueeze(1)
    horizon = (0.86, 0.9, 0.94)
    ground = ground + (_ramp(horizon, horizon, haze) - ground) * haze.unsqueeze(1)
    rise = (dy / a.sqrt()).clamp(min=0)
    sky = _ramp(horizon, (0.52, 0.68, 0.9), (rise * 5).clamp(max=1))
    high = ((HEIGHT + t_wall * dy) / 5).clamp(0, 1)
    plaster = _ramp((0.74, 0.72, 0.7), (0.87, 0.85, 0.83), high)
    behind = torch.where((wall > 0.5).unsqueeze(1), plaster, sky)
    return torch.where(on_floor.unsqueeze(1), ground, behind)


class Renderer:
    """`renderer(rows, frames, height, width)`: packed scenes [B, 4, 13] -> float32 [B, 3, F, H, W] in [-1, 1]."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, rows: Tensor, frames: int, height: int, width: int) -> Tensor:
        if self.device.type == "cuda":
            from fastdit.apps.tiny.world import render_gpu

            return render_gpu.draw(rows.to(self.device, non_blocking=True), frames, height, width)
        return self._render(rows, frames, height, width, None)

    @torch.no_grad()
    def with_truth(self, rows: Tensor, frames: int, height: int, width: int) -> tuple[Tensor, Truth]:
        """The clips, and what is where in them."""
        shape = (len(rows), 3, frames, height, width)
        masks, whole = (torch.zeros(shape, device=self.device) for _ in range(2))
        video = self._render(rows, frames, height, width, (masks, whole))
        dev = rows.to(self.device)
        places = [middle(dev[:, i], dev[:, 3], frames, height, width) for i in range(3)]
        return video, Truth(masks, whole, torch.stack(places, 1))

    def _points(self, height: int, width: int, ox: float, oy: float) -> tuple[Tensor, Tensor]:
        short = min(height, width)
        u = (torch.arange(width, device=self.device) + ox - width / 2) * (2 / short)
        v = -(torch.arange(height, device=self.device) + oy - height / 2) * (2 / short)
        return u.repeat(height), v.repeat_interleave(width)

    def _render(self, rows: Tensor, frames: int, height: int, width: int, truth: tuple[Tensor, Tensor] | None) -> Tensor:
        B, P = len(rows), height * width
        kinds = rows[:, :3, 0].flatten().long().tolist()  # rows come from the CPU: no wait for the device
        dev = rows.to(self.device, non_blocking=True)
        things, scene = dev[:, :3].reshape(-1, OBJECT), dev[:, 3]
        view = tuple(c[:, :, None] for c in camera(scene, frames))
        groups = []
        for k in range(len(MEET)):
            index = [i for i, kind in enumerate(kinds) if kind == k]
            if index:
                at = torch.tensor(index).to(self.device, non_blocking=True)
                chosen = things[at]
                pose = tuple(c[:, :, None] for c in motion(chosen, frames))
                groups.append((k, at, tuple(c[at // 3] for c in view), pose, chosen[:, 1].view(-1, 1, 1)))
        u, v = self._points(height, width, 0.5, 0.5)
        shade = torch.ones(B * 3, frames, P, device=self.device)
        for k, at, seen, pose, r in groups:
            shade[at] = _shade(DISTANCE[k], seen, pose, u, v, r)
        shade = shade.view(B, 3, frames, P).prod(1)
        floor, wall = scene[:, 0].view(-1, 1, 1), scene[:, 1].view(-1, 1, 1)
        pixel = torch.full((1,), 2 / min(height, width), device=self.device)
        color = things[:, 10:13].view(B, 3, 3)
        total = torch.zeros(B, 3, frames, P, device=self.device)
        t = torch.full((B * 3, frames, P), FAR, device=self.device)
        light, gloss = torch.zeros_like(t), torch.zeros_like(t)
        shape = (B, 3, frames, P)
        for ox, oy in GRID:
            u, v = self._points(height, width, ox, oy)
            back = _background(view, u, v, floor, wall, pixel, shade)
            for k, at, seen, pose, r in groups:
                t[at], light[at], gloss[at] = _draw(MEET[k], seen, pose, u, v, r)
            total = _merge(total, back, t.view(shape), light.view(shape), gloss.view(shape), color)
            if truth is not None:
                depth = t.view(B, 3, frames, height, width)
                truth[1].add_(depth < FAR, alpha=1 / len(GRID))
                truth[0].add_((depth < FAR) & (depth == depth.min(1, keepdim=True).values), alpha=1 / len(GRID))
        return total.view(B, 3, frames, height, width) * 2 - 1


def _merge(total: Tensor, back: Tensor, t: Tensor, light: Tensor, gloss: Tensor, color: Tensor) -> Tensor:
    """`total` [B, 3, F, P] and what one ray a pixel sees: the nearest of three solids, or what is behind them."""
    pixel, nearest = back, torch.full_like(t[:, 0], FAR)
    for i in range(3):
        here = (color[:, i, :, None, None] * light[:, i, None] + gloss[:, i, None]).clamp(0, 1)
        pixel = torch.where((t[:, i] < nearest).unsqueeze(1), here, pixel)
        nearest = torch.minimum(nearest, t[:, i])
    return total + pixel / len(GRID)
