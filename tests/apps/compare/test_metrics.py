"""PSNR and SSIM against slow float64 references and what must hold of them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdit.apps.compare.metrics import flicker, flicker_change, lpips, ms_ssim, psnr, ssim


def clip(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(shape or (2, 15, 17, 3), generator=torch.Generator().manual_seed(seed))


def slow_ssim(a: np.ndarray, b: np.ndarray) -> float:
    """The paper's formula, window by window, with a two-dimensional Gaussian and weighted central moments."""
    offset = np.arange(11) - 5
    weight = np.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    values = []
    frames, height, width, channels = a.shape
    for f in range(frames):
        for c in range(channels):
            for y in range(height - 10):
                for x in range(width - 10):
                    p, q = (z[f, y : y + 11, x : x + 11, c] for z in (a, b))
                    mp, mq = (weight * p).sum(), (weight * q).sum()
                    vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
                    cov = (weight * (p - mp) * (q - mq)).sum()
                    c1, c2 = 0.01**2, 0.03**2
                    values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize("noise", [0.01, 0.1, 1.0])
def test_ssim_is_the_papers(noise: float) -> None:
    a = clip(0).double()
    b = a + noise * clip(1).double()
    assert ssim(a, b) == pytest.approx(slow_ssim(a.numpy(), b.numpy()), abs=1e-10)


def test_psnr_of_a_known_error() -> None:
    a = clip(0)
    assert psnr(a, a.double() + 0.1) == pytest.approx(20.0, abs=1e-6)
    assert psnr(torch.zeros(1, 16, 16, 3), torch.ones(1, 16, 16, 3)) == 0.0


def test_equal_clips() -> None:
    a = clip(0)
    assert psnr(a, a.clone()) == math.inf
    assert ssim(a, a.clone()) == pytest.approx(1.0, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.001, 1.0))
def test_symmetric_bounded_and_falling_with_noise(seed: int, noise: float) -> None:
    a, noise_field = clip(seed, 1, 12, 13, 3), clip(seed + 1, 1, 12, 13, 3) - 0.5
    b, far = a + noise * noise_field, a + 2 * noise * noise_field
    assert psnr(a, b) == pytest.approx(psnr(b, a))
    assert ssim(a, b) == pytest.approx(ssim(b, a))
    assert psnr(a, far) == pytest.approx(psnr(a, b) - 20 * math.log10(2), abs=1e-3)
    assert -1 <= ssim(a, far) < ssim(a, b) <= 1


def test_inverted_texture_is_anticorrelated() -> None:
    a = clip(0)
    assert ssim(a, 1 - a) < 0


def test_flat_clips_differ_by_their_means_alone() -> None:
    x, y = 0.25, 0.75
    expected = (2 * x * y + 0.01**2) / (x * x + y * y + 0.01**2)
    a, b = torch.full((1, 16, 16, 3), x), torch.full((1, 16, 16, 3), y)
    assert ssim(a, b) == pytest.approx(expected, abs=1e-9)


def test_shapes_are_told() -> None:
    with pytest.raises(ValueError, match=r"cannot compare \(2, 15, 17, 3\) with \(2, 15, 16, 3\)"):
        psnr(clip(0), clip(0)[:, :, :16])
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(clip(0)[:, :8], clip(0)[:, :8])


def slow_ms_ssim(a: np.ndarray, b: np.ndarray, weights: list[float]) -> float:
    """The paper's formula on slow windows; scales by means of 2 x 2 pixels."""
    total = []
    for x, y in zip(a, b, strict=True):
        for c in range(3):
            p, q, value = x[..., c], y[..., c], 1.0
            for scale, power in enumerate(weights):
                if scale:
                    p, q = (z[: len(z) // 2 * 2, : z.shape[1] // 2 * 2] for z in (p, q))
                    p, q = (z.reshape(len(z) // 2, 2, z.shape[1] // 2, 2).mean((1, 3)) for z in (p, q))
                last = scale == len(weights) - 1
                value *= max(_mean_factor(p, q, luminance=last), 0) ** power
            total.append(value)
    return float(np.mean(total))


def _mean_factor(p: np.ndarray, q: np.ndarray, luminance: bool) -> float:
    offset = np.arange(11) - 5
    weight = np.exp(-(offset[:, None] ** 2 + offset[None] ** 2) / (2 * 1.5**2))
    weight /= weight.sum()
    values = []
    for y in range(p.shape[0] - 10):
        for x in range(p.shape[1] - 10):
            u, v = p[y : y + 11, x : x + 11], q[y : y + 11, x : x + 11]
            mu, mv = (weight * u).sum(), (weight * v).sum()
            c1, c2 = 0.01**2, 0.03**2
            value = (2 * (weight * (u - mu) * (v - mv)).sum() + c2) / (
                (weight * (u - mu) ** 2).sum() + (weight * (v - mv) ** 2).sum() + c2
            )
            values.append(value * ((2 * mu * mv + c1) / (mu * mu + mv * mv + c1) if luminance else 1))
    return float(np.mean(values))


def test_ms_ssim_is_the_papers() -> None:
    a = clip(0, 1, 47, 50, 3).double()
    b = (a + 0.3 * clip(1, 1, 47, 50, 3)).double()
    weights = np.array([0.0448, 0.2856, 0.3001])
    value, scales = ms_ssim(a, b)
    assert scales == 3  # 47, 23 and 11 pixels have room for the window, 5 have not
    assert value == pytest.approx(slow_ms_ssim(a.numpy(), b.numpy(), list(weights / weights.sum())), abs=1e-10)


def test_ms_ssim_scales_and_ends() -> None:
    a = clip(0, 1, 176, 180, 3)
    assert ms_ssim(a, a.clone()) == (pytest.approx(1.0, abs=1e-12), 5)
    assert ms_ssim(a[:, :175], a[:, :175].clone())[1] == 4
    assert ms_ssim(a, 1 - a)[0] == 0.0  # anticorrelated: a power of a negative number is not taken
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ms_ssim(a[:, :10], a[:, :10])


def test_flicker_sees_changes_and_not_errors_that_stay() -> None:
    a = clip(0, 4, 12, 12, 3)
    assert flicker(a, a + 0.1) == math.inf or flicker(a, a + 0.1) > 120  # rounding of the sum
    shaken = a.clone()
    shaken[::2] += 0.1
    assert flicker(a, shaken) == pytest.approx(20.0, abs=1e-4)
    assert flicker(a[:1], a[:1]) is None


def test_the_change_of_flicker_has_a_sign() -> None:
    still = torch.full((5, 12, 12, 3), 0.5)
    shaken = still.clone()
    shaken[1::2, :6] += 0.2  # half of the picture, in every other frame: a mean change of .1 from frame to frame
    assert flicker_change(shaken, still) == pytest.approx(0.1)
    assert flicker_change(still, shaken) == pytest.approx(-0.1)
    assert flicker_change(shaken, shaken.flip(2)) == 0
    assert flicker_change(still[:1], still[:1]) is None


def test_no_lpips_without_its_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    value, why = lpips(clip(0), clip(1))
    assert value is None
    assert "torchmetrics and torchvision are needed" in why or f"no weights of AlexNet at {tmp_path}" in why
    assert not list(tmp_path.rglob("*.pth"))
