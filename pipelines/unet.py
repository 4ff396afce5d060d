"""UNets (Stable Diffusion 1.5 and XL, Kolors, SVD, AnimateDiff): self-attention of pictures at several resolutions.

Each frame of a video is a picture in the batch; attention over time has a dozen tokens and stays dense.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdit.core.layout import Grid
from fastdit.pipelines.family import Facts, Family, noise_level


class UNet(Family):
    """sample [B, C, H, W] or [B, C, T, H, W]; each level halves the sides, rounding up."""

    names = ("sample", "timestep", "encoder_hidden_states")
    skips: ClassVar[dict[str, str]] = {
        "attn2": "cross-attention",
        "motion_modules": "over time alone",
        "temp_attentions": "over time alone",
        "transformer_in": "over time alone",
        "temporal_transformer_blocks": "over time alone",
    }
    order: ClassVar[tuple[str, ...]] = ("down_blocks", "mid_block", "up_blocks")

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        finest, *coarser = self._levels(model, call)
        timestep = call["timestep"]
        if not isinstance(timestep, Tensor):
            kind = torch.float32 if isinstance(timestep, float) else None
            timestep = torch.tensor(timestep, dtype=kind, device="cpu")
        return Facts(finest, noise_level(timestep), coarser=tuple(coarser), timestep=timestep)

    def _levels(self, model: Any, call: dict[str, Any]) -> tuple[Grid, ...]:
        h, w = call["sample"].shape[-2:]
        grids: list[Grid] = []
        for _ in model.down_blocks:
            grids.append((1, h, w))
            h, w = (h + 1) // 2, (w + 1) // 2
        return tuple(grids)
