"""MiniMax-H3: text, conditions, sound and video packed into one sequence, whose coordinates tell where the video lies."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdit.pipelines.family import REST, Facts, Family


class MiniMaxH3(Family):
    """[text | keyframes or references | sound | video]: the video that is made is what comes last, frame by frame.

    position_ids [S, 3] = (t, h, w) of every row; token_tags [S], 0 for video. timestep holds each level of the call once,
    1 − σ; rows choose by timestep_indices [S]. Both models, `transformer` and `transformer_ref`, are of this class.
    """

    names: ClassVar[tuple[str, ...]] = (
        "hidden_states", "audio_hidden_states", "encoder_hidden_states", "timestep", "timestep_indices", "token_tags",
        "position_ids",
    )  # fmt: skip
    full, rises, even = 1.0, True, False
    skips: ClassVar[dict[str, str]] = {"token_refiner": "text refiner"}
    text = "before"
    note = "conditions and sound count as text"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        t, h, _ = call["position_ids"].unbind(-1)
        sigma = self.noise(model, call)
        video = _run(call["token_tags"] != call["token_tags"][-1])
        frame = _run(t != t[-1]).minimum(video)
        row = _run((t != t[-1]) | (h != h[-1])).minimum(frame)
        return Facts(torch.stack([video // frame, frame // row, row]), sigma, before=REST)

    def latents(self, frames: int, scale: int) -> int:
        """The autoencoder makes 5 of every 17 frames, and 2 of the last 5."""
        if frames < 5 or frames % 17 != 5:
            nearest = 17 * max(0, round((frames - 5) / 17)) + 5
            raise ValueError(f"num_frames must be 17k + 5 for this model, got {frames}: nearest is {nearest}")
        return (frames - 5) // 17 * 5 + 2

    def noise(self, model: Any, call: dict[str, Any]) -> Tensor:
        """Of the video alone: sound has a schedule of its own, text and conditions next to none."""
        return super().noise(model, {"timestep": call["timestep"].index_select(0, call["timestep_indices"][-1:])})


def _run(other: Tensor) -> Tensor:
    """How many rows lie behind the last one that is another, int64."""
    at = torch.arange(1, len(other) + 1, device=other.device)
    return len(other) - torch.where(other, at, 0).amax()
