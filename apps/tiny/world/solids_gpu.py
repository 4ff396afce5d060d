"""`solids.py` for Triton: the same surfaces, distances and numbers, for `render_gpu.py`.

Constants stand to the right of tensors: Triton's interpreter turns `constant * tensor` into another constant.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastdit.apps.tiny.world import solids

_CUBE, _CYL_R, _CYL_H = (tl.constexpr(v) for v in (solids.CUBE, *solids.CYLINDER))
_CONE_R, _CONE_H, _CONE_N = (tl.constexpr(v) for v in (*solids.CONE, (1 + (solids.CONE[0] / solids.CONE[1]) ** 2) ** 0.5))
_RING_R, _RING_T = (tl.constexpr(v) for v in solids.RING)
_TRACE = tl.constexpr(solids.TRACE)
FAR = tl.constexpr(1e9)


@triton.jit
def positive(x):
    return tl.maximum(x, 0.0)


@triton.jit
def absolute(x):
    return tl.maximum(x, -x)


@triton.jit
def meet(kind, ox, oy, oz, dx, dy, dz, r):
    """(t, nx, ny, nz) as in `solids.MEET[kind]`, t = 1e9 for no meeting."""
    t, nx, ny, nz = dx * 0 + FAR, dx * 0, dx * 0, dx * 0
    if kind == 0:
        y = oy - r
        a = dx * dx + dy * dy + dz * dz
        b = ox * dx + y * dy + oz * dz
        px, py, pz = ox - b / a * dx, y - b / a * dy, oz - b / a * dz
        gap = r * r - (px * px + py * py + pz * pz)
        near = tl.where(gap > 0, (-b - tl.sqrt(positive(gap) * a)) / a, 0.0)
        t = tl.where(gap > 0, near, FAR)
        nx, ny, nz = (ox + near * dx) / r, (y + near * dy) / r, (oz + near * dz) / r
    elif kind == 1:
        h = r * _CUBE
        y = oy - h
        ix = tl.where(absolute(dx) < 1e-6, 1e6, 1 / dx)
        iy = tl.where(absolute(dy) < 1e-6, 1e6, 1 / dy)
        iz = tl.where(absolute(dz) < 1e-6, 1e6, 1 / dz)
        ax, ay, az = -ox * ix - h * absolute(ix), -y * iy - h * absolute(iy), -oz * iz - h * absolute(iz)
        bx, by, bz = -ox * ix + h * absolute(ix), -y * iy + h * absolute(iy), -oz * iz + h * absolute(iz)
        near = tl.maximum(tl.maximum(ax, ay), az)
        t = tl.where(near < tl.minimum(tl.minimum(bx, by), bz), near, FAR)
        first = (ax >= ay) & (ax >= az)
        second = (ay >= az) & (first == 0)
        nx = tl.where(first, tl.where(dx > 0, -1.0, 1.0), 0.0)
        ny = tl.where(second, tl.where(dy > 0, -1.0, 1.0), 0.0)
        nz = tl.where(first, 0.0, tl.where(second, 0.0, tl.where(dz > 0, -1.0, 1.0)))
    elif kind == 2:
        R, h = r * _CYL_R, r * _CYL_H
        y = oy - h
        a = dx * dx + dz * dz
        b = ox * dx + oz * dz
        px, pz = ox - b / a * dx, oz - b / a * dz
        gap = R * R - (px * px + pz * pz)
        side = (-b - tl.sqrt(positive(gap) * a)) / a
        on_side = (gap > 0) & (absolute(y + side * dy) < h)
        top = (h - y) / tl.where(absolute(dy) < 1e-6, -1e-6, dy)
        tx, tz = ox + top * dx, oz + top * dz
        on_top = tl.where(y > h, (tx * tx + tz * tz < R * R) & (dy < 0), dy < -2)  # no ray is that steep
        t = tl.where(on_side, side, tl.where(on_top, top, FAR))
        nx = tl.where(on_side, (ox + side * dx) / R, 0.0)
        ny = tl.where(on_side, 0.0, tl.where(on_top, 1.0, 0.0))
        nz = tl.where(on_side, (oz + side * dz) / R, 0.0)
    elif kind == 3:
        k = _CONE_R / _CONE_H
        y = r * _CONE_H - oy
        a = dx * dx + dz * dz - dy * dy * (k * k)
        b = ox * dx + oz * dz + y * dy * (k * k)
        c = ox * ox + oz * oz - y * y * (k * k)
        root = tl.sqrt(positive(b * b - a * c))
        hit = (-b - root) / tl.where(absolute(a) < 1e-6, 1e-6, a)
        down = y - hit * dy
        met = (b * b - a * c > 0) & (down > 0) & (down < r * _CONE_H)
        t = tl.where(met, hit, FAR)
        near = tl.where(met, hit, 0.0)
        nx, nz = ox + near * dx, oz + near * dz
        norm = tl.maximum(tl.sqrt(nx * nx + nz * nz), 1e-6) * _CONE_N
        nx, ny, nz = nx / norm, dx * 0 + k / _CONE_N, nz / norm
    else:
        R, tube = r * _RING_R, r * _RING_T
        y = oy - r
        length = tl.sqrt(dx * dx + dy * dy + dz * dz)
        ux, uy, uz = dx / length, dy / length, dz / length
        b = ox * ux + y * uy + oz * uz
        px, py, pz = ox - b * ux, y - b * uy, oz - b * uz
        gap = r * r * 1.001 - (px * px + py * py + pz * pz)
        s = -b - tl.sqrt(positive(gap))
        d = s * 0
        for _ in range(_TRACE):
            x_, y_, z_ = ox + s * ux, y + s * uy, oz + s * uz
            q = tl.sqrt(x_ * x_ + y_ * y_) - R
            d = tl.sqrt(q * q + z_ * z_) - tube
            s += d
        x_, y_, z_ = ox + s * ux, y + s * uy, oz + s * uz
        rho = tl.maximum(tl.sqrt(x_ * x_ + y_ * y_), 1e-6)
        q = (rho - R) / tube
        met = (gap > 0) & (absolute(d) < 0.02 * r) & (s + b < r)
        t = tl.where(met, s / length, FAR)
        nx, ny, nz = x_ / rho * q, y_ / rho * q, z_ / tube
    return t, nx, ny, nz


@triton.jit
def far(kind, x, y, z, r):
    """The signed distance `solids.DISTANCE[kind]`."""
    d = x
    if kind == 0:
        d = tl.sqrt(x * x + (y - r) * (y - r) + z * z) - r
    elif kind == 1:
        h = r * _CUBE
        a, b, c = absolute(x) - h, absolute(y - h) - h, absolute(z) - h
        outside = tl.sqrt(positive(a) * positive(a) + positive(b) * positive(b) + positive(c) * positive(c))
        d = outside + tl.minimum(tl.maximum(tl.maximum(a, b), c), 0.0)
    elif kind == 2:
        a, b = tl.sqrt(x * x + z * z) - r * _CYL_R, absolute(y - r * _CYL_H) - r * _CYL_H
        d = tl.sqrt(positive(a) * positive(a) + positive(b) * positive(b)) + tl.minimum(tl.maximum(a, b), 0.0)
    elif kind == 3:
        d = tl.maximum((tl.sqrt(x * x + z * z) - (r * _CONE_H - y) * (_CONE_R / _CONE_H)) / _CONE_N, -y)
    else:
        q = tl.sqrt(x * x + (y - r) * (y - r)) - r * _RING_R
        d = tl.sqrt(q * q + z * z) - r * _RING_T
    return d
