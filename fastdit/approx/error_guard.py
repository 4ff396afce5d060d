"""The error of what was skipped, measured while it runs, and what to do when it is too large.

A few query rows of a sparse or quantized answer are computed exactly (O(rows · N), a thousandth at 16 rows of 16,000) and
compared: the relative L2 error on them estimates that of the site's output. An answer above the budget, or one that is not
finite, is replaced by the dense one at once. From the next step on the site is a *level* higher for the rest of the run: denser
tiles, then 16 bits as well, then dense, which is where an answer that is not finite goes straight to.
"""

from __future__ import annotations

import math
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastdit.approx.remainder import some_heads
from fastdit.config import Config, Phase
from fastdit.core.byte_cache import byte_cache, sent
from fastdit.core.quant import Quant
from fastdit.core.reference import attention
from fastdit.policies import Dense, Policy, Window

LEVELS = ("as configured", "denser", "denser, 16 bits", "dense")
DENSE = len(LEVELS) - 1
ROWS = 16
WIDE_BYTES = 64 << 20
"""Of the heads whose keys, and then values, are held in float32 at a time."""


def probe(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float | None, rows: int = ROWS) -> Tensor:
    """Relative L2 error [] of out on a few query rows, the same for every call of a length; q, k, v, out [B, H, N, D]."""
    drawn = _rows(q.shape[2], rows, q.device)
    query, found = q[:, :, drawn].float(), out[:, :, drawn].float()
    parts = some_heads(q.shape[1], k, v, WIDE_BYTES)
    exact = torch.cat([attention(query[:, part], keys, values, scale=scale)[0] for part, keys, values in parts], 1)
    return (found - exact).norm() / exact.norm().clamp(min=torch.finfo(torch.float32).tiny)


def fault(out: Tensor, error: Tensor | None = None, budget: float | None = None) -> Tensor:
    """int32 [1]: 1 if an answer is not finite or its error is above the budget, else 0."""
    # A sum that is not finite says the same as `isfinite().all()`, without a mask as large as the answer
    bad = ~out.sum(dtype=torch.promote_types(out.dtype, torch.float32)).isfinite()
    return (bad if error is None or budget is None else bad | (error > budget)).to(torch.int32).reshape(1)


@byte_cache(1 << 20)
def _rows(length: int, rows: int, device: torch.device) -> Tensor:
    drawn = torch.randperm(length, generator=torch.Generator().manual_seed(length), device="cpu")[:rows]
    return sent(drawn, device)


@lru_cache(maxsize=64)
def config_at_level(config: Config, level: int) -> Config:
    """The configuration at one of `LEVELS`."""
    if level == 0:
        return config
    if level >= DENSE:
        return replace(config, phases=tuple(Phase(phase.sigma, Dense(), layers=phase.layers) for phase in config.phases))
    return replace(config, phases=tuple(_raise(phase, level) for phase in config.phases))


def _raise(phase: Phase, level: int) -> Phase:
    return replace(phase, policy=denser(phase.policy), quant=phase.quant if level == 1 else Quant())


def denser(policy: Policy) -> Policy:
    """About twice as many tiles; dense for a policy without a knob."""
    known: dict[str, Any] = {field.name: getattr(policy, field.name) for field in fields(policy)}
    if isinstance(policy, Window) and policy.size is not None:
        return replace(policy, size=(policy.size[0] + 2, policy.size[1] + 2, policy.size[2] + 2))
    if known.get("density") is not None:
        known["density"] = min(1.0, 2 * known["density"])
    elif known.get("tau") is not None:
        known["tau"] = (1 + known["tau"]) / 2
    elif known.get("decay") is not None:
        known["decay"] *= 2
    elif "theta" in known:
        known["theta"] += math.log(16)
    elif "policies" in known:
        known["policies"] = tuple(map(denser, known["policies"]))
    else:
        return Dense()
    return type(policy)(**known)
