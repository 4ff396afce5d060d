"""Flux and those built like it: text first, then the image, packed, whose coordinates only `img_ids` tells."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdit.pipelines.family import REST, Facts, Family, length


class Flux(Family):
    """img_ids [N, 3] = (picture, row, column) of each image token; reference pictures (Kontext) follow the one being drawn.

    timestep is σ already.
    """

    names: ClassVar[tuple[str, ...]] = (
        "hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids",
    )  # fmt: skip
    skips: ClassVar[dict[str, str]] = {}
    packs = 2
    even: ClassVar[bool | None] = True
    text = "before"
    full = 1.0

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        ids = call["img_ids"]
        grid = coordinates(ids[0] if ids.ndim == 3 else ids)
        return Facts(grid, self.noise(model, call), length(call.get("encoder_hidden_states")), REST)


def coordinates(ids: Tensor) -> Tensor:
    """Sides (1, H, W), int64 tensor, of the first picture among ids [N, ≥ 3], whose columns 1 and 2 count rows and columns."""
    first = ids[:, 0] == ids[0, 0]
    h, w = (torch.where(first, ids[:, axis] - ids[0, axis], 0).amax() + 1 for axis in (1, 2))
    return torch.stack([torch.ones_like(h), h, w]).to(torch.int64)


class Chroma(Flux):
    mask = "padded text, cut"
    note = "a mask of numbers 0 and 1, which ChromaPipeline passes, is added and hides nothing: such calls stay dense"
    names = ("hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids", "attention_mask")


class Unpooled(Flux):
    """LongCat-Image and Ovis-Image: no pooled text."""

    names = ("hidden_states", "encoder_hidden_states", "timestep", "img_ids", "txt_ids")


class Flux2(Unpooled):
    """img_ids [B, N, 4] = (picture, row, column, 0)."""

    even = None


class Bria(Flux):
    """timestep = 1000 σ."""

    full = 1000.0


class Flux3(Flux2):
    """Blocks of the image by itself, then joint ones: text, image, and reference pictures, which are another argument."""

    skips: ClassVar[dict[str, str]] = {"txt_mode_blocks": "text refiner", "image_cond": "reference pictures"}
    order: ClassVar[tuple[str, ...]] = ("mode_blocks", "single_transformer_blocks")

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        return super().read(model, call)._replace(after=length(call.get("image_cond_hidden_states")))
