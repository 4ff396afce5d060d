"""`python -m fastdit.apps.bench.quality.stores_table`: what the form of a remembered residual costs, bytes against error.

The embedded pipeline draws prompts dense. Then its denoiser runs again, without guidance, each step with the dense run's
latents, so that errors do not add up over steps: a window, and beside it the residual of one step in `REFRESH`, kept in each
form. The error is the relative L2 of the velocities of the sparse steps against the dense run's, at many steps and at few.
Noise levels above `SIGMA` stay dense, as in the presets.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import fastdit
from fastdit import Config, Phase, Window
from fastdit.approx.residual_store import FORMS, bytes_of
from fastdit.apps.bench.markdown import write_block
from fastdit.apps.bench.quality import reuse_table
from fastdit.apps.render.outputs import write_json
from fastdit.apps.tiny.attention import captions
from fastdit.config import Reuse
from fastdit.core.reference import relative_error
from fastdit.pipelines import embedded

SIZE, TILE, SHAPE = reuse_table.SIZE, reuse_table.TILE, (1, 4, 2304, 64)
STEPS, REFRESH, DENSITY, SIGMA = (30, 8), 5, 0.125, 0.98
ARMS = (*FORMS, "none")
WAN = (40, (1, 40, 75600, 128))
"""Wan 14B at 720p: layers, shape of a residual."""


def config_of(arm: str) -> Config:
    reuse = Reuse() if arm == "none" else Reuse("residual", REFRESH, store=arm)
    return Config((Phase(policy=Window(density=DENSITY), reuse=reuse),), TILE, min_tokens=0, max_density=1)


@torch.no_grad()
def table(prompts: list[str], out: Path, device: str = "cpu") -> None:
    pipe: Any = embedded.load()
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    errors: dict[tuple[str, int], list[float]] = {}
    for done, prompt in enumerate(prompts, 1):
        for steps in STEPS:
            recorder = reuse_table.Recorder()
            hook = pipe.transformer.register_forward_hook(recorder, with_kwargs=True)
            reuse_table.draw(pipe, [prompt], done, steps, embedded.GUIDANCE)
            hook.remove()
            calls = [call for call in recorder.calls if float(call[1]["timestep"].flatten()[0]) / 1000 <= SIGMA]
            for arm in ARMS:
                with fastdit.accelerate(pipe.transformer, config_of(arm)):
                    for step, (args, kwargs, velocity) in enumerate(calls):
                        if arm == "none" and step % REFRESH == 0:
                            continue
                        found = pipe.transformer(*args, **kwargs)[0]
                        if step % REFRESH:
                            errors.setdefault((arm, steps), []).append(relative_error(found, velocity))
                mean = sum(errors[arm, steps]) / len(errors[arm, steps])
                print(f"clip {done}, {steps} steps, {arm}: {mean:.4f}", flush=True)
        write(errors, done, out, device)


def write(errors: dict[tuple[str, int], list[float]], done: int, out: Path, device: str) -> None:
    rows = []
    for arm in ARMS:
        row: dict[str, Any] = {"store": arm}
        if arm != "none":
            row["bits"] = round(8 * bytes_of(SHAPE, arm) / torch.Size(SHAPE).numel(), 3)
            row["wan"] = WAN[0] * bytes_of(WAN[1], arm)
        for steps in STEPS:
            found = errors[arm, steps]
            row |= {f"error {steps}": round(sum(found) / len(found), 4), f"worst {steps}": round(max(found), 4)}
        rows.append(row)
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU", "size": "x".join(map(str, SIZE)), "tokens": 2304,
        "density": DENSITY, "refresh": REFRESH, "sigma": SIGMA, "steps": list(STEPS), "clips": done,
    }  # fmt: skip
    write_json(out, facts | {"rows": rows})


def markdown(path: Path) -> str:
    """Of the rows that `table` wrote."""
    measured = json.loads(path.read_text(encoding="utf-8"))
    steps = measured["steps"]
    lines = [
        f"{measured['clips']} clips of {measured['size']} ({measured['tokens']:,} tokens), window {measured['density']:g}, "
        f"dense at one step in {measured['refresh']} and above a noise level of {measured['sigma']:g}. Mean relative error of "
        f"the velocities of the sparse steps, each shown the dense run's latents, at {steps[0]} and at {steps[1]} steps; "
        f"bits a value there, all that is stored; GB a branch of Wan 14B at 720p, by the same count ({measured['device']}):",
        "",
        "| `store` | bits a value | Wan 14B, GB | " + " | ".join(f"{n} steps" for n in steps) + " |",
        "|---|--:|--:" + "|--:" * len(steps) + "|",
    ]
    for row in measured["rows"]:
        name = "nothing remembered" if row["store"] == "none" else f"`{row['store']}`"
        sizes = f"{row['bits']:.2f} | {row['wan'] / 1e9:.2f}" if "bits" in row else "0 | 0"
        lines.append(f"| {name} | {sizes} | " + " | ".join(f"{row[f'error {n}']:.4f}" for n in steps) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fastdit.apps.bench.quality.stores_table", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results/stores.json"))
    parser.add_argument("--write", type=Path, help="only write the table of --out into this page")
    args = parser.parse_args(argv)
    if args.write is not None:
        write_block(args.write, "<!-- stores -->", "<!-- /stores -->", markdown(args.out))
        return
    table(captions(args.prompts, 21), args.out, args.device)


if __name__ == "__main__":
    main()
