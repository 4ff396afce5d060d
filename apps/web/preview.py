"""Previews of latents, as pictures."""

from __future__ import annotations

from typing import Any

from fastdit.apps.web import html

SIDE = 160  # pixels of a preview's frame


def preview(latents: Any) -> str:
    """The first, middle and last frame of latents [1, C, T, H, W] or [1, C, H, W], as a data URL; "" for other shapes.

    The three directions in which the channels vary most become red, green and blue, so shapes are true and colours are not.
    """
    import torch
    from PIL import Image

    if latents.ndim == 4:
        latents = latents[:, :, None]
    if latents.ndim != 5 or latents.shape[1] < 3:
        return ""
    count = latents.shape[2]
    chosen = latents[0, :, sorted({0, count // 2, count - 1})].float().cpu()
    rows = chosen.flatten(1).T
    rows = rows - rows.mean(0)
    _, axes = torch.linalg.eigh(rows.T @ rows)
    axes = axes[:, -3:]
    axes = axes * axes.sum(0).sign()  # the sign of an axis is arbitrary: colours would flicker
    seen = rows @ axes
    low, high = seen.quantile(0.02, 0), seen.quantile(0.98, 0)
    seen = ((seen - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).mul(255).byte()
    frames = seen.reshape(*chosen.shape[1:], 3)
    strip = torch.cat(list(frames), 1).numpy()
    scale = SIDE / max(frames.shape[1:3])
    size = (round(strip.shape[1] * scale), round(strip.shape[0] * scale))
    return html.data_url(Image.fromarray(strip).resize(size, Image.Resampling.BICUBIC))
