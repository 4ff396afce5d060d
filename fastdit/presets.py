"""Named configurations, chosen by measurement (docs/results/, README): how much faster for how much error."""

from __future__ import annotations

from fastdit.config import Config, Phase
from fastdit.policies import Dense, Window

PRESETS: dict[str, Config] = {
    # Everything dense through the seam: bit-exact to the stock pipeline, for comparisons and for trust.
    "exact": Config(),
    # Where things will be is settled while the picture is still noise: those steps stay dense (Radial Attention and Sparse
    # VideoGen keep their first 25-30 % dense as well). σ > 0.95 is 3 of 20 steps at flow shift 3, 5 of 20 at shift 5.
    "balanced": Config(
        phases=(
            Phase(sigma=(1.0, 0.95), policy=Dense()),
            Phase(sigma=(0.95, 0.0), policy=Window(density=0.25)),
        ),
    ),
    "fast": Config(
        phases=(
            Phase(sigma=(1.0, 0.97), policy=Dense()),
            Phase(sigma=(0.97, 0.0), policy=Window(density=0.125)),
        ),
    ),
}
DEFAULT = "balanced"


def preset(name: str) -> Config:
    """The configuration of that name. Raises ValueError listing the names."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}") from None
