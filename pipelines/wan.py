"""Wan 2.1 and 2.2 (text, image and video to video): self-attention over video tokens alone; text has attention of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastdit.handle import Facts

TRAIN_TIMESTEPS = 1000


class Wan:
    """hidden_states [B, C, T, H, W], cut into patches of `config.patch_size`; timestep = 1000 σ, [B] or [B, tokens]."""

    def sites(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        for name, module in model.named_modules():
            if getattr(module, "is_cross_attention", None) is False and hasattr(module, "processor"):
                yield name, module

    def left(self, model: nn.Module) -> Iterator[tuple[str, str]]:
        for name, module in model.named_modules():
            if getattr(module, "is_cross_attention", None) and hasattr(module, "processor"):
                yield name, "cross-attention"

    def facts(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Facts:
        hidden_states, timestep = (
            kwargs[name] if name in kwargs else args[position] for position, name in enumerate(("hidden_states", "timestep"))
        )
        t, h, w = (side // patch for side, patch in zip(hidden_states.shape[2:], model.config.patch_size, strict=True))
        return Facts((t, h, w), timestep / TRAIN_TIMESTEPS)
