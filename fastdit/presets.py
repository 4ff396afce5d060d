"""Named configurations, chosen by measured speed and error (docs/results/, README)."""

from __future__ import annotations

import json
import os
from pathlib import Path

from fastdit.config import BALANCED, TILE, Config, Phase, Reuse
from fastdit.core.number_format import Quant
from fastdit.policies import Dense, Window

PRESETS: dict[str, Config] = {
    # Everything dense through fastdit: bit-exact to the stock pipeline, except that padded text is cut.
    "exact": Config(),
    # The composition is settled while the clip is still almost pure noise, so σ > 0.98 (two of 20 steps at flow shift 5) stays
    # dense, as in Radial Attention and Sparse VideoGen. After that, attention is a window plus the residual of the last dense
    # step, one in five. At equal time this is closer to dense than windows with more dense steps (error .16 against .38) and
    # than the alternatives tried: Re-ttention .33, no reuse .83.
    "balanced": Config(BALANCED, TILE),
    "fast": Config(
        (Phase((1.0, 0.98), Dense()), Phase((0.98, 0.0), Window(density=0.0625), reuse=Reuse("residual", refresh=10))), TILE
    ),
    # FPSAttention's schedule (arXiv 2506.04648 §3.3): early steps coarse and sparse, the middle fine and denser, late steps in
    # between. The paper trains the model for it and publishes neither bounds nor windows. These are ours, for models trained
    # this way and for comparison. FP8 saves time only on GPUs; untrained models lose quality early, where this is sparsest.
    "fps": Config(
        (
            Phase((1.0, 0.925), Window(density=0.125), Quant("fp8", "fp8", granularity="tensor")),
            Phase((0.925, 0.6), Window(density=0.25), Quant("fp8", "fp8", smooth_k=True)),
            Phase((0.6, 0.0), Window(density=0.17), Quant("fp8", "fp8", granularity="head")),
        ),
        TILE,
    ),
}
DEFAULT = "balanced"


def preset(name: str) -> Config:
    """The configuration of a name. Raises ValueError for an unknown one, listing the names."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}") from None


def read_profile(path: str | os.PathLike[str]) -> Config:
    """The configuration in a JSON file: what `Config.to_dict` gives, or has under "config" (`fastdit.tune` writes such files).

    Raises ValueError for a file that is missing or holds something else.
    """
    try:
        fields = json.loads(Path(path).read_bytes())
        return Config.from_dict(fields.get("config", fields))
    except OSError as error:
        raise ValueError(f"cannot read {os.fspath(path)}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{os.fspath(path)} is no configuration: {error}") from None
