"""How near two clips are: PSNR and SSIM over frames [F, H, W, 3] in [0, 1], and the relative error of tensors.

Both compare a clip with the dense one of the same seed: closeness, not quality. A good video whose details fell out
otherwise can have 15 to 20 dB.

SSIM: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment" (2004): Gaussian window 11 × 11 with σ = 1.5,
K1 = 0.01, K2 = 0.03, on each colour channel, only where the window lies wholly inside the frame; mean over everything.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over the whole clip, of a range of 1; infinite where the two are equal."""
    _same_shape(a, b)
    mse = (a.double() - b.double()).square().mean().item()
    return math.inf if mse == 0 else -10 * math.log10(mse)


def flicker(a: Tensor, b: Tensor) -> float | None:
    """PSNR in dB of the changes from frame to frame: low where only one of the clips flickers. None: a single frame."""
    _same_shape(a, b)
    return psnr(a.diff(dim=0), b.diff(dim=0)) if len(a) > 1 else None


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of two clips, at most 1. Raises ValueError for frames smaller than the window."""
    _same_shape(a, b)
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs frames of at least {WINDOW} x {WINDOW} pixels, got {tuple(a.shape[1:3])}")
    offset = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    g = torch.exp(-(offset**2) / (2 * SIGMA**2))
    g = g / g.sum()

    def smooth(x: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(x, g.view(1, 1, 1, -1)), g.view(1, 1, -1, 1))

    total = 0.0
    for x, y in zip(a.double(), b.double(), strict=True):  # frame by frame: float64 of a whole clip is large
        x, y = (z.permute(2, 0, 1)[:, None] for z in (x, y))
        mx, my = smooth(x), smooth(y)
        xx, yy, xy = smooth(x * x) - mx * mx, smooth(y * y) - my * my, smooth(x * y) - mx * my
        total += ((2 * mx * my + C1) * (2 * xy + C2) / ((mx * mx + my * my + C1) * (xx + yy + C2))).mean().item()
    return total / len(a)


def relative_error(out: Tensor, reference: Tensor) -> float:
    """|out − reference| / |reference|, Euclidean norms over all elements; 0 is equal, 1 as wrong as nothing at all."""
    _same_shape(out, reference)
    return ((out.double() - reference.double()).norm() / reference.double().norm()).item()


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"cannot compare {tuple(a.shape)} with {tuple(b.shape)}")
