"""The five solids: where a ray meets each, with what normal, and how far a point is from it.

A solid of radius r rests on the plane y = 0 of its own frame. `meet` takes the components of rays o + t · d there and
returns (t, nx, ny, nz), t infinite where nothing is met; `distance` is the signed distance (a bound for the cone), used
for soft shadows. All are plain tensor operations that broadcast and compile into one kernel each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Hit = tuple[Tensor, Tensor, Tensor, Tensor]
CUBE = 0.8  # half the side
CYLINDER = (0.72, 0.85)  # radius, half the height
CONE = (0.88, 1.9)  # radius of the base, height
RING = (0.7, 0.3)  # radii of the circle in the middle of the tube, and of the tube
FAR = float("inf")
TRACE = 20  # steps of sphere tracing along a ray that comes near the ring


def _ball(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor, r: Tensor) -> Hit:
    y = oy - r
    a = dx * dx + dy * dy + dz * dz
    b = ox * dx + y * dy + oz * dz
    # the discriminant from the ray's least distance to the centre: b² - a·c would cancel
    px, py, pz = ox - b / a * dx, y - b / a * dy, oz - b / a * dz
    gap = r * r - (px * px + py * py + pz * pz)
    t = torch.where(gap > 0, (-b - (gap.clamp(min=0) * a).sqrt()) / a, FAR)
    near = torch.where(gap > 0, t, 0.0)
    return t, (ox + near * dx) / r, (y + near * dy) / r, (oz + near * dz) / r


def _cube(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor, r: Tensor) -> Hit:
    h = CUBE * r
    ix, iy, iz = (torch.where(d.abs() < 1e-6, 1e6, 1 / d) for d in (dx, dy, dz))
    y = oy - h
    ax, ay, az = -ox * ix - h * ix.abs(), -y * iy - h * iy.abs(), -oz * iz - h * iz.abs()
    bx, by, bz = -ox * ix + h * ix.abs(), -y * iy + h * iy.abs(), -oz * iz + h * iz.abs()
    near = torch.maximum(torch.maximum(ax, ay), az)
    far = torch.minimum(torch.minimum(bx, by), bz)
    t = torch.where(near < far, near, FAR)
    first = (ax >= ay) & (ax >= az)
    second = ~first & (ay >= az)
    third = ~first & ~second
    return t, -dx.sign() * first, -dy.sign() * second, -dz.sign() * third


def _cylinder(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor, r: Tensor) -> Hit:
    R, h = CYLINDER[0] * r, CYLINDER[1] * r
    y = oy - h
    a = dx * dx + dz * dz
    b = ox * dx + oz * dz
    px, pz = ox - b / a * dx, oz - b / a * dz
    gap = R * R - (px * px + pz * pz)
    side = (-b - (gap.clamp(min=0) * a).sqrt()) / a
    on_side = (gap > 0) & ((y + side * dy).abs() < h)
    top = (h - y) / torch.where(dy.abs() < 1e-6, -1e-6, dy)
    tx, tz = ox + top * dx, oz + top * dz
    on_top = (tx * tx + tz * tz < R * R) & (dy < 0) & (y > h)
    t = torch.where(on_side, side, torch.where(on_top, top, FAR))
    near = torch.where(on_side, side, 0.0)
    return t, (ox + near * dx) / R * on_side, (on_top & ~on_side).to(ox), (oz + near * dz) / R * on_side


def _cone(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor, r: Tensor) -> Hit:
    h = CONE[1] * r
    k = CONE[0] / CONE[1]
    y = h - oy  # measured down from the tip; the cone is x² + z² = (k y)²
    a = dx * dx + dz * dz - k * k * dy * dy
    b = ox * dx + oz * dz + k * k * y * dy
    c = ox * ox + oz * oz - k * k * y * y
    root = (b * b - a * c).clamp(min=0).sqrt()
    t = (-b - root) / torch.where(a.abs() < 1e-6, 1e-6, a)
    down = y - t * dy
    met = (b * b - a * c > 0) & (down > 0) & (down < h)
    near = torch.where(met, t, 0.0)
    nx, nz = ox + near * dx, oz + near * dz
    norm = (nx * nx + nz * nz).sqrt().clamp(min=1e-6) * (1 + k * k) ** 0.5
    return torch.where(met, t, FAR), nx / norm, torch.full_like(nx, k / (1 + k * k) ** 0.5), nz / norm


def _ring(ox: Tensor, oy: Tensor, oz: Tensor, dx: Tensor, dy: Tensor, dz: Tensor, r: Tensor) -> Hit:
    """Standing upright, its hole along z: no short closed form in float32, so it is traced through its own sphere."""
    R, tube = RING[0] * r, RING[1] * r
    y = oy - r
    length = (dx * dx + dy * dy + dz * dz).sqrt()
    ux, uy, uz = dx / length, dy / length, dz / length
    b = ox * ux + y * uy + oz * uz
    px, py, pz = ox - b * ux, y - b * uy, oz - b * uz
    gap = r * r * 1.001 - (px * px + py * py + pz * pz)
    t = -b - gap.clamp(min=0).sqrt()
    d = torch.zeros_like(t)
    for _ in range(TRACE):
        x_, y_, z_ = ox + t * ux, y + t * uy, oz + t * uz
        q = (x_ * x_ + y_ * y_).sqrt() - R
        d = (q * q + z_ * z_).sqrt() - tube
        t = t + d
    x_, y_, z_ = ox + t * ux, y + t * uy, oz + t * uz
    rho = (x_ * x_ + y_ * y_).sqrt().clamp(min=1e-6)
    q = rho - R
    met = (gap > 0) & (d.abs() < 0.02 * r) & (t + b < r)
    return torch.where(met, t / length, FAR), x_ / rho * q / tube, y_ / rho * q / tube, z_ / tube


def _far_ball(x: Tensor, y: Tensor, z: Tensor, r: Tensor) -> Tensor:
    return (x * x + (y - r) ** 2 + z * z).sqrt() - r


def _far_cube(x: Tensor, y: Tensor, z: Tensor, r: Tensor) -> Tensor:
    h = CUBE * r
    a, b, c = x.abs() - h, (y - h).abs() - h, z.abs() - h
    outside = (a.clamp(min=0) ** 2 + b.clamp(min=0) ** 2 + c.clamp(min=0) ** 2).sqrt()
    return outside + torch.maximum(torch.maximum(a, b), c).clamp(max=0)


def _far_cylinder(x: Tensor, y: Tensor, z: Tensor, r: Tensor) -> Tensor:
    R, h = CYLINDER[0] * r, CYLINDER[1] * r
    a, b = (x * x + z * z).sqrt() - R, (y - h).abs() - h
    return (a.clamp(min=0) ** 2 + b.clamp(min=0) ** 2).sqrt() + torch.maximum(a, b).clamp(max=0)


def _far_cone(x: Tensor, y: Tensor, z: Tensor, r: Tensor) -> Tensor:
    k = CONE[0] / CONE[1]
    slope = ((x * x + z * z).sqrt() - (CONE[1] * r - y) * k) / (1 + k * k) ** 0.5
    return torch.maximum(slope, -y)


def _far_ring(x: Tensor, y: Tensor, z: Tensor, r: Tensor) -> Tensor:
    q = (x * x + (y - r) ** 2).sqrt() - RING[0] * r
    return (q * q + z * z).sqrt() - RING[1] * r


# in the order of scene.SOLIDS
MEET: tuple[Callable[..., Hit], ...] = (_ball, _cube, _cylinder, _cone, _ring)
DISTANCE: tuple[Callable[..., Tensor], ...] = (_far_ball, _far_cube, _far_cylinder, _far_cone, _far_ring)
