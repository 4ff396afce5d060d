"""`python -m fastdit.apps.bench.quality.selection_cost`: how long it takes to choose tiles, beside dense attention, on CPU
or a GPU.

Choosing is everything from tensors in token order to the lists of tiles; static policies do it once a run, the others every
call.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastdit import Config, Phase
from fastdit.core.layout import Grid
from fastdit.planning.forward_plan import plan_call
from fastdit.policies import LSH, Antidiagonal, Radial, SpatialTemporal, Stripe, TopMass, Window


@dataclass(frozen=True)
class Case:
    """Where to measure: a grid in tokens and its tile, batch, heads, head dim, type."""

    grid: Grid
    tile: Grid
    batch: int
    heads: int
    dim: int
    dtype: torch.dtype


CASES = {
    "cpu": Case((9, 32, 32), (1, 8, 8), 2, 3, 64, torch.float32),  # the embedded model at 33 frames of 256×256
    "cuda": Case((21, 45, 80), (1, 8, 8), 1, 12, 128, torch.bfloat16),  # Wan 1.3B, 81 frames, 720p
}


@torch.no_grad()
def cost(repeats: int = 3, device: str = "cpu") -> list[dict[str, Any]]:
    """Seconds to choose tiles (maps and lists, from tensors in token order) beside dense attention's."""
    case = CASES[device]
    tokens = math.prod(case.grid)
    q, k, v = (
        torch.randn(case.batch, case.heads, tokens, case.dim, generator=torch.Generator(device).manual_seed(i), device=device)
        .to(case.dtype) for i in range(3)
    )  # fmt: skip
    policies = [
        Window(density=0.25), Radial(density=0.25), SpatialTemporal(density=0.25), Antidiagonal(density=0.25),
        Antidiagonal(density=0.25, stride=16), TopMass(density=0.25), Stripe(theta=0.0, window=(1, 1, 1)), LSH(density=0.25),
    ]  # fmt: skip
    best: dict[str, float] = {}
    for _ in range(repeats):
        start = _now(device)
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
        best["dense"] = min(best.get("dense", 1e9), _now(device) - start)
        for policy in policies:
            config = Config((Phase(policy=policy),), case.tile, max_density=1)
            start = _now(device)
            plan_call(config, 0.5, case.grid, q, k, v)
            best[str(policy)] = min(best.get(str(policy), 1e9), _now(device) - start)
    return [{"policy": name, "seconds": round(t, 5), "of dense": round(t / best["dense"], 4)} for name, t in best.items()]


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="fastdit.apps.bench.quality.selection_cost", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--repeats", type=int, default=5, help="interleaved; the best counts")
    parser.add_argument("--device", choices=tuple(CASES), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("docs/results/selection.json"))
    args = parser.parse_args(argv)
    rows = cost(args.repeats, args.device)
    args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n".join(map(str, rows)))


if __name__ == "__main__":
    main()
