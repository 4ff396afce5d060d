"""`python -m fastdit.apps.bench.quality.reuse_table`: what is remembered across steps, at equal density and equal dense
refreshes.

The embedded pipeline draws prompts dense and with every arm in all steps and layers. *Final* is the relative error of the
arm's last latents against the dense run's; *forced* that of its velocities when it is shown the dense run's latents at every
step, so that errors do not add up. Every arm is dense at the same steps, one in `refresh`; arms that remember nothing as well.
Arms take turns batch by batch, and the best batch's seconds count.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastdit
from fastdit import Config, Phase, Window
from fastdit.apps.render.outputs import write_json
from fastdit.apps.tiny.attention import captions
from fastdit.config import Reuse
from fastdit.core.reference import relative_error
from fastdit.pipelines import embedded
from fastdit.policies import Dense

SIZE, TILE = (33, 128, 128), (1, 4, 4)
BATCH = 8
DENSITIES = (0.25, 0.125, 0.0625)
ARMS = {
    "sparse only": ("none", "none"),
    "ratio": ("ratio", "none"),
    "residual": ("residual", "none"),
    "Re-ttention": ("retention", "none"),
    "pooled": ("none", "pooled"),
    "pooled, residual": ("residual", "pooled"),
    "pooled, Re-ttention": ("retention", "pooled"),
    "broadcast": ("broadcast", "none"),
}
"""By name: kind of `Reuse`, remainder."""


class Regime(NamedTuple):
    """How clips are drawn, and one in how many steps is dense."""

    steps: int = embedded.STEPS
    guidance: float = embedded.GUIDANCE
    refresh: int = 4


def config_of(arm: str, density: float, sigmas: list[float], refresh: int) -> Config:
    """The configuration of an arm. sigmas: the run's noise levels; in arms without memory, each dense step is a phase."""
    kind, remainder = ARMS[arm]
    policy = Window(density=density)
    if kind != "none":
        return _config(Phase(policy=policy, remainder=remainder, reuse=Reuse(kind, refresh)))
    dense = [Phase((min(1.0, sigma + 1e-3), sigma - 1e-3), Dense()) for sigma in sigmas[::refresh]]
    return _config(*dense, Phase(policy=policy, remainder=remainder))


def _config(*phases: Phase) -> Config:
    return Config(phases, TILE, min_tokens=0, max_density=1)


def draw(pipe: Any, prompts: list[str], seed: int, steps: int, guidance: float) -> tuple[Tensor, float]:
    """Final latents of a batch on the CPU, with one generator for each prompt; and seconds."""
    frames, height, width = SIZE
    generators = [torch.Generator().manual_seed(1000 * seed + i) for i in range(len(prompts))]
    start = time.perf_counter()
    latents = pipe(
        prompts, height=height, width=width, num_frames=frames, num_inference_steps=steps, guidance_scale=guidance,
        generator=generators, output_type="latent",
    ).frames.cpu()  # fmt: skip
    return latents, time.perf_counter() - start


class Recorder:
    """Records the calls of the denoiser and their results."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.calls.append((args, dict(kwargs), output[0]))


@torch.no_grad()
def table(prompts: list[str], seeds: int, out: Path, device: str, regime: Regime) -> None:
    pipe: Any = embedded.load()
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    rows: dict[tuple[str, float], dict[str, Any]] = {}
    done = 0
    for seed in range(seeds):
        for start in range(0, len(prompts), BATCH):
            batch = prompts[start : start + BATCH]
            recorder = Recorder()
            hook = pipe.transformer.register_forward_hook(recorder, with_kwargs=True)
            dense, seconds = draw(pipe, batch, seed, regime.steps, regime.guidance)
            hook.remove()
            sigmas = [float(timestep) / 1000 for timestep in pipe.scheduler.timesteps]
            row = rows.setdefault(("dense", 1.0), {"seconds": [], "final": [0.0], "forced": [0.0], "density": []})
            row["seconds"].append(seconds / len(batch))
            row["density"].append(1.0)
            for arm in ARMS:
                for density in DENSITIES if arm != "broadcast" else (0.0,):
                    row = rows.setdefault((arm, density), {"seconds": [], "final": [], "forced": [], "density": []})
                    with fastdit.accelerate(pipe, config_of(arm, density or 0.25, sigmas, regime.refresh)):
                        found, seconds = draw(pipe, batch, seed, regime.steps, regime.guidance)
                        row["seconds"].append(seconds / len(batch))
                        row["density"].append(fastdit.report(pipe).density)
                        row["final"].extend(relative_error(a, b) for a, b in zip(found, dense, strict=True))
                    with fastdit.accelerate(pipe.transformer, config_of(arm, density or 0.25, sigmas, regime.refresh)):
                        for args, kwargs, velocity in recorder.calls:
                            row["forced"].append(relative_error(pipe.transformer(*args, **kwargs)[0].cpu(), velocity.cpu()))
            done += len(batch)
            write(rows, done, out, device, regime)
            print(f"{done} of {len(prompts) * seeds} clips", flush=True)


def write(rows: dict[tuple[str, float], dict[str, Any]], done: int, out: Path, device: str, regime: Regime) -> None:
    def mean(values: list[float]) -> float:
        return round(sum(values) / len(values), 4)

    found = [
        {"arm": arm, "asked": density, "density": mean(row["density"]), "seconds": round(min(row["seconds"]), 3)}
        | {"final": mean(row["final"]), "forced": mean(row["forced"])}
        for (arm, density), row in rows.items()
    ]
    device = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    facts = {
        "device": device,
        "size": "x".join(map(str, SIZE)),
        "tokens": 2304,
        "tile": list(TILE),
    }
    write_json(out, facts | regime._asdict() | {"clips": done, "rows": found})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fastdit.apps.bench.quality.reuse_table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=Regime().steps)
    parser.add_argument("--guidance", type=float, default=Regime().guidance)
    parser.add_argument("--refresh", type=int, default=Regime().refresh)
    parser.add_argument("--out", type=Path, default=Path("docs/results/reuse.json"))
    args = parser.parse_args(argv)
    regime = Regime(args.steps, args.guidance, args.refresh)
    table(captions(args.prompts, 12), args.seeds, args.out, args.device, regime)


if __name__ == "__main__":
    main()
