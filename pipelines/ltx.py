"""LTX-Video and LTX-2: packed video tokens by themselves; sound and text have attention of their own.

Conditions (keyframes, reference videos, overlaps of windows) are further tokens of the same sequence, before the video or
behind it. Only `video_coords`, in pixels and seconds, tells where the video begins or ends there.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdit.core.layout import Grid
from fastdit.pipelines.family import REST, Facts, Family


class LTX(Family):
    """hidden_states [B, N, C], the sides given as `num_frames`, `height`, `width` (of latents), or video_coords [B, 3, N] where
    each token begins; timestep = 1000 σ, one or many a sample.

    LTXConditionPipeline gives coordinates alone, and puts conditions before the video. LTXI2VLongMultiPromptPipeline gives
    sides of 1 besides, which the model does not read, and puts them behind it.
    """

    names: ClassVar[tuple[str, ...]] = (
        "hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask", "num_frames", "height", "width",
        "rope_interpolation_scale", "video_coords",
    )  # fmt: skip
    even: ClassVar[bool | None] = True
    mask = "of text, in cross-attention"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        if "video_coords" not in call:
            return Facts(_sides(model, call), self.noise(model, call))
        coords = call["video_coords"][0]
        if "num_frames" in call:
            return Facts(raster(coords), self.noise(model, call), after=REST)
        return Facts(raster(_backwards(coords)), self.noise(model, call), before=REST)


class LTX2(LTX):
    """video_coords [B, 3, N, 2]: where each token begins and ends. Conditions lie behind the video, whose sides are given, or
    not (the DFR pipelines)."""

    names = (
        "hidden_states", "audio_hidden_states", "encoder_hidden_states", "audio_encoder_hidden_states", "timestep",
        "audio_timestep", "sigma", "audio_sigma", "encoder_attention_mask", "audio_encoder_attention_mask", "num_frames",
        "height", "width", "fps", "audio_num_frames", "video_coords",
    )  # fmt: skip
    skips: ClassVar[dict[str, str]] = {
        "attn2": "cross-attention",
        "audio_attn1": "sound",
        "audio_attn2": "sound",
        "audio_to_video_attn": "sound",
        "video_to_audio_attn": "sound",
    }

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        coords = call.get("video_coords")
        if coords is None or all(name in call for name in ("num_frames", "height", "width")):
            return Facts(_sides(model, call), self.noise(model, call), after=REST)
        if coords.ndim != 4:
            raise ValueError("video_coords do not say where tokens end")
        begins, ends = coords[0].unbind(-1)
        return Facts(raster(begins, ends), self.noise(model, call), after=REST)


def _sides(model: Any, call: dict[str, Any]) -> Grid:
    config = model.config
    patches = {"num_frames": config.patch_size_t, "height": config.patch_size, "width": config.patch_size}
    t, h, w = (call[name] // patch for name, patch in patches.items())
    return t, h, w


def raster(begins: Tensor, ends: Tensor | None = None) -> Tensor:
    """Sides (T, H, W), int64, of the grid in raster order that a sequence of tokens starts with.

    begins, ends: where tokens begin and end in (time, height, width), [3, N]. The next token, row or frame is one that begins
    where the last one ends; without `ends`, one that begins behind the last.
    """
    last, now, first = begins[:, :-1], begins[:, 1:], begins[:, :1]
    same, back = now == last, now == first
    next_ = now > last if ends is None else now == ends[:, :-1]
    column = same[0] & same[1] & next_[2]
    row = same[0] & next_[1] & back[2]
    frame = next_[0] & back[1] & back[2]
    token = torch.arange(1, begins.shape[1], dtype=torch.int64, device=begins.device)
    w = _lead(column)
    within = torch.where(token % w == 0, row, column)
    h = _lead(within) // w
    t = _lead(torch.where(token % (h * w) == 0, frame, within)) // (h * w)
    return torch.stack([t, h, w])


def _lead(goes_on: Tensor) -> Tensor:
    """Of tokens of which all but the first are marked as going on or not, bool [N − 1]: how many in front belong together."""
    return goes_on.to(torch.int64).cumprod(0).sum() + 1


def _backwards(begins: Tensor) -> Tensor:
    """Coordinates [3, N] of the tokens from the last to the first, growing as the others do. The video begins at 0: what lies
    before that, an earlier frame, ends it."""
    back = -begins.float().flip(1)
    return back.masked_fill(back > 0, float("nan"))
