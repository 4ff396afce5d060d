"""What a policy is: one question, *where is attention exact?*, answered as a tile map."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from fastdit.core.layout import Layout


@dataclass(frozen=True, eq=False)
class Policy(ABC):
    """A frozen dataclass with one method. Text, padding, the diagonal, precision and steps are never its business."""

    name: ClassVar[str] = ""
    reads: ClassVar[str] = "qk"
    """Which tensors `select` looks at: "" (nothing: the map follows from the layout and is kept for the run), "qk", "qkv"."""

    @abstractmethod
    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """Video tiles to attend exactly, bool [b, h, video_tiles, video_tiles]; b and h may be 1 (shared).

        q, k and v are the video tokens in tile order, [B, H, video_tiles, tile_tokens, D], zeros in padded slots; None
        where `reads` does not name them. Logits are q·k·D^-½.
        """

    @property
    def static(self) -> bool:
        return self.reads == ""

    def to_dict(self) -> dict[str, Any]:
        """{"name": …, fields}: what `policy_from_dict` takes, ready for JSON."""
        return {"name": self.name} | {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        set_ = [f"{f.name} {_brief(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(set_)})" if set_ else self.name


def check_share(name: str, **values: float | None) -> None:
    """Raises ValueError unless exactly one of the values is given and lies in (0, 1]."""
    given = {key: value for key, value in values.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"{name}: give exactly one of {' and '.join(values)}, in (0, 1]")
    for key, value in given.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name}: {key} must lie in (0, 1], got {value}")


def _plain(value: Any) -> Any:
    if isinstance(value, Policy):
        return value.to_dict()
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _brief(value: Any) -> str:
    if isinstance(value, tuple):
        return "×".join(map(str, value)) if all(isinstance(x, int) for x in value) else ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
