"""Where the tokens of a denoiser's sequence sit: the grid's tokens, and how many others come before and after them."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

from fastdit.core.layout import Grid
from fastdit.planning import key_padding
from fastdit.planning.adapter import REST
from fastdit.planning.key_padding import Runs


class SequenceSpan(NamedTuple):
    """`before` other tokens, the grid in raster order, `after` other tokens."""

    grid: Grid
    before: int = 0
    after: int = 0

    @property
    def others(self) -> int:
        return self.before + self.after

    @property
    def tokens(self) -> int:
        return math.prod(self.grid) + self.others

    @property
    def roll(self) -> int:
        """How many tokens to move from the end to the front: a layout has other tokens on one side only."""
        return self.after if self.before else 0


class SequenceSpec(NamedTuple):
    """The tokens of one denoiser call: `adapter.Facts` without tensors, so that it is hashable.

    grids: those that the denoiser's input makes, finest first. before, after, ragged, unread, missing: as in `Facts`.
    """

    grids: tuple[Grid, ...]
    before: int = 0
    after: int = 0
    ragged: bool = False
    unread: bool = False
    missing: str | None = None

    def span(self, tokens: int, kept: Runs | None = None) -> SequenceSpan | str:
        """Where the `tokens` tokens of a sequence sit, or why that is unknown. kept: tokens that a mask keeps; None: all."""
        return _span(self, tokens, kept)


@lru_cache(maxsize=1024)
def _span(spec: SequenceSpec, tokens: int, kept: Runs | None) -> SequenceSpan | str:
    left = tokens if kept is None else key_padding.count(kept)
    ends = spec.before, spec.after
    for grid in spec.grids:
        video = math.prod(grid)
        before, after = (tokens - video - max(0, other) if end == REST else end for end, other in (ends, ends[::-1]))
        if before < 0 or after < 0:
            continue
        if kept is not None and not spec.ragged:
            if tokens == before + video + after:
                if key_padding.count(kept, before, before + video) < video:
                    return "the mask hides tokens of the picture"
                return SequenceSpan(grid, key_padding.count(kept, 0, before), key_padding.count(kept, before + video))
        elif left == before + video + after:
            return SequenceSpan(grid, before, after)
        elif kept is None and not (before and after) and video <= left < video + before + after:
            return SequenceSpan(grid, left - video if before else 0, left - video if after else 0)  # text cut by the model
        elif spec.ragged and kept is not None and len(kept) == 1 and kept[0][0] == 0 and left >= video:
            return SequenceSpan(grid, left - video)
    before, after = (max(0, end) for end in ends)
    expected = " or ".join(str(before + math.prod(grid) + after) for grid in spec.grids)
    return f"{tokens} tokens where the denoiser's input makes {expected}"
