"""What a denoiser was called with, written where its attention sites read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.handle import Denoiser


@dataclass(eq=False)
class Observe:
    """Forward pre-hook of a denoiser: writes the call's facts where its sites read them.

    Inside a compiled model this is traced, so it writes only what follows from the arguments.
    """

    denoiser: Denoiser

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        denoiser, facts = self.denoiser, self.denoiser.adapter.facts(model, args, kwargs)
        if isinstance(facts.grid, Tensor):
            denoiser.grid, denoiser.where = (0, 0, 0), facts.grid.to("cpu", torch.int64)
        else:
            denoiser.grid, denoiser.where = facts.grid, None
        denoiser.before, denoiser.after, denoiser.coarser = facts.before, facts.after, facts.coarser
        denoiser.ragged, denoiser.unread = facts.ragged, facts.unread
        denoiser.sigma = facts.sigma.amax().to("cpu", torch.float32)
