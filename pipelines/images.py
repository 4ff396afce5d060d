"""Image DiTs whose latents [B, C, H, W] tell the grid, by where the text sits."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastdit.pipelines.family import REST, Facts, Family, grid_of, length


def _grid(model: Any, call: dict[str, Any]) -> tuple[int, int, int]:
    patch = model.config.patch_size
    return grid_of(call["hidden_states"], (1, patch, patch), None)


class PixArt(Family):
    """PixArt-α and -Σ, DiT, Hunyuan-DiT, Lumina-Next: text, or the class, by cross-attention or modulation."""

    even: ClassVar[bool | None] = False
    mask = "of text, in cross-attention"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        return Facts(_grid(model, call), self.noise(model, call))


class DiT(PixArt):
    """DiT and Hunyuan-DiT: timestep is the second argument."""

    names = ("hidden_states", "timestep")


class SD3(Family):
    """Stable Diffusion 3 and 3.5: text behind the image; the second attention of dual blocks sees the image alone."""

    even: ClassVar[bool | None] = False
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    skips: ClassVar[dict[str, str]] = {}
    text = "behind"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        return Facts(_grid(model, call), self.noise(model, call), after=length(call.get("encoder_hidden_states")))


class CogView(Family):
    """CogView 3 Plus and 4: text first."""

    skips: ClassVar[dict[str, str]] = {}
    text = "before"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        return Facts(_grid(model, call), self.noise(model, call), before=length(call.get("encoder_hidden_states")))


class AuraFlow(CogView):
    """Text first, and eight learned tokens before it; timestep is σ already."""

    even: ClassVar[bool | None] = False
    full = 1.0

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        before = model.register_tokens.shape[1] + length(call.get("encoder_hidden_states"))
        return Facts(_grid(model, call), self.noise(model, call), before=before)


class Lumina2(Family):
    """Each prompt's own text first, then the image, then padding, which is cut; timestep counts up: 1 − σ."""

    even: ClassVar[bool | None] = True
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    full, rises = 1.0, True
    skips: ClassVar[dict[str, str]] = {"context_refiner": "text refiner"}
    order: ClassVar[tuple[str, ...]] = ("noise_refiner", "layers")
    text = "before"
    mask = "padding, cut"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        before = length(call.get("encoder_hidden_states"))
        return Facts(_grid(model, call), self.noise(model, call), before=before, ragged=True)


class HiDream(Family):
    """The image, then text of two encoders."""

    names = ("hidden_states", "timesteps")
    clock = "timesteps"
    skips: ClassVar[dict[str, str]] = {}
    text = "behind"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        if "hidden_states_masks" in call:
            raise ValueError("the latents are packed already")
        return Facts(_grid(model, call), self.noise(model, call), after=REST)


class ZImage(Family):
    """x: a list of latents [C, T, H, W]; the image is padded to a multiple of 32 tokens, text follows; t counts up: 1 − σ."""

    names = (
        "x", "t", "cap_feats", "return_dict", "controlnet_block_samples", "siglip_feats", "image_noise_mask", "patch_size",
        "f_patch_size",
    )  # fmt: skip
    clock, full, rises = "t", 1.0, True
    skips: ClassVar[dict[str, str]] = {"context_refiner": "text refiner", "siglip_refiner": "image refiner"}
    order: ClassVar[tuple[str, ...]] = ("noise_refiner", "layers")
    text = "behind"
    mask = "padding, cut"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        patch, frames = call.get("patch_size", 2), call.get("f_patch_size", 1)
        grid = grid_of(call["x"][0], (frames, patch, patch), 1)
        return Facts(grid, self.noise(model, call), after=REST)


class QwenImage(Family):
    """Text first, then the picture, then reference pictures, each with its sides in `img_shapes`; timestep is σ already."""

    names = ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "timestep", "img_shapes")
    full = 1.0
    skips: ClassVar[dict[str, str]] = {}
    even: ClassVar[bool | None] = True
    text = "before"
    mask = "padded text, cut"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        shapes = call["img_shapes"][0]
        t, h, w = shapes[0] if isinstance(shapes, (list, tuple)) and not isinstance(shapes[0], int) else shapes
        before = length(call.get("encoder_hidden_states"))
        return Facts((t, h, w), self.noise(model, call), before=before, after=REST, unread=True)


class Ernie(SD3):
    """ERNIE-Image: the image, then padded text."""

    even = None
    names = ("hidden_states", "timestep", "text_bth", "text_lens")
    mask = "padded text, cut"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        return Facts(_grid(model, call), self.noise(model, call), after=length(call["text_bth"]), unread=True)


class GlmImage(CogView):
    """GLM-Image: text first; timestep = 1000 σ − 1."""

    names = ("hidden_states", "encoder_hidden_states", "prior_token_id", "prior_token_drop", "timestep")
    note = "editing reads a cache of the pictures' keys, which are more than its queries: such calls stay dense"

    def noise(self, model: Any, call: dict[str, Any]) -> Tensor:
        return super().noise(model, call).clamp(0)


class Fibo2(Family):
    """Bria FIBO 2: a few tokens that a perceiver makes of the text, then the image, then pictures to edit; timestep is σ
    already. Where prompts of several lengths share a batch, what is made of the text lies behind."""

    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "context_latents")
    full = 1.0
    skips: ClassVar[dict[str, str]] = {"perceiver": "text refiner", "cross_attention": "cross-attention"}
    order: ClassVar[tuple[str, ...]] = ("noise_refiner", "layers")
    text = "before"
    mask = "of text, in cross-attention"
    note = "pictures to edit count as text; a batch of masked prompts stays dense"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        sigma, patch = self.noise(model, call), model.config.patch_size
        if "encoder_attention_mask" in call and len(call["hidden_states"]) > 1:
            raise ValueError("masked prompts of a batch may have several lengths")
        sides = (grid_of(x, (1, patch, patch), None) for x in call.get("context_latents", ()))
        after = sum(t * h * w for t, h, w in sides)
        return Facts(_grid(model, call), sigma, before=REST, after=after)
