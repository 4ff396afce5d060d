"""The whole of a configuration: phases over the noise level, each naming where attention is exact and in which format.

Frozen, hashable, and the same dictionary in the command line, a benchmark row and a report. The noise level σ lies in
[0, 1]: 1 is pure noise, 0 the finished picture (for flow matching, timestep / 1000). A phase is chosen by σ and never by
a step number, so that one configuration means the same at 50 steps, at 4, and across Wan 2.2's two denoisers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from fastdit.core.number_format import Quant
from fastdit.policies import Dense, Policy, Window, policy_from_dict

if TYPE_CHECKING:
    from fastdit.core.layout import Grid

KINDS = ("none", "retention", "ratio", "residual", "broadcast")
STORES = ("float32", "bfloat16", "fp8")


@dataclass(frozen=True)
class Reuse:
    """Which statistics serve how many steps; `approx/step_cache.py` says what is done with them, and after which papers.

    kind: one of `KINDS`. refresh: a dense step every so many, at least two (the paper: 5). ramp: λ (the paper: .04; its
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


@dataclass(frozen=True)
class Phase:
    """What holds while σ is in (low, high] (σ = 0 belongs to a phase that reaches down to 0), in a range of layers.

    sigma: (high, low), the way a run passes through it. layers: (first, last), half-open, counted over the self-attention
    sites of one denoiser, negative from its end as in a slice; None is all of them. remainder: what stands in for the
    tiles that the policy drops, one of `approx.remainder.REMAINDERS`. reuse: which statistics of earlier steps serve how long.
    With `Dense()`, which drops nothing, both are without effect.
    """

    sigma: tuple[float, float] = (1.0, 0.0)
    policy: Policy = field(default_factory=Dense)
    quant: Quant = field(default_factory=Quant)
    layers: tuple[int, int | None] | None = None
    remainder: str = "none"
    reuse: Reuse = field(default_factory=Reuse)

    def __post_init__(self) -> None:
        for name in ("sigma", "layers"):
            if isinstance(pair := getattr(self, name), list):
                object.__setattr__(self, name, tuple(pair))
        if not _numbers(self.sigma) or not 1 >= self.sigma[0] > self.sigma[1] >= 0:
            raise ValueError(f"phase: sigma must be (high, low) with 1 >= high > low >= 0, got {self.sigma!r}")
        if self.layers is not None and not _slice(self.layers):
            raise ValueError(f"phase: layers must be (first, last), whole numbers as in a slice, got {self.layers!r}")
        for name, kind in (("quant", Quant), ("reuse", Reuse)):
            if not isinstance(found := getattr(self, name), kind):
                raise ValueError(f"phase: {name} must be a {kind.__name__}(...), got {found!r}")
        if self.remainder != "none":
            from fastdit.approx.remainder import REMAINDERS

            if self.remainder not in REMAINDERS:
                raise ValueError(f"phase: remainder must be one of {', '.join(REMAINDERS)}, got {self.remainder!r}")
        if not isinstance(self.policy, Policy):
            raise ValueError(f"phase: policy must be a policy such as Window(...), got {self.policy!r}")

    def holds(self, sigma: float, layer: int, layers: int) -> bool:
        high, low = self.sigma
        inside = low < sigma <= high or (low == 0 and sigma <= 0) or (high == 1 and sigma > 1)
        return inside and (self.layers is None or layer in range(layers)[slice(*self.layers)])

    def to_dict(self) -> dict[str, Any]:
        return {
            "sigma": list(self.sigma),
            "policy": self.policy.to_dict(),
            "quant": self.quant.to_dict(),
            "layers": None if self.layers is None else list(self.layers),
            "remainder": self.remainder,
            "reuse": self.reuse.to_dict(),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Phase:
        unknown = set(fields) - {"sigma", "policy", "quant", "layers", "remainder", "reuse"}
        if unknown:
            raise ValueError(f"phase: unknown field {', '.join(sorted(unknown))}")
        return cls(
            sigma=fields.get("sigma", (1.0, 0.0)),
            policy=policy_from_dict(fields.get("policy", {"name": "dense"})),
            quant=Quant.from_dict(fields.get("quant", {})),
            layers=fields.get("layers"),
            remainder=fields.get("remainder", "none"),
            reuse=Reuse.from_dict(fields.get("reuse", {})),
        )


def _numbers(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(x, (int, float)) for x in pair)


def _slice(pair: Any) -> bool:
    return isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], int) and isinstance(pair[1], int | None)


TILE = (1, 8, 8)
"""Of the presets. One frame deep: the best windows are two or three frames deep, which thicker tiles cannot express."""

BALANCED = (Phase((1.0, 0.98), Dense()), Phase((0.98, 0.0), Window(density=0.125), reuse=Reuse("residual", refresh=5)))
"""Phases of the default preset; `presets.py` says how they were chosen."""


@dataclass(frozen=True)
class Config:
    """All of fastdit's settings for one pipeline. The first phase that holds wins; where none holds, attention is dense.

    tile: tokens (t, h, w) of a tile; None fits one of about `tile_tokens` to each grid (`layout.fit_tile`).
    min_tokens: shorter sequences stay dense; max_density: so do tile maps denser than this. Both mark where the bookkeeping
    costs more than it saves: on CPU, attention is under half of a denoiser's time below 2,300 tokens. first_frame: every tile
    attends the first latent frame as well, which many video models use as a sink.
    error_budget: relative L2 error that a site's output may have, measured on a few query rows of each call (`error_guard.py`);
    None measures nothing. Given one without phases, those of the default preset are taken, and its tile if there is none.
    strict: raise where a site would be left dense for want of something, instead of reporting it.
    """

    phases: tuple[Phase, ...] = ()
    tile: Grid | None = None
    tile_tokens: int = 64
    min_tokens: int = 4096
    max_density: float = 0.75
    first_frame: bool = False
    error_budget: float | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        if wrong := [phase for phase in self.phases if not isinstance(phase, Phase)]:
            raise ValueError(f"config: phases must be Phase(...)s, got {wrong[0]!r}")
        if self.tile is not None:
            object.__setattr__(self, "tile", tuple(self.tile))
            if len(self.tile) != 3 or any(not isinstance(s, int) or s < 1 for s in self.tile):
                raise ValueError(f"config: tile must be three whole numbers of tokens >= 1, got {self.tile}")
        if self.tile_tokens < 1 or self.min_tokens < 0 or not 0 < self.max_density <= 1:
            raise ValueError(
                "config: tile_tokens >= 1, min_tokens >= 0 and 0 < max_density <= 1 must hold, got "
                f"{self.tile_tokens}, {self.min_tokens} and {self.max_density}"
            )
        budget = self.error_budget
        if budget is not None and not (isinstance(budget, (int, float)) and budget > 0):
            raise ValueError(f"config: error_budget must be above 0, or None, got {self.error_budget}")
        if budget is not None and not self.phases:
            object.__setattr__(self, "phases", BALANCED)
            object.__setattr__(self, "tile", self.tile or TILE)

    def at(self, sigma: float, layer: int = 0, layers: int = 1) -> int | None:
        """Index of the phase that holds for a layer at a noise level; None: no phase, dense."""
        return next((i for i, phase in enumerate(self.phases) if phase.holds(sigma, layer, layers)), None)

    def accept(self, site: str, reason: str) -> str:
        """The reason why a site is dense for want of something. Raises RuntimeError if the configuration is strict."""
        if self.strict:
            raise RuntimeError(f"{site}: {reason} (strict: attention may not fall back to dense)")
        return reason

    def gaps(self) -> tuple[tuple[float, float], ...]:
        """Noise levels (high, low), falling, that no phase names for any layer, in a configuration that has phases."""
        found, low = [], 1.0
        for phase in sorted(self.phases, key=lambda phase: phase.sigma, reverse=True):
            if phase.sigma[0] < low:
                found.append((low, float(phase.sigma[0])))
            low = min(low, float(phase.sigma[1]))
        return (*found, (low, 0.0)) if self.phases and low > 0 else tuple(found)

    def to_dict(self) -> dict[str, Any]:
        return {
            "phases": [phase.to_dict() for phase in self.phases],
            "tile": None if self.tile is None else list(self.tile),
            "tile_tokens": self.tile_tokens,
            "min_tokens": self.min_tokens,
            "max_density": self.max_density,
            "first_frame": self.first_frame,
            "error_budget": self.error_budget,
            "strict": self.strict,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Config:
        """Inverse of `to_dict`. Raises ValueError for unknown fields, policies and values."""
        arguments = dict(fields)
        phases = tuple(Phase.from_dict(phase) for phase in arguments.pop("phases", ()))
        if arguments.get("tile") is not None:
            arguments["tile"] = tuple(arguments["tile"])
        try:
            return cls(phases=phases, **arguments)
        except TypeError as error:
            raise ValueError(f"config: {error}") from None
