"""How close two clips are: PSNR, SSIM, MS-SSIM and flicker over frames [F, H, W, 3] in [0, 1].

They compare a clip with the dense one of the same seed: they measure closeness, not quality. A good video with other details
can have 15 to 20 dB.

SSIM: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment" (2004): Gaussian window 11 × 11 with σ = 1.5,
K1 = 0.01, K2 = 0.03, on each colour channel, only where the window lies wholly inside the frame; mean over everything.

MS-SSIM: Wang, Simoncelli, Bovik, "Multi-scale structural similarity" (2003): contrast · structure of five scales, each half the
one before (means of 2 × 2 pixels), and luminance of the last, each to the power of its weight; mean over frames and channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
ALEXNET = "alexnet-owt-7be5be79.pth"
"""File name of torchvision's ImageNet weights."""


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over the whole clip, for a range of 1; infinite if the clips are equal."""
    _same_shape(a, b)
    mse = sum((x.double() - y.double()).square().mean().item() for x, y in zip(a, b, strict=True)) / len(a)
    return math.inf if mse == 0 else -10 * math.log10(mse)


def flicker(a: Tensor, b: Tensor) -> float | None:
    """PSNR in dB of the changes from frame to frame: low if only one of the clips flickers. None for a single frame."""
    _same_shape(a, b)
    return psnr(a.diff(dim=0), b.diff(dim=0)) if len(a) > 1 else None


def flicker_change(a: Tensor, b: Tensor) -> float | None:
    """How much more a flickers than b: mean |a[f+1] − a[f]| minus mean |b[f+1] − b[f]|, over frames, pixels and channels, for a
    range of 1. Above 0: a changes more from frame to frame; 0 also for two clips that change alike in other places. None for a
    single frame."""
    _same_shape(a, b)
    if len(a) < 2:
        return None
    return (a.double().diff(dim=0).abs().mean() - b.double().diff(dim=0).abs().mean()).item()


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of two clips, at most 1. Raises ValueError for frames smaller than the window."""
    _same_shape(a, b)
    if min(a.shape[1:3]) < WINDOW:
        raise ValueError(f"SSIM needs frames of at least {WINDOW} x {WINDOW} pixels, got {tuple(a.shape[1:3])}")
    return sum(_similarity(x, y)[0].mean().item() for x, y in _channels(a, b)) / len(a)


def ms_ssim(a: Tensor, b: Tensor) -> tuple[float, int]:
    """(multi-scale SSIM, scales). Raises ValueError for frames smaller than the window.

    Frames under 176 pixels have no room for the window at all five scales: they get those that fit, with the weights
    scaled to a sum of 1, and such numbers compare with others of as many scales only.
    """
    _same_shape(a, b)
    least = min(a.shape[1:3])
    scales = next((n for n in range(len(WEIGHTS), 0, -1) if least // 2 ** (n - 1) >= WINDOW), 0)
    if not scales:
        raise ValueError(f"MS-SSIM needs frames of at least {WINDOW} x {WINDOW} pixels, got {tuple(a.shape[1:3])}")
    weights = torch.tensor(WEIGHTS[:scales], dtype=torch.float64)
    weights = (weights / weights.sum())[:, None]
    total = 0.0
    for x, y in _channels(a, b):
        factors = []
        for scale in range(scales):
            if scale:
                x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
            whole, structure = _similarity(x, y)
            factors.append((whole if scale == scales - 1 else structure).mean((1, 2, 3)))
        # a negative correlation has no real power
        total += (torch.stack(factors).clamp(min=0) ** weights).prod(0).mean().item()
    return total / len(a), scales


def _channels(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of frames [3, 1, H, W] in float64, one at a time: a whole clip would be large."""
    for x, y in zip(a, b, strict=True):
        yield x.double().permute(2, 0, 1)[:, None], y.double().permute(2, 0, 1)[:, None]


def _similarity(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(SSIM, its factor of contrast and structure) at every place of the window; x, y [C, 1, H, W]."""
    offset = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    g = torch.exp(-(offset**2) / (2 * SIGMA**2))
    g = g / g.sum()

    def smooth(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, g.view(1, 1, 1, -1)), g.view(1, 1, -1, 1))

    mx, my = smooth(x), smooth(y)
    xx, yy, xy = smooth(x * x) - mx * mx, smooth(y * y) - my * my, smooth(x * y) - mx * my
    structure = (2 * xy + C2) / (xx + yy + C2)
    return (2 * mx * my + C1) / (mx * mx + my * my + C1) * structure, structure


def lpips(a: Tensor, b: Tensor) -> tuple[float | None, str]:
    """(mean LPIPS of the frames by AlexNet, "") or (None, why not): it never downloads weights.

    Zhang et al., "The unreasonable effectiveness of deep features as a perceptual metric" (2018); 0 is equal.
    """
    _same_shape(a, b)
    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    try:
        import torchvision  # noqa: F401  (torchmetrics' function exists without it, and fails)
        from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as distance
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that was built for another torch
        return None, f"torchmetrics and torchvision are needed: pip install 'fastdit[metrics]' ({error})"
    if not weights.is_file():
        return None, f"no weights of AlexNet at {weights}"
    with torch.no_grad():
        left, right = ([z.float().permute(2, 0, 1)[None] for z in clip] for clip in (a, b))
        each = [distance(x, y, net_type="alex", normalize=True).item() for x, y in zip(left, right, strict=True)]
    return sum(each) / len(each), ""


def _same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"cannot compare {tuple(a.shape)} with {tuple(b.shape)}")
