"""Named configurations, chosen by measurement (docs/results/, README): how much faster for how much error."""

from __future__ import annotations

from fastdit.config import Config, Phase
from fastdit.policies import Dense, Window

TILE = (1, 8, 8)
"""One frame deep: the windows that hold best are two or three frames deep, which thicker tiles cannot express."""

PRESETS: dict[str, Config] = {
    # Everything dense through the seam: bit-exact to the stock pipeline, for comparisons and for trust.
    "exact": Config(),
    # Where things will be is settled while the clip is still noise, and windows cost most there: those steps stay dense
    # (Radial Attention and Sparse VideoGen keep their first 25-30 % dense as well). Late steps draw detail, and bear less
    # density. Of 20 steps at flow shift 5, σ > 0.925 is six, σ > 0.83 four more, and σ > 0.98 two.
    "balanced": Config(
        (Phase((1.0, 0.925), Dense()), Phase((0.925, 0.83), Window(density=0.22)), Phase((0.83, 0.0), Window(density=0.125))),
        TILE,
    ),
    "fast": Config((Phase((1.0, 0.98), Dense()), Phase((0.98, 0.0), Window(density=0.125))), TILE),
}
DEFAULT = "balanced"


def preset(name: str) -> Config:
    """The configuration of that name. Raises ValueError listing the names."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}") from None
