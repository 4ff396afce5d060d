"""What a policy is: one question, *where is attention exact?*, answered as a tile map."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from fastdit.layout import Layout


@runtime_checkable
class Policy(Protocol):
    """A frozen dataclass with one method. Text, padding, the diagonal, precision and steps are never its business."""

    name: ClassVar[str]
    static: ClassVar[bool]
    """True when the tile map follows from the layout alone, so that it can be kept for the whole run."""

    def select(self, layout: Layout, q: Tensor | None, k: Tensor | None) -> Tensor:
        """Video tiles to attend exactly, bool [b, h, video_tiles, video_tiles]; b and h may be 1 (shared).

        q and k are the video tokens in tile order, [B, H, video_tiles, tile_tokens, D], or None for a static policy.
        """
        ...

    def __hash__(self) -> int: ...

    def to_dict(self) -> dict[str, Any]: ...
