"""Outlines off the frames, and the true projection they are held against.

A solid is told from its surroundings by chroma alone (colour less brightness): shadows and patterns have next to none. The
edge of the outline lies where the chroma falls to half of its largest value near by.

`fit` places the true solid where the camera must see it: in the direction of the outline's middle, as far away as its area
demands, turned whichever way fits best. What is left to differ is the shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.apps.tiny.world.solids import FAR, MEET
from fastdit.apps.tiny.world.view import COS, HALF, HEIGHT, SIN, rays

LEAST_CHROMA = 0.1
TURNS = {1: (math.pi / 2, 18), 4: (math.pi, 24)}  # by solid: the turn after which it looks the same, and how many are tried
WINDOW = 96  # points along each side of the grid on which outlines are compared


def chroma(rgb: Tensor) -> Tensor:
    """Colour less brightness, [3, ...] -> [3, ...]."""
    return rgb - rgb.mean(0, keepdim=True)


def cover(video: Tensor, background: Tensor) -> tuple[Tensor, Tensor]:
    """Of [3, F, H, W] in 0..1: the share of each pixel that a solid covers, near edges, and the mask of these, [F, H, W]."""
    m = (chroma(video) - chroma(background)).square().sum(0).sqrt()
    size = 2 * max(1, round(min(m.shape[1:]) / 128)) + 1
    near = F.max_pool2d(m[:, None], size, 1, size // 2)[:, 0]
    share = m / near.clamp(min=LEAST_CHROMA)
    return share, (share > 0.5) & (m > LEAST_CHROMA / 2)


def pieces(mask: Tensor, least: float) -> Tensor:
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


def sample(picture: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A picture [H, W] at pixel positions x, y (a pixel's middle is at .5), linear between pixels."""
    H, W = picture.shape
    grid = torch.stack([x * 2 / W - 1, y * 2 / H - 1], -1)
    return F.grid_sample(picture[None, None].float(), grid.reshape(1, 1, -1, 2), align_corners=False)[0, 0, 0].view(x.shape)


def _met(
    solid: int, place: Tensor, turn: Tensor, radius: float, view: Tensor, x: Tensor, y: Tensor, size: tuple[int, int]
) -> Tensor:
    """Which pixels x, y [n, P] of a frame see solids at `place` [n, 3] (the lowest point), turned by `turn` [n]."""
    H, W = size
    scale = 2 / min(H, W)
    cx, cz, sin, cos = view.unbind()
    dx, dy, dz = rays((x - W / 2) * scale, (H / 2 - y) * scale, sin, cos)
    s, c = turn.sin()[:, None], turn.cos()[:, None]
    ox, oz = cx - place[:, :1], cz - place[:, 2:]
    t = MEET[solid](
        c * ox - s * oz, HEIGHT - place[:, 1:2], s * ox + c * oz, c * dx - s * dz, dy, s * dx + c * dz, torch.tensor(radius)
    )[0]
    return t < FAR


@dataclass
class Fit:
    iou: float
    turn: float
    place: Tensor  # [3]
    middle: tuple[float, float]  # pixels


def fit(mask: Tensor, solid: int, radius: float, view: Tensor) -> Fit | None:
    """The best agreement of a mask [H, W] with a solid seen by the camera `view` [4] (x, z, sine, cosine of its yaw)."""
    H, W = mask.shape
    ys, xs = torch.where(mask)
    if len(ys) < 30:
        return None
    device, points = mask.device, mask.float()
    left, right, top, bottom = float(xs.min()), float(xs.max()) + 1, float(ys.min()), float(ys.max()) + 1
    pad = 0.15 * max(right - left, bottom - top) + 2
    gx = torch.linspace(left - pad, right + pad, WINDOW, device=device)
    gy = torch.linspace(top - pad, bottom + pad, WINDOW, device=device)
    y, x = (g.flatten()[None] for g in torch.meshgrid(gy, gx, indexing="ij"))
    seen = sample(points, x, y) > 0.5
    area, mx, my = seen.sum(), (x * seen).sum() / seen.sum(), (y * seen).sum() / seen.sum()
    period, tries = TURNS.get(solid, (1.0, 1))
    turn = torch.arange(tries, device=device) * period / tries
    n = tries
    aim_x, aim_y = mx.expand(n).clone(), my.expand(n).clone()
    cell = float((gx[1] - gx[0]) * (gy[1] - gy[0]))
    scale = min(H, W) / 2 / HALF
    depth = torch.full((n,), 1.0, device=device) * radius * scale / (float(area) * cell / math.pi) ** 0.5
    sin, cos = view[2], view[3]
    best = torch.zeros(n, device=device)
    place = torch.zeros(n, 3, device=device)
    for step in range(5):
        side, up = (aim_x - W / 2) / scale * depth, (H / 2 - aim_y) / scale * depth
        ahead = COS * depth + SIN * up
        px, py, pz = (
            view[0] + cos * side + sin * ahead,
            HEIGHT + COS * up - SIN * depth - radius,
            view[1] + cos * ahead - sin * side,
        )
        place = torch.stack([px, py, pz], 1)
        there = _met(solid, place, turn, radius, view, x.expand(n, -1), y.expand(n, -1), (H, W))
        best = (there & seen).sum(1) / (there | seen).sum(1)
        if step < 4:
            count = there.sum(1).clamp(min=1)
            aim_x = aim_x + mx - (x * there).sum(1) / count
            aim_y = aim_y + my - (y * there).sum(1) / count
            depth = depth * (count / area).sqrt()
    i = int(best.argmax())
    return Fit(float(best[i]), float(turn[i]), place[i], (float(mx), float(my)))


def roundness(share: Tensor, found: Fit, solid: int, radius: float, view: Tensor, directions: int = 48) -> tuple[float, float]:
    """(deviation, aspect) of an outline's radius in many directions against the true one's: 0 and 1 for a perfect one.

    The deviation is the standard deviation of the ratio over its mean; the aspect is that of the ellipse in it.
    """
    H, W = share.shape
    angle = torch.arange(directions, device=share.device) * (2 * math.pi / directions)
    r = torch.arange(1, int(0.75 * min(H, W)) * 4, device=share.device) / 4
    x = found.middle[0] + r[None] * angle.cos()[:, None]
    y = found.middle[1] + r[None] * angle.sin()[:, None]
    inside = sample(share, x, y) > 0.5
    true = _met(
        solid, found.place[None], torch.tensor([found.turn]).to(share), radius, view, x.reshape(1, -1), y.reshape(1, -1), (H, W)
    )
    # the first way out, so that a neighbour further off does not count
    got = inside.cumprod(1).sum(1) / 4
    want = true.view(directions, -1).cumprod(1).sum(1) / 4
    ratio = got / want.clamp(min=0.25)
    if not float(ratio.sum()):  # its middle is empty: no ball at all
        return 1.0, 0.0
    ratio = ratio / ratio.mean()
    ellipse = float(torch.hypot((ratio * (2 * angle).cos()).mean(), (ratio * (2 * angle).sin()).mean())) * 2
    return float(ratio.std()), (1 - ellipse) / (1 + ellipse)
