"""LTX-Video and LTX-2: packed video tokens by themselves; sound and text have attention of their own."""

from __future__ import annotations

from typing import Any, ClassVar

from fastdit.pipelines.family import Facts, Family, noise_level


class LTX(Family):
    """hidden_states [B, T·H·W, C], the sides given as `num_frames`, `height`, `width` (of latents); timestep = 1000 σ."""

    mask = "of text, in cross-attention"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        config = model.config
        t, h, w = (
            call[name] // patch
            for name, patch in (
                ("num_frames", config.patch_size_t),
                ("height", config.patch_size),
                ("width", config.patch_size),
            )
        )
        return Facts((t, h, w), noise_level(call["timestep"]))


class LTX2(LTX):
    names = ("hidden_states", "audio_hidden_states", "encoder_hidden_states", "audio_encoder_hidden_states", "timestep")
    skips: ClassVar[dict[str, str]] = {
        "attn2": "cross-attention",
        "audio_attn1": "sound",
        "audio_attn2": "sound",
        "audio_to_video_attn": "sound",
        "video_to_audio_attn": "sound",
    }
