"""Wan 2.1 and 2.2 (text, image and video to video, VACE, Animate) and its kin SkyReels-V2, ChronoEdit, AnyFlow and Helios."""

from __future__ import annotations

from typing import Any, ClassVar

from fastdit.pipelines.family import REST, Facts, Family, grid_of


class Wan(Family):
    """hidden_states [B, C, T, H, W], cut into patches of `config.patch_size`; timestep = 1000 σ, one or many a sample.

    Wan 2.2 has two denoisers, each with sites of its own. SkyReels' diffusion forcing masks whole blocks of frames causally:
    such calls stay dense.
    """

    names = ("hidden_states", "timestep")
    skips: ClassVar[dict[str, str]] = {"attn2": "cross-attention", "face_adapter": "cross-attention"}
    order: ClassVar[tuple[str, ...]] = ("vace_blocks", "blocks")
    even: ClassVar[bool | None] = False

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        return Facts(grid_of(call["hidden_states"], model.config.patch_size), self.noise(model, call))


class AnyFlow(Wan):
    """hidden_states [B, T, C, H, W]; timestep is where a step starts from."""

    even = None

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        grid = grid_of(call["hidden_states"], model.config.patch_size, frames=1)
        return Facts(grid, self.noise(model, call))


class Helios(Wan):
    """Frames of before come first, at full, half and quarter size: exact for all."""

    even = None
    text = "apart (cross-attention)"
    note = "earlier frames count as text"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        return super().read(model, call)._replace(before=REST)
