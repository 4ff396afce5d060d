"""The options of Compare and the configuration made from them: policy, density, precision and remainder below σ = 0.98."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastdit import Config, Phase, Quant
from fastdit.approx.remainder import REMAINDERS
from fastdit.config import TILE, Reuse
from fastdit.policies import POLICIES, Dense

START = 0.98
"""Noise level down to which the presets stay dense."""
PRECISIONS = {
    "the model's own": Quant(), "FP8": Quant("fp8", "fp8", smooth_k=True), "INT8": Quant("int8", "fp8", smooth_k=True),
    "INT4": Quant("int4", "fp8", smooth_q=True, smooth_k=True),
}  # fmt: skip
RESIDUAL = "residual"
REMAINDER = {
    "nothing": "none", "one mean key per dropped tile (pooled)": "pooled", "256 keys drawn by chance (sampled)": "sampled",
    "what the last dense step had there (residual)": RESIDUAL,
}  # fmt: skip
"""What stands in for dropped tiles, in words. The last one is a statistic of earlier steps."""
POLICY = tuple(name for name, policy in POLICIES.items() if "density" in getattr(policy, "__dataclass_fields__", {}))
"""The policies that can be asked for a density."""
MEASURE = 1e6
"""An error budget that no error exceeds, so that errors are measured without consequences."""


class Knobs(NamedTuple):
    policy: str = "window"
    density: float = 0.125
    precision: str = "the model's own"
    remainder: str = "what the last dense step had there (residual)"
    errors: bool = True


def config(knobs: Knobs) -> Config:
    """The configuration of the options. Raises ValueError for an unknown option, or a density outside (0, 1]."""
    policy, density, precision, remainder, errors = knobs
    if policy not in POLICY or precision not in PRECISIONS or remainder not in REMAINDER:
        raise ValueError(f"no such policy, precision or remainder: {policy!r}, {precision!r}, {remainder!r}")
    what = REMAINDER[remainder]
    sparse = Phase(
        (START, 0.0),
        POLICIES[policy](density=density),  # type: ignore[call-arg]
        PRECISIONS[precision],
        remainder=what if what in REMAINDERS else "none",
        reuse=Reuse(RESIDUAL) if what == RESIDUAL else Reuse(),
    )
    return Config(
        (Phase((1.0, START), Dense()), sparse), TILE, min_tokens=0, max_density=1, error_budget=MEASURE if errors else None
    )


def knobs(recorded: dict[str, Any]) -> Knobs | None:
    """The options that made a recorded configuration; None if it was made in another way."""
    try:
        found = Config.from_dict(recorded)
        sparse = found.phases[1]
        made = Knobs(
            sparse.policy.name,
            sparse.policy.to_dict()["density"],
            next(name for name, quant in PRECISIONS.items() if quant == sparse.quant),
            next(name for name, what in REMAINDER.items() if what in (sparse.remainder, sparse.reuse.kind) and what != "none")
            if sparse.remainder != "none" or sparse.reuse.kind != "none"
            else "nothing",
            found.error_budget is not None,
        )
        return made if config(made) == found else None
    except (ValueError, KeyError, IndexError, StopIteration):
        return None
