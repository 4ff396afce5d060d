"""Where the tokens of one attention call sit: which of them are the grid's, and how many others lie before and behind."""

from __future__ import annotations

import math
from typing import NamedTuple

from fastdit.core.layout import Grid
from fastdit.planning import key_padding
from fastdit.planning.adapter import REST


class Place(NamedTuple):
    """`before` other tokens, the grid in raster order, `after` other tokens."""

    grid: Grid
    before: int = 0
    after: int = 0


def find_place(
    tokens: int, grids: list[Grid], before: int, after: int, ragged: bool, kept: key_padding.Runs | None = None
) -> Place | str:
    """The place of a sequence of `tokens`, of which a mask leaves `kept`; or why that cannot be told.

    grids: those the denoiser's input makes, finest first; before, after, ragged: as in `facts.Facts`.
    """
    left = tokens if kept is None else key_padding.count(kept)
    ends = before, after
    for grid in grids:
        video = math.prod(grid)
        before, after = (tokens - video - max(0, other) if end == REST else end for end, other in (ends, ends[::-1]))
        if before < 0 or after < 0:
            continue
        if kept is not None and not ragged:
            if tokens == before + video + after:
                if key_padding.count(kept, before, before + video) < video:
                    return "the mask hides tokens of the picture"
                return Place(grid, key_padding.count(kept, 0, before), key_padding.count(kept, before + video))
        elif left == before + video + after:
            return Place(grid, before, after)
        elif kept is None and not (before and after) and video <= left < video + before + after:
            return Place(grid, left - video if before else 0, left - video if after else 0)  # text cut by the model
        elif ragged and kept is not None and len(kept) == 1 and kept[0][0] == 0 and left >= video:
            return Place(grid, left - video)
    before, after = (max(0, end) for end in ends)
    expected = " or ".join(str(before + math.prod(grid) + after) for grid in grids)
    return f"{tokens} tokens where the denoiser's input makes {expected}"
