"""`python -m fastdit.apps.bench.quality.policy_table`: the quality that each policy costs at equal density, on learned
attention.

Real clips are noised to a few noise levels and the embedded denoiser predicts their velocity, dense and with each policy in
all of its layers. Beside its error stands the attention mass that the policy's tiles retain in the dense run. The *oracle*
keeps the tiles that hold most true mass, *random* any: no policy is judged without both. Knobs that are not a density are set
by bisection until the mean density is the one asked for, at each noise level for itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastdit import Config, Phase, Window
from fastdit.apps.render.outputs import write_json
from fastdit.apps.tiny.attention import add_noise, clean_latents, recorded_attention, velocity_under
from fastdit.core.layout import Layout
from fastdit.core.reference import relative_error
from fastdit.pipelines import embedded
from fastdit.policies import LSH, Antidiagonal, Policy, PowerOfTwo, Radial, SpatialTemporal, Stripe, TopMass
from fastdit.policies.scores import select_tiles
from fastdit.reporting.head_profile import Seen, choose, retained, tile_mass

SIGMAS = (0.9, 0.6, 0.3)
DENSITIES = (0.5, 0.25, 0.125)
SIZE, TILE = (33, 128, 128), (1, 4, 4)


@dataclass(frozen=True)
class Oracle(Policy):
    """The tiles that hold most of the true mass, which no policy can know beforehand."""

    density: float = 0.25
    name: ClassVar[str] = "oracle"

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        assert q is not None
        assert k is not None
        return select_tiles(tile_mass(q, k, layout), None, self.density)


@dataclass(frozen=True)
class Random(Policy):
    """Random tiles, the same for all heads and layers."""

    density: float = 0.25
    name: ClassVar[str] = "random"
    reads: ClassVar[str] = ""

    def select(self, layout: Layout, q: Tensor | None = None, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        n = layout.video_tiles
        return select_tiles(torch.rand(1, 1, n, n, generator=torch.Generator().manual_seed(0)), None, self.density)


@dataclass
class State:
    """Inputs of the denoiser at one noise level, its dense velocity, and the q, k and v of its layers."""

    sigma: float
    inputs: tuple[Tensor, ...]
    dense: Tensor
    calls: list[tuple[Tensor, ...]]
    mass: list[Tensor]


Make = Callable[[float], Policy]
KNOBS: dict[str, tuple[Make, float, float] | Make] = {
    "oracle": lambda d: Oracle(d),
    "random": lambda d: Random(d),
    "window, clamp": lambda d: Window(density=d),
    "window, truncate": lambda d: Window(density=d, border="truncate"),
    "radial": lambda d: Radial(density=d),
    "spatial_temporal": lambda d: SpatialTemporal(density=d),
    "antidiagonal, density": lambda d: Antidiagonal(density=d),
    "antidiagonal, tau": (lambda x: Antidiagonal(tau=x), 0.0, 1.0),
    "top_mass, density": lambda d: TopMass(density=d),
    "top_mass, tau": (lambda x: TopMass(tau=x), 0.0, 1.0),
    "stripe": (lambda x: Stripe(theta=x, window=(1, 1, 1)), -20.0, 40.0),
    "lsh": lambda d: LSH(density=d),
    "head_profile": lambda d: Window(density=d),  # replaced by what `choose` finds
    "power_of_two": lambda d: Window(density=d),  # replaced by the window sizes that come closest
}
"""By name: the policy for a density, or for a knob with its two ends; more of it raises the density."""


def states(pipe: Any, clips_count: int, seeds: int, layout: Layout) -> Iterator[State]:
    found = clean_latents(pipe, clips_count, SIZE)
    for seed in range(seeds):
        for sigma in SIGMAS:
            inputs = add_noise(*found, sigma, seed)
            calls = recorded_attention(pipe, inputs, TILE)
            dense = pipe.transformer(*inputs, return_dict=False)[0]
            yield State(sigma, inputs, dense, calls, [tile_mass(q, k, layout) for q, k, _ in calls])


def policy_of(name: str, density: float, state: State, layout: Layout) -> Policy:
    """The policy of that name with this density at this noise level, found by bisection if it has a knob."""
    made = KNOBS[name]
    if callable(made):
        return made(density)
    make, low, high = made
    for _ in range(12):
        middle = (low + high) / 2
        found = [make(middle).select(layout, *(x[:4] for x in call)).float().mean() for call in state.calls[::2]]
        low, high = (middle, high) if torch.stack(found).mean() < density else (low, middle)
    return make(high)


def config_of(name: str, density: float, state: State, layout: Layout, remainder: str) -> Config:
    if name == "power_of_two":
        windows = [(t, h, w) for t in (1, 3, 5, 7) for h in (1, 2, 3, 4) for w in (1, 2, 3, 4)]
        made = {window: PowerOfTwo(window) for window in windows}
        policy: Policy = min(made.values(), key=lambda p: abs(float(p.select(layout).float().mean()) - density))
    elif name == "head_profile":
        seen = Seen()
        for layer, (q, k, _) in enumerate(state.calls):
            seen.add(layer, layout, q[:8], k[:8])
        T, H, W = layout.tile_grid
        side = max(1, round((density * H * W) ** 0.5))
        patterns = (
            Window(density=density),
            Radial(density=density),
            Window((max(1, round(T * density)), H, W)),
            Window((T, side, side)),
        )
        profile = choose(seen, patterns)
        return Config(
            tuple(Phase(policy=p.policy, layers=p.layers, remainder=remainder) for p in profile.phases), TILE, 64, 0, 1
        )
    else:
        policy = policy_of(name, density, state, layout)
    return Config((Phase(policy=policy, remainder=remainder),), TILE, 64, 0, 1)


@torch.no_grad()
def table(pipe: Any, clips_count: int, seeds: int, out: Path, gathered: tuple[str, ...]) -> None:
    """Measure every policy. gathered: policies to try also with the remainders that gather keys."""
    layout = Layout((9, 16, 16), TILE)
    rows: dict[tuple[str, float, str], dict[str, Any]] = {}
    for state in states(pipe, clips_count, seeds, layout):
        for density in DENSITIES:
            for name in KNOBS:
                for remainder in ("none", "pooled", *(("sampled", "stripes") if name in gathered else ())):
                    config = config_of(name, density, state, layout, remainder)
                    velocity, achieved = velocity_under(pipe, config, state.inputs)
                    row = rows.setdefault((name, density, remainder), {"density": [], "error": {}, "retained": []})
                    row["density"].append(achieved)
                    errors = [relative_error(a, b) for a, b in zip(velocity, state.dense, strict=True)]
                    row["error"].setdefault(str(state.sigma), []).extend(errors)
                    if remainder == "none":
                        for layer, (mass, call) in enumerate(zip(state.mass, state.calls, strict=True)):
                            phase = config.phases[layer if name == "head_profile" else 0]
                            kept = phase.policy.select(layout, *call) | torch.eye(layout.video_tiles, dtype=torch.bool)
                            row["retained"].append(float(retained(mass, kept, layout).mean()))
            print(f"noise level {state.sigma}, density {density}", flush=True)
        write(rows, clips_count, seeds, out)


def write(rows: dict[tuple[str, float, str], dict[str, Any]], clips_count: int, seeds: int, out: Path) -> None:
    def mean(values: list[float]) -> float:
        return round(sum(values) / len(values), 5)

    found = [
        {"policy": name, "asked": density, "remainder": remainder, "density": mean(row["density"])}
        | {"error": mean([mean(errors) for errors in row["error"].values()])}
        | {f"error at {sigma}": mean(errors) for sigma, errors in row["error"].items()}
        | ({"retained": mean(row["retained"])} if row["retained"] else {})
        for (name, density, remainder), row in rows.items()
    ]
    facts = {"size": "x".join(map(str, SIZE)), "tokens": 2304, "tile": list(TILE), "clips": clips_count, "seeds": seeds}
    write_json(out, facts | {"rows": found})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fastdit.apps.bench.quality.policy_table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/results/policies.json"))
    args = parser.parse_args(argv)
    table(embedded.load(), args.clips, args.seeds, args.out, ("window, clamp", "top_mass, density"))


if __name__ == "__main__":
    main()
