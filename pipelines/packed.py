"""Image DiTs whose latents come packed, with coordinates: text first, or pictures first."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from fastdit.pipelines.family import REST, Facts, Family, grid_of, length
from fastdit.pipelines.flux import Flux, coordinates


class Fibo(Flux):
    """Bria FIBO: as Flux, with the layers of its text encoder; timestep = 1000 σ."""

    packs, even = 1, None
    names: ClassVar[tuple[str, ...]] = (
        "hidden_states", "encoder_hidden_states", "text_encoder_layers", "pooled_projections", "timestep", "img_ids", "txt_ids",
    )  # fmt: skip
    full = 1000.0
    mask = "padded text, cut"


class Krea2(Family):
    """Text first, then the image; position_ids [S, 3] = (0, row, column) of both; timestep is σ already."""

    names = ("hidden_states", "encoder_hidden_states", "timestep", "position_ids")
    full = 1.0
    skips: ClassVar[dict[str, str]] = {"text_fusion": "text refiner"}
    text = "before"
    mask = "padded text, cut"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        before = length(call["encoder_hidden_states"])
        grid = coordinates(call["position_ids"][before:])
        return Facts(grid, self.noise(model, call), before=before, after=REST, unread=True)


class Ideogram4(Family):
    """Padded text first, then the image; position_ids [B, S, 3] = (·, row, column); timestep = 1 − σ. Guidance is another
    model, `unconditional_transformer`, which is given the image alone."""

    names = ("hidden_states", "timestep", "encoder_hidden_states", "position_ids", "segment_ids", "indicator")
    full, rises = 1.0, True
    skips: ClassVar[dict[str, str]] = {}
    text = "before"
    mask = "by segments"
    note = "padded text is a segment that sees itself: such calls of `transformer` stay dense"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        ids, image = call["position_ids"][0], call["indicator"][0] == call["indicator"][0, -1]
        last = ids[-1]
        h, w = (last[axis] + 1 - torch.where(image, ids[:, axis], last[axis]).amin() for axis in (1, 2))
        grid = torch.stack([torch.ones_like(h), h, w]).to(torch.int64)
        return Facts(grid, self.noise(model, call), before=REST)


class JoyImage(Family):
    """hidden_states [B, C, T, H, W], or [B, items, C, T, H, W], of which the last is being drawn and comes first in the
    sequence; then the pictures to edit, then text."""

    names: ClassVar[tuple[str, ...]] = ("hidden_states", "timestep", "encoder_hidden_states")
    skips: ClassVar[dict[str, str]] = {}
    text = "behind"
    note = "pictures to edit count as text"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        x = call["hidden_states"]
        return Facts(grid_of(x, model.config.patch_size, x.ndim - 3), self.noise(model, call), after=REST)


class JoyImagePlus(JoyImage):
    """hidden_states [B, patches, C, t, h, w], padded; shape_list: the sides of each picture of each sample, in patches, the one
    that is being drawn first."""

    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_mask", "shape_list")
    mask = "padding, cut"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        first = [tuple(shapes[0]) for shapes in call["shape_list"]]
        if any(shape != first[0] for shape in first):
            raise ValueError("the samples have sides of their own")
        t, h, w = first[0]
        return Facts((t, h, w), self.noise(model, call), after=REST, unread=True)
