"""Estimate how many tokens a clip has, and about how much faster a configuration will draw it, without drawing.

Of a denoiser's forward, attention between N tokens takes 4·N·d·L multiplications a token (heads' width d, L layers) and
everything else about 2·P (P parameters), so its share is N / (N + P / (2·d·L)). A sparse
step leaves density × `OVERHEAD` of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fastdit import Config
from fastdit.apps.render.load import denoisers, multiples
from fastdit.core.layout import Grid, Layout
from fastdit.planning.forward_plan import complete, layout_of
from fastdit.policies import Dense, Policy, Window
from fastdit.policies.window import axis_window, fit_window
from fastdit.schedule import noise_levels, schedule

OVERHEAD = 1.3
"""Cost of a pair of tokens in sparse attention over one in dense; fitted to the README's rows, and within a fifth of them."""
MOST_TILES = 4096
"""Up to this many tiles a map of tiles × tiles is made and counted: 16 MB, where a long clip's would take gigabytes."""


@dataclass(frozen=True)
class PipelineFacts:
    """Facts of a loaded pipeline. multiples: see `load.multiples`; even: tokens at which attention takes half of the time."""

    multiples: tuple[int, int, int]
    even: float
    layers: int
    shift: float

    def grid(self, frames: int, height: int, width: int) -> Grid:
        """The grid of tokens (T, H, W); sizes that do not fit are rounded down."""
        time, h, w = self.multiples
        return max(0, frames - 1) // time + 1, height // h, width // w


@dataclass(frozen=True)
class Prediction:
    """density: mean over steps, None if it depends on the clip; ratio: about how much faster; why: reason if it is not."""

    tokens: int
    grid: Grid
    density: float | None
    ratio: float | None
    why: str | None = None


def facts(pipe: Any) -> PipelineFacts:
    """Read off a pipeline what `predict` needs."""
    model: Any = next(denoisers(pipe))
    parameters = sum(weight.numel() for weight in model.parameters())
    config = model.config
    layers = getattr(config, "num_layers", 1) + getattr(config, "num_single_layers", 0)
    width = getattr(config, "num_attention_heads", 1) * getattr(config, "attention_head_dim", 64)
    scheduler = getattr(pipe, "scheduler", None)
    shift = getattr(getattr(scheduler, "config", None), "flow_shift", None) or getattr(scheduler, "shift", None) or 1.0
    return PipelineFacts(multiples(pipe), parameters / (2 * width * layers), layers, float(shift))


def predict(known: PipelineFacts, config: Config, frames: int, height: int, width: int, steps: int) -> Prediction:
    """The prediction for one clip. Raises ValueError if it has no tokens."""
    grid = known.grid(frames, height, width)
    tokens = math.prod(grid)
    if tokens < 1 or steps < 1:
        raise ValueError("a clip needs a frame, a pixel and a step")
    if all(isinstance(phase.policy, Dense) for phase in config.phases):
        return Prediction(tokens, grid, 1.0, 1.0, "the configuration is dense")
    if tokens < config.min_tokens:
        return Prediction(tokens, grid, 1.0, 1.0, f"below {config.min_tokens:,} tokens sparse attention does not pay")
    spent, densities = [], []
    for entry in schedule(config, noise_levels(steps, known.shift)):
        policy = None if entry.phase is None else config.phases[entry.phase].policy
        density: float | None = 1.0
        if policy is not None and not isinstance(policy, Dense) and "statistics for" not in entry.what:
            density = density_of(policy, layout_of(config, grid), config.first_frame)
        if density is None:
            static = policy is not None and policy.static
            why = f"{policy} has too many tiles there to count" if static else "the policy decides while it draws"
            return Prediction(tokens, grid, None, None, why)
        densities.append(density if density <= config.max_density else 1.0)
        spent.append(densities[-1] * OVERHEAD if densities[-1] < 1 else 1.0)
    share = tokens / (tokens + known.even)
    ratio = 1 / (1 - share + share * sum(spent) / len(spent))
    return Prediction(tokens, grid, sum(densities) / len(densities), ratio)


@lru_cache(maxsize=128)
def density_of(policy: Policy, layout: Layout, first_frame: bool = False) -> float | None:
    """Share of tile pairs kept. None: too many tiles to count, or the policy decides by the data and has no density."""
    if not policy.static:
        found = getattr(policy, "density", None)
        return None if found is None else float(found)
    if isinstance(policy, Window) and not first_frame:  # a box: the product of its shares along the axes
        sides = layout.tile_grid
        size = policy.size or fit_window(sides, policy.density or 1.0, policy.border)
        return math.prod(float(axis_window(n, w, policy.border).float().mean()) for n, w in zip(sides, size, strict=True))
    if layout.video_tiles > MOST_TILES:
        return None
    return float(complete(policy.select(layout), layout, first_frame).float().mean())
