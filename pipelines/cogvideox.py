"""CogVideoX (text and image to video) and ConsisID: text first, then the video, in one sequence without a mask."""

from __future__ import annotations

from typing import Any, ClassVar

from fastdit.pipelines.family import Facts, Family, grid_of, length


class CogVideoX(Family):
    """hidden_states [B, T, C, H, W]; CogVideoX-1.5 cuts time into patches as well (`patch_size_t`)."""

    skips: ClassVar[dict[str, str]] = {}
    even = False
    text = "before"

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        config = model.config
        patch = (getattr(config, "patch_size_t", None) or 1, config.patch_size, config.patch_size)
        grid = grid_of(call["hidden_states"], patch, frames=1)
        return Facts(grid, self.noise(model, call), before=length(call.get("encoder_hidden_states")))
