"""The fingerprint of a denoiser call: its inputs, reduced to a few hundred numbers, which identify its branch.

Guidance calls a denoiser for several *branches* at one noise level; context windows, panoramas and tiles call it for several
pieces of one picture. The inputs identify the branch: its conditioning is bitwise the same at every step, and its latents are
close to those of the step before. Counting calls would fail, because branches come and go during a run.

At two noise levels σ, σ' of one run the latents are x = (1 − σ) x₀ + σ ε with the same ε, so for x₀ and ε of unit variance
their cosine is about ((1 − σ)(1 − σ') + σσ') / (‖·‖ ‖·‖'). Another window has another ε. The cosine is estimated on `SAMPLES`
elements of the latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LATENTS = ("hidden_states", "sample", "x")
CONDITIONING = ("encoder", "text", "caption", "cap_", "prompt", "pooled", "class", "label", "cond", "embeds")
"""Substrings of the names of conditioning arguments. (ControlNet residuals follow the latents and do not count.)"""
NO_CONDITIONING = ("residual", "timestep", "control", "rotary")
SAMPLES, SUMS = 256, 32
SURE, SLACK = 4.0, 0.02
"""Latents may change by SURE times the expected change, plus SLACK for sampling and rounding."""
LIKELY = 0.5
"""Share of the expected cosine that suffices if no other branch is possible: ancestral samplers redraw part of ε."""


def latents_of(call: dict[str, Any]) -> Tensor | None:
    """The latents among a denoiser's arguments, or None; of the first sample if they are a list."""
    found = next((call[name] for name in LATENTS if call.get(name) is not None), None)
    if isinstance(found, (list, tuple)):
        found = found[0] if found else None
    return found if isinstance(found, Tensor) else None


def conditioning_of(call: dict[str, Any]) -> list[Tensor]:
    """The conditioning tensors among a denoiser's arguments, in the order of the arguments' names."""
    return [
        tensor
        for name in sorted(call)
        if any(part in name for part in CONDITIONING) and not any(part in name for part in NO_CONDITIONING)
        for tensor in _tensors(call[name])
    ]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _tensors(value[key])
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)


def sampled(latents: Tensor) -> Tensor:
    """float32 [≤ SAMPLES], on the device of the latents: evenly spaced elements."""
    return _spread(latents.reshape(-1), SAMPLES).float()


def summed(conditioning: Tensor) -> Tensor:
    """float32 [n]. From [B, N, C]: at most `SUMS` of the sums over tokens [B, C]. From [B, N]: the B sums and `SUMS` elements.
    Sums, because a prompt's few words among its padding would be missed by sampling."""
    wide = conditioning.float()
    if wide.ndim > 2:
        wide = wide.flatten(1, -2).sum(1)
    elif wide.ndim == 2:
        return torch.cat([wide.sum(1), _spread(wide.flatten(), SUMS)])
    return _spread(wide.reshape(-1), SUMS)


def _spread(flat: Tensor, most: int) -> Tensor:
    n = flat.shape[0]
    if n <= most:
        return flat
    return flat[torch.arange(most, device=flat.device, dtype=torch.int64) * n // most]


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two samples of latents, float32 [n] on the CPU; −1 if it is not finite or the lengths differ."""
    if a.shape != b.shape:
        return -1.0
    norms = float(a.norm() * b.norm())
    if norms == 0.0:
        return 1.0 if bool((a == b).all()) else -1.0
    found = float(a @ b) / norms
    return found if math.isfinite(found) else -1.0


def expected(sigma: float, other: float) -> float:
    """The expected cosine of one run's latents at two noise levels; formula in the module's docstring."""
    a, b = (min(max(level, 0.0), 1.0) for level in (sigma, other))
    return ((1 - a) * (1 - b) + a * b) / math.sqrt(((1 - a) ** 2 + a**2) * ((1 - b) ** 2 + b**2))


def near(found: float, sigma: float, other: float) -> bool:
    """Whether latents with this cosine belong to one branch, if other branches are possible."""
    return 1 - found <= SURE * (1 - expected(sigma, other)) + SLACK


def likely(found: float, sigma: float, other: float) -> bool:
    """Whether latents with this cosine belong to one branch, if no other is possible."""
    return found >= LIKELY * expected(sigma, other)
