"""HunyuanVideo, HunyuanVideo-1.5, FramePack and HunyuanImage: one sequence of video and, behind it, padded text that is masked.

The text refiner in front is attention of its own, over a few hundred tokens, and stays as it is.
"""

from __future__ import annotations

from typing import Any, ClassVar

from fastdit.pipelines.family import REST, Facts, Family, grid_of


class HunyuanVideo(Family):
    """hidden_states [B, C, T, H, W]; text of any kind (prompt, glyphs, image embeddings) is what lies behind the video."""

    names: ClassVar[tuple[str, ...]] = ("hidden_states", "timestep", "encoder_hidden_states")
    skips: ClassVar[dict[str, str]] = {"context_embedder": "text refiner", "context_embedder_2": "text refiner"}
    even: ClassVar[bool | None] = True
    text = "behind"
    mask = "padded text, cut"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        config = model.config
        grid = grid_of(call["hidden_states"], (config.patch_size_t, config.patch_size, config.patch_size))
        return Facts(grid, self.noise(model, call), after=REST, unread=True)


class FramePack(HunyuanVideo):
    """Earlier frames stand in front, at full, half and quarter size, with tokens of their own."""

    names = (
        "hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "image_embeds",
        "indices_latents", "guidance", "latents_clean", "indices_latents_clean", "latents_history_2x",
        "indices_latents_history_2x", "latents_history_4x", "indices_latents_history_4x",
    )  # fmt: skip
    note = "earlier frames count as text"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        facts = super().read(model, call)
        t, p = model.config.patch_size_t, model.config.patch_size
        before = 0
        for name, scale in (("latents_clean", 1), ("latents_history_2x", 2), ("latents_history_4x", 4)):
            if (x := call.get(name)) is not None:
                frames, height, width = (side + (-side) % scale for side in x.shape[-3:])
                before += (frames // (t * scale)) * (height // (p * scale)) * (width // (p * scale))
        return facts._replace(before=before)


class HunyuanImage(HunyuanVideo):
    """hidden_states [B, C, H, W] (or with frames); `patch_size` a list of as many sides."""

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        x, patch = call["hidden_states"], model.config.patch_size
        grid = grid_of(x, (1, *patch), None) if x.ndim == 4 else grid_of(x, tuple(patch))
        return Facts(grid, self.noise(model, call), after=REST, unread=True)


class MotifVideo(HunyuanVideo):
    """Layers of the decoder have the encoder's video behind theirs, in the place of text."""

    even = None
    skips: ClassVar[dict[str, str]] = {"cross_attn": "cross-attention"}
