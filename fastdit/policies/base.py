"""The policy interface: a policy answers one question, *where is attention exact?*, with a tile map."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from fastdit.core.layout import Layout


@dataclass(frozen=True, eq=False)
class Policy(ABC):
    """A frozen dataclass with one method. It does not handle text, padding, the diagonal, precision or steps."""

    name: ClassVar[str] = ""
    reads: ClassVar[str] = "qk"
    """Tensors that `select` needs: "" (none: the map follows from the layout and is cached), "qk" or "qkv"."""

    @abstractmethod
    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        """Video tiles to attend exactly, bool [b, h, video_tiles, video_tiles]; b and h may be 1 (shared).

        q, k and v: video tokens in tile order, [B, H, video_tiles, tile_tokens, D], zeros in padded slots; None unless
        `reads` names them. Logits are q·k·D^-½. Raises ValueError if a tensor that it reads is None.
        """

    @property
    def static(self) -> bool:
        return self.reads == ""

    def to_dict(self) -> dict[str, Any]:
        """{"name": …, fields}, ready for JSON: the input of `policy_from_dict`."""
        return {"name": self.name} | {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        set_ = [f"{f.name} {_brief(getattr(self, f.name))}" for f in fields(self) if getattr(self, f.name) != f.default]
        return f"{self.name}({', '.join(set_)})" if set_ else self.name


def check_share(name: str, **values: float | None) -> None:
    """Raise ValueError unless exactly one value is given and lies in (0, 1]."""
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
