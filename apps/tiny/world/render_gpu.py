"""`renderer.py` as one Triton kernel: what it draws, sixty times as fast, so that drawing costs training next to nothing.

One program draws a stretch of pixels of one frame and runs only the code of the solids that are there. `renderer.py` is the
reference it is tested against; nothing else may call it. Compiling `renderer.py` instead took minutes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdit.apps.tiny.world import light, view
from fastdit.apps.tiny.world.scene import OBJECT
from fastdit.apps.tiny.world.solids_gpu import FAR, absolute, far, meet, positive

_HALF, _SIN, _COS = (tl.constexpr(v) for v in (view.HALF, view.SIN, view.COS))
_HEIGHT, _WALL = tl.constexpr(view.HEIGHT), tl.constexpr(light.WALL)
_LX, _LY, _LZ = (tl.constexpr(v) for v in light.LIGHT)
_AMBIENT, _DIFFUSE, _GLOSS = (tl.constexpr(v) for v in (light.AMBIENT, light.DIFFUSE, light.GLOSS))
_SOFT, _DARK = tl.constexpr(light.SOFT), tl.constexpr(light.DARK)
_OBJECT = tl.constexpr(OBJECT)


@triton.jit
def _rays(u, v, sin, cos):
    x, y = u * _HALF, v * _HALF
    forward = y * _SIN + _COS
    return cos * x + sin * forward, y * _COS - _SIN, cos * forward - sin * x


@triton.jit
def _integral(q):
    p = q / 2 + 64
    return absolute(p - tl.floor(p) - 0.5) * 2


@triton.jit
def _wave(p, width, side):
    half = tl.minimum(tl.maximum(width / side, 0.01), 4.0) / 2
    q = p / side
    return (_integral(q + half) - _integral(q - half)) / (2 * half)


@triton.jit
def _background(cx, cz, sin, cos, u, v, floor, wall, pixel, shade):
    dx, dy, dz = _rays(u, v, sin, cos)
    down = dy < -1e-3
    t = tl.where(down, -1.0 / tl.minimum(dy, -1e-3) * _HEIGHT, 1e3)
    a, b = dx * dx + dz * dz, cx * dx + cz * dz
    t_wall = (-b + tl.sqrt(positive(b * b - a * (cx * cx + cz * cz - _WALL * _WALL)))) / a
    on_floor = tl.where(wall < 0.5, down, down & (t < t_wall))
    x, z = cx + t * dx, cz + t * dz
    wide = t * pixel * _HALF
    long = wide / tl.maximum(-dy, 0.02)
    wx = wide + (long - wide) * (1 - absolute(sin * dx + cos * dz) / tl.sqrt(a))
    pattern = u * 0
    if floor == 1:
        pattern = 0.2 * _wave(x, wx, 1.0) * _wave(z, long, 1.0)
    elif floor == 2:
        pattern = 0.15 * _wave(x, wx, 0.75)
    lit = (0.56 + pattern) * (1 - (1 - shade) * _DARK)
    haze = (1 - tl.exp(-(t / 17) * (t / 17))) * (wall < 0.5)
    rise = tl.minimum(positive(dy / tl.sqrt(a)) * 5, 1.0)
    high = tl.minimum(positive((t_wall * dy + _HEIGHT) / 5), 1.0)
    if wall > 0.5:
        br, bg, bb = 0.74 + 0.13 * high, 0.72 + 0.13 * high, 0.7 + 0.13 * high
    else:
        br, bg, bb = 0.86 - 0.34 * rise, 0.9 - 0.22 * rise, 0.94 - 0.04 * rise
    red = tl.where(on_floor, lit + (0.86 - lit) * haze, br)
    green = tl.where(on_floor, lit * 0.985 + (0.9 - lit * 0.985) * haze, bg)
    blue = tl.where(on_floor, lit * 0.96 + (0.94 - lit * 0.96) * haze, bb)
    return red, green, blue


@triton.jit
def _kernel(out, rows, view, pose, F, H, W, BLOCK: tl.constexpr):
    """out [B, 3, F, H·W]; rows [B, 4, 13]; view [B, F, 4]: x, z, sine, cosine; pose [B, 3, F, 5]: x, y, z, sine, cosine."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    f, b = tl.program_id(1), tl.program_id(2)
    rows += b * 4 * _OBJECT
    view += (b * F + f) * 4
    cx, cz, sin, cos = tl.load(view), tl.load(view + 1), tl.load(view + 2), tl.load(view + 3)
    floor, wall = tl.load(rows + 3 * _OBJECT), tl.load(rows + 3 * _OBJECT + 1)
    pixel = 2.0 / tl.minimum(H, W)
    px, py = (at % W).to(tl.float32) - W / 2, (at // W).to(tl.float32) - H / 2
    dx, dy, dz = _rays((px + 0.5) * pixel, -(py + 0.5) * pixel, sin, cos)
    t = -1.0 / tl.minimum(dy, -1e-3) * _HEIGHT
    shade = px * 0 + 1
    for i in range(3):
        kind = tl.load(rows + i * _OBJECT).to(tl.int32)
        if kind >= 0:
            p = pose + ((b * 3 + i) * F + f) * 5
            ox, oy, oz, ps, pc = tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3), tl.load(p + 4)
            r = tl.load(rows + i * _OBJECT + 1)
            gx, gz = cx + t * dx - ox, cz + t * dz - oz
            x, z = pc * gx - ps * gz, ps * gx + pc * gz
            lx, lz = pc * _LX - ps * _LZ, ps * _LX + pc * _LZ
            middle = -(x * lx + (-oy - r) * _LY + z * lz)
            least = x * 0 + 1
            for j in range(10):
                s = tl.maximum(middle + r * (0.24 * j - 1.08), 0.02)
                least = tl.minimum(least, far(kind, x + s * lx, s * _LY - oy, z + s * lz, r) / (s + 1.2) * _SOFT)
            share = tl.minimum(positive(0.5 + 0.5 * least), 1.0)
            shade *= share * share * (3 - 2 * share)
    red, green, blue = px * 0, px * 0, px * 0
    for g in range(4):
        # the rotated grid of render.GRID
        gx = 0.375 + 0.5 * (g == 1) - 0.25 * (g == 2) + 0.25 * (g == 3)
        gy = 0.125 + 0.25 * g
        u, v = (px + gx) * pixel, -(py + gy) * pixel
        cr, cg, cb = _background(cx, cz, sin, cos, u, v, floor, wall, pixel, shade)
        rx, ry, rz = _rays(u, v, sin, cos)
        nearest = px * 0 + FAR
        for i in range(3):
            kind = tl.load(rows + i * _OBJECT).to(tl.int32)
            if kind >= 0:
                p = pose + ((b * 3 + i) * F + f) * 5
                ox, oy, oz, ps, pc = tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3), tl.load(p + 4)
                row = rows + i * _OBJECT
                lx, lz = pc * _LX - ps * _LZ, ps * _LX + pc * _LZ
                ex, ez = pc * rx - ps * rz, ps * rx + pc * rz
                sx, sz = pc * (cx - ox) - ps * (cz - oz), ps * (cx - ox) + pc * (cz - oz)
                t, nx, ny, nz = meet(kind, sx, -(oy - _HEIGHT), sz, ex, ry, ez, tl.load(row + 1))
                length = tl.sqrt(ex * ex + ry * ry + ez * ez)
                hx, hy, hz = lx - ex / length, -(ry / length) + _LY, lz - ez / length
                shine = positive(nx * hx + ny * hy + nz * hz) / tl.maximum(tl.sqrt(hx * hx + hy * hy + hz * hz), 1e-3)
                s2 = shine * shine
                s8 = s2 * s2 * s2 * s2
                gloss = s8 * s8 * s8 * _GLOSS
                light = 0.08 * ny + positive(nx * lx + ny * _LY + nz * lz) * _DIFFUSE + _AMBIENT
                here = t < nearest
                cr = tl.where(here, tl.minimum(tl.load(row + 10) * light + gloss, 1.0), cr)
                cg = tl.where(here, tl.minimum(tl.load(row + 11) * light + gloss, 1.0), cg)
                cb = tl.where(here, tl.minimum(tl.load(row + 12) * light + gloss, 1.0), cb)
                nearest = tl.minimum(nearest, t)
        red += cr
        green += cg
        blue += cb
    P = H * W
    plane = b.to(tl.int64) * 0 + F * P
    o = out + b * 3 * plane + f * P + at
    tl.store(o, red / 2 - 1, mask=at < P)
    tl.store(o + plane, green / 2 - 1, mask=at < P)
    tl.store(o + 2 * plane, blue / 2 - 1, mask=at < P)


def draw(rows: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Packed scenes [B, 4, 13] on their device -> float32 [B, 3, frames, height, width] in [-1, 1]."""
    B = len(rows)
    seen = torch.stack(view.camera(rows[:, 3], frames), -1).contiguous()
    pose = torch.stack(view.motion(rows[:, :3].reshape(-1, OBJECT), frames), -1).contiguous()
    out = torch.empty(B, 3, frames, height, width, device=rows.device)
    grid = (triton.cdiv(height * width, 256), frames, B)
    _kernel[grid](out, rows.contiguous(), seen, pose, frames, height, width, BLOCK=256)
    return out
