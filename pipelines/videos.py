"""Video DiTs whose latents tell the grid and that are alike but for small things: Mochi, Allegro, EasyAnimate, Cosmos, …"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastdit.pipelines.family import REST, Facts, Family, grid_of, length, noise_level


def _grid(model: Any, call: dict[str, Any]) -> tuple[int, int, int]:
    config = model.config
    return grid_of(call["hidden_states"], (getattr(config, "patch_size_t", None) or 1, config.patch_size, config.patch_size))


class Mochi(Family):
    """The video, then the prompt's own tokens without their padding, one call a sample; timestep counts up: 1000 (1 − σ)."""

    rises = True
    skips: ClassVar[dict[str, str]] = {}
    text = "behind"
    mask = "padded text, cut by the model"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        return Facts(_grid(model, call), self.noise(model, call), after=REST)


class Allegro(Family):
    """Text by cross-attention."""

    even = False
    mask = "of text, in cross-attention"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        return Facts(_grid(model, call), self.noise(model, call))


class EasyAnimate(Family):
    """Text first, of one encoder or two."""

    names = (
        "hidden_states", "timestep", "timestep_cond", "encoder_hidden_states", "encoder_hidden_states_t5",
    )  # fmt: skip
    skips: ClassVar[dict[str, str]] = {}
    text = "before"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        before = length(call.get("encoder_hidden_states")) + length(call.get("encoder_hidden_states_t5"))
        return Facts(_grid(model, call), self.noise(model, call), before=before)


class Cosmos(Family):
    """timestep is the noise's share σ / (1 + σ) from Cosmos 2 on, and ln σ / 4 in Cosmos 1, which alone learnt positions."""

    names = ("hidden_states", "timestep", "encoder_hidden_states")

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        return Facts(grid_of(call["hidden_states"], model.config.patch_size), self.noise(model, call))

    def noise(self, model: Any, call: dict[str, Any]) -> Tensor:
        level = noise_level(call["timestep"], 1.0)
        if level.ndim == 5:  # [B, 1, T, 1, 1]: frames that are given come first, and keep a level of their own to the end
            level = level[:, :, -1]
        # Falling in every step: calls of one level count as one step, and ln σ is negative in half of Cosmos 1's.
        return level.clamp(0, 1) if model.config.extra_pos_embed_type is None else (4 * level).sigmoid()


class Latte(Family):
    """Layers over space and over time in turn: each frame is a grid of its own, and time has a dozen tokens, left dense."""

    names = ("hidden_states", "timestep")
    skips: ClassVar[dict[str, str]] = {"attn2": "cross-attention", "temporal_transformer_blocks": "over time alone"}

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        patch = model.config.patch_size
        return Facts(grid_of(call["hidden_states"], (1, patch, patch), None), self.noise(model, call))


class Kandinsky(Family):
    """hidden_states [B, T, H, W, C]; the ten-second models bring block-sparse attention of their own, which stays."""

    skips: ClassVar[dict[str, str]] = {"text_transformer_blocks": "text refiner", "cross_attention": "cross-attention"}

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        sides = zip(call["hidden_states"].shape[1:4], model.config.patch_size, strict=True)
        t, h, w = (side // patch for side, patch in sides)
        return Facts((t, h, w), self.noise(model, call))


class Kandinsky6(Kandinsky):
    """Video and sound, each with text of its own by cross-attention."""

    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    skips: ClassVar[dict[str, str]] = {
        "video_text_transformer_blocks": "text refiner",
        "audio_text_transformer_blocks": "text refiner",
        "audio_dec_block": "sound",
        "va_cross_attention": "sound",
        "av_cross_attention": "sound",
        "cross_attention": "cross-attention",
    }
