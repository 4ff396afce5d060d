"""What tells one call of a denoiser from another: what it is given, in a few hundred numbers.

Guidance calls a denoiser for several *branches* at one noise level, and context windows, panoramas and tiles call it for
several pieces of one picture. Which is which follows from the call itself: its conditioning is the same at every step to the
last bit, and its latents are near those of the step before. Counting calls would not tell: branches come and go midway.

At two noise levels σ, σ' of one run the latents are x = (1 − σ) x₀ + σ ε with the same ε, so for x₀ and ε of unit variance
their cosine is about ((1 − σ)(1 − σ') + σσ') / (‖·‖ ‖·‖'). Those of another window have another ε. The cosine is estimated on
`SAMPLES` places of the latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

LATENTS = ("hidden_states", "sample", "x")
CONDITIONING = ("encoder", "text", "caption", "cap_", "prompt", "pooled", "class", "label", "cond", "embeds")
"""Parts of the names of arguments that say what to draw. (ControlNets' residuals follow the latents, and are none.)"""
NO_CONDITIONING = ("residual", "timestep", "control", "rotary")
SAMPLES, SUMS = 256, 32
SURE, SLACK = 4.0, 0.02
"""How many times the expected change latents may have changed by, and what sampling and rounding add."""
LIKELY = 0.5
"""Share of the expected cosine that is enough where no other call could be meant: ancestral samplers draw a part of ε anew."""


def latents_of(call: dict[str, Any]) -> Tensor | None:
    """The latents among a denoiser's arguments, of the first sample where they are a list."""
    found = next((call[name] for name in LATENTS if call.get(name) is not None), None)
    if isinstance(found, (list, tuple)):
        found = found[0] if found else None
    return found if isinstance(found, Tensor) else None


def conditioning_of(call: dict[str, Any]) -> list[Tensor]:
    """The tensors among a denoiser's arguments that say what to draw, in the order of their names."""
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
    """float32 [≤ SAMPLES], on the device of the latents: what they are at evenly spread places."""
    return _spread(latents.reshape(-1), SAMPLES).float()


def summed(conditioning: Tensor) -> Tensor:
    """float32: of sums over tokens [B, N, C] -> [B, C] at most `SUMS`; of [B, N] all sums and as many places. A prompt's words
    are few among its padding, so places alone would miss them."""
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
    """Of two samples of latents, float32 [n] on the CPU; −1 where they are not finite or of different lengths."""
    if a.shape != b.shape:
        return -1.0
    norms = float(a.norm() * b.norm())
    if norms == 0.0:
        return 1.0 if bool((a == b).all()) else -1.0
    found = float(a @ b) / norms
    return found if math.isfinite(found) else -1.0


def expected(sigma: float, other: float) -> float:
    """The cosine of one run's latents at two noise levels, see above."""
    a, b = (min(max(level, 0.0), 1.0) for level in (sigma, other))
    return ((1 - a) * (1 - b) + a * b) / math.sqrt(((1 - a) ** 2 + a**2) * ((1 - b) ** 2 + b**2))


def near(found: float, sigma: float, other: float) -> bool:
    """Whether latents with this cosine are surely of one call, though others could be meant."""
    return 1 - found <= SURE * (1 - expected(sigma, other)) + SLACK


def likely(found: float, sigma: float, other: float) -> bool:
    """Whether latents with this cosine are of one call, where no other could be meant."""
    return found >= LIKELY * expected(sigma, other)
