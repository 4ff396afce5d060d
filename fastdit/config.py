"""The configuration: phases over the noise level, each naming where attention is exact and in which number format.

Frozen, hashable, and stored as the same dictionary by the command line, benchmark rows and reports. The noise level σ lies in
[0, 1]: 1 is pure noise, 0 the finished picture (for flow matching, timestep / 1000). σ selects the phase, never a step
number, so one configuration means the same at 50 steps, at 4, and across Wan 2.2's two denoisers.
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
AUTO = "auto"


@dataclass(frozen=True)
class Reuse:
    """Which statistics are reused, and for how many steps; `approx/step_cache.py` has the formulas and papers.

    kind: one of `KINDS`. refresh: a dense step every `refresh` steps, at least 2 (the paper: 5). ramp: λ (the paper: .04; its
    ablation over 0 … .04 is within noise). store: form of R, one of `residual_store.FORMS`, or "auto": the best that fits
    (`approx/placement.py`). host: keep R in CPU memory, where it also goes when the GPU is full. maps: steps for which a
    dynamic policy's tile map is reused (including the choice that `SpatialTemporal` makes per head); with statistics, rounded
    up to whole refreshes: statistics hold for one map only. drift: a step is dense sooner where the relative error of the
    layers' answers, foreseen from a few exact rows in the step before, would be above it; None measures nothing."""

    kind: str = "none"
    refresh: int = 5
    ramp: float = 0.04
    store: str = AUTO
    host: bool = False
    maps: int = 1
    drift: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"reuse: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.store != AUTO:
            from fastdit.approx.residual_store import FORMS

            if self.store not in FORMS:
                raise ValueError(f"reuse: store must be one of {', '.join((*FORMS, AUTO))}, got {self.store!r}")
        if self.refresh < 1 or self.maps < 1 or not 0 <= self.ramp <= 1:
            raise ValueError(
                f"reuse: refresh >= 1, maps >= 1 and ramp in [0, 1] must hold, got {self.refresh}, {self.maps} and {self.ramp}"
            )
        if self.drift is not None and not self.drift > 0:
            raise ValueError(f"reuse: drift must be above 0, or None, got {self.drift}")
        if self.kind != "none" and self.refresh == 1:
            raise ValueError("reuse: refresh=1 makes every step dense and reuses nothing: use refresh >= 2 or kind='none'")

    @property
    def map_age(self) -> int:
        """Steps for which a tile map is reused; with statistics, a multiple of `refresh`."""
        return self.maps if self.kind == "none" else math.ceil(self.maps / self.refresh) * self.refresh

    def to_dict(self) -> dict[str, Any]:
        fields = asdict(self)
        if self.drift is None:  # as before there was one, so that clips keep their hashes
            del fields["drift"]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Reuse:
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"reuse: {error}") from None

    def __str__(self) -> str:
        if self.kind == "none":
            return f"maps for {self.maps}" if self.maps > 1 else "none"
        return f"{self.kind}, refresh {self.refresh}" + ("" if self.drift is None else f" or drift {self.drift:g}")


@dataclass(frozen=True)
class Phase:
    """The settings for σ in (low, high] and a range of layers. σ = 0 belongs to a phase that reaches down to 0.

    sigma: (high, low), in the order of a run. layers: (first, last), half-open, over the self-attention sites of one
    denoiser, negative from the end as in a slice; None: all. remainder: what replaces the tiles that the policy drops, one of
    `approx.remainder.REMAINDERS`. reuse: which statistics of earlier steps are reused. `Dense()` drops nothing, so both have
    no effect with it.
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
"""The presets' tile. One frame deep: the best windows are two or three frames deep, which thicker tiles cannot express."""

PAYS = {"cpu": 2048, "cuda": 4096}
"""Tokens from which sparse attention was faster than dense on a type of device, where `Config.min_tokens` is None."""

BALANCED = (Phase((1.0, 0.98), Dense()), Phase((0.98, 0.0), Window(density=0.125), reuse=Reuse("residual", refresh=5)))
"""Phases of the default preset; `presets.py` says how they were chosen."""


@dataclass(frozen=True)
class Config:
    """All of fastdit's settings for one pipeline. The first phase that holds applies; where none holds, attention is dense.

    tile: tokens (t, h, w) of a tile; None fits one of about `tile_tokens` to each grid (`layout.fit_tile`).
    min_tokens: shorter sequences stay dense; None: those for which sparse attention did not pay on this kind of device
    (`least_tokens`). max_density: denser tile maps run dense. Beyond both limits the overhead exceeds the saving.
    first_frame: every tile also attends the first latent frame, which many video models use as a sink.
    error_budget: the largest relative L2 error of a site's output, measured on a few query rows of each call
    (`error_guard.py`); None measures nothing. A budget without phases uses those of the default preset, and its tile unless one
    is given.
    strict: raise, instead of reporting, where a site would stay dense because something is missing or unsupported.
    """

    phases: tuple[Phase, ...] = ()
    tile: Grid | None = None
    tile_tokens: int = 64
    min_tokens: int | None = None
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
        if self.tile_tokens < 1 or (self.min_tokens is not None and self.min_tokens < 0) or not 0 < self.max_density <= 1:
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
        """Index of the phase that holds for a layer at a noise level; None if no phase does (dense)."""
        return next((i for i, phase in enumerate(self.phases) if phase.holds(sigma, layer, layers)), None)

    def least_tokens(self, device: str) -> int:
        """The sequence length from which attention is sparse on a type of device ("cpu", "cuda", …)."""
        return PAYS.get(device, PAYS["cuda"]) if self.min_tokens is None else self.min_tokens

    def accept(self, site: str, reason: str) -> str:
        """Return the reason why a site must stay dense. Raises RuntimeError if the configuration is strict."""
        if self.strict:
            raise RuntimeError(f"{site}: {reason} (strict: attention may not fall back to dense; strict=False allows it)")
        return reason

    def gaps(self) -> tuple[tuple[float, float], ...]:
        """Ranges of noise level (high, low), falling, that no phase covers for any layer; () without phases."""
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
