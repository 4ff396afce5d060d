"""Names of the number formats that attention is computed in; `core/quant.py` defines them.

This file does not import torch, so that configurations and presets can be read without it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Format = Literal["none", "fp8", "int8", "int4"]
Granularity = Literal["tile", "head", "tensor"]


@dataclass(frozen=True)
class Quant:
    """Number formats of Q·Kᵀ (`qk`) and P·V (`pv`); "none" is the inputs' own dtype."""

    qk: Format = "none"
    pv: Format = "none"
    smooth_q: bool = False
    smooth_k: bool = False
    smooth_v: bool = False
    granularity: Granularity = "tile"

    def __post_init__(self) -> None:
        if self.qk not in get_args(Format):
            raise ValueError(f"quant: qk must be one of {', '.join(get_args(Format))}, got {self.qk!r}")
        if self.pv not in ("none", "fp8", "int8"):
            raise ValueError(f"quant: pv must be one of none, fp8, int8 (P in [0, 1] needs more than 4 bits), got {self.pv!r}")
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"quant: granularity must be tile, head or tensor, got {self.granularity!r}")
        if self.qk == "none" and (self.smooth_q or self.smooth_k):
            raise ValueError("quant: smooth_q and smooth_k need a format for qk: without quantization they have no effect")
        if self.pv == "none" and self.smooth_v:
            raise ValueError("quant: smooth_v needs a format for pv: without quantization it has no effect")

    @property
    def is_none(self) -> bool:
        return self.qk == self.pv == "none"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Quant:
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"quant: {error}") from None

    def __str__(self) -> str:
        """qk/pv+smoothed@granularity, such as "int4/fp8+qk" or "int8/none@head"; or "none"."""
        if self.is_none:
            return "none"
        smooth = "".join(x for x in "qkv" if getattr(self, f"smooth_{x}"))
        return f"{self.qk}/{self.pv}{smooth and '+' + smooth}{'' if self.granularity == 'tile' else '@' + self.granularity}"

    @classmethod
    def parse(cls, text: str) -> Quant:
        """Inverse of `str`. Raises ValueError."""
        if text == "none":
            return cls()
        formats, _, granularity = text.partition("@")
        formats, _, smooth = formats.partition("+")
        qk, slash, pv = formats.partition("/")
        if not slash or set(smooth) - set("qkv"):
            raise ValueError(f'quant: expected "qk/pv", "qk/pv+qkv" or "qk/pv+qkv@granularity", got {text!r}')
        smoothed = {f"smooth_{x}": True for x in smooth}
        return cls.from_dict({"qk": qk, "pv": pv, "granularity": granularity or "tile", **smoothed})
