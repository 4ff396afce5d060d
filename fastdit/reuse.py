"""Which statistics serve how many steps: the setting. What is done with them, and where it comes from, is in `memory.py`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

KINDS = ("none", "retention", "ratio", "residual", "broadcast")
STORES = ("float32", "bfloat16", "fp8")


@dataclass(frozen=True)
class Reuse:
    """kind: one of `KINDS`. refresh: a dense step every so many, at least two (the paper: 5). ramp: λ (the paper: .04; its
    ablation over 0 … .04 is within noise). store: type of R, "fp8" with a scale a row; host: keep R in the CPU's memory, where
    it also goes when the GPU has no room. maps: steps that a dynamic policy's tile map serves (and so the trades of the heads
    that `SpatialTemporal` tells apart); with statistics whole refreshes, as they hold for one map only."""

    kind: str = "none"
    refresh: int = 5
    ramp: float = 0.04
    store: str = "bfloat16"
    host: bool = False
    maps: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"reuse: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.store not in STORES:
            raise ValueError(f"reuse: store must be one of {', '.join(STORES)}, got {self.store!r}")
        if self.refresh < 1 or self.maps < 1 or not 0 <= self.ramp <= 1:
            raise ValueError(
                f"reuse: refresh >= 1, maps >= 1 and ramp in [0, 1] must hold, got {self.refresh}, {self.maps} and {self.ramp}"
            )
        if self.kind != "none" and self.refresh == 1:
            raise ValueError(f"reuse: refresh=1 makes every step dense and nothing is reused: use >= 2, or no {self.kind}")

    @property
    def map_age(self) -> int:
        """Steps that a tile map serves: with statistics, whole refreshes."""
        return self.maps if self.kind == "none" else math.ceil(self.maps / self.refresh) * self.refresh

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Reuse:
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"reuse: {error}") from None

    def __str__(self) -> str:
        if self.kind == "none":
            return f"maps for {self.maps}" if self.maps > 1 else "none"
        return f"{self.kind}, refresh {self.refresh}"
