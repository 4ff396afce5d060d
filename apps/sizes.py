"""Sizes as people write them: 33x256x256."""

from __future__ import annotations

import re

from fastdit.apps.errors import UserError

TOKENS = "time x height x width in tokens, such as 9x16x16"
FRAMES = "frames x height x width, such as 33x256x256"


def parse_size(text: str, option: str, wanted: str = TOKENS) -> tuple[int, int, int]:
    """Three whole numbers with x between. Raises UserError; wanted: what it then says that they should be."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip())
    if match is None or not all(map(int, match.groups())):
        raise UserError(f"{option}: {text.strip()!r} is not {wanted}", 2)
    return int(match[1]), int(match[2]), int(match[3])
