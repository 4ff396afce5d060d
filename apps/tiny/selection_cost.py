"""`python -m fastdit.apps.tiny.selection_cost`: how long it takes to choose tiles at 9,216 tokens, beside dense attention.

Choosing is everything from tensors in token order to the lists of tiles; static policies do it once a run, the others every
call.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from fastdit import Config, Phase
from fastdit.plan import make_plan
from fastdit.policies import LSH, Antidiagonal, Radial, SpatialTemporal, Stripe, TopMass, Window


@torch.no_grad()
def cost(repeats: int = 3) -> list[dict[str, Any]]:
    """Seconds to choose tiles at 9,216 tokens (maps and lists, from tensors in token order) beside dense attention's."""
    grid = (9, 32, 32)
    q, k, v = (torch.randn(2, 3, 9216, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
    policies = [
        Window(density=0.25), Radial(density=0.25), SpatialTemporal(density=0.25), Antidiagonal(density=0.25),
        Antidiagonal(density=0.25, stride=16), TopMass(density=0.25), Stripe(theta=0.0, window=(1, 1, 1)), LSH(density=0.25),
    ]  # fmt: skip
    best: dict[str, float] = {}
    for _ in range(repeats):
        start = time.perf_counter()
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
        best["dense"] = min(best.get("dense", 1e9), time.perf_counter() - start)
        for policy in policies:
            config = Config((Phase(policy=policy),), (1, 8, 8), max_density=1)
            start = time.perf_counter()
            make_plan(config, 0.5, 0, 1, grid, 0, False, q, k, v)
            best[str(policy)] = min(best.get(str(policy), 1e9), time.perf_counter() - start)
    return [{"policy": name, "seconds": round(t, 5), "of dense": round(t / best["dense"], 4)} for name, t in best.items()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fastdit.apps.tiny.selection_cost", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="interleaved; the best counts")
    parser.add_argument("--out", type=Path, default=Path("docs/results/selection.json"))
    args = parser.parse_args(argv)
    rows = cost(args.repeats)
    args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n".join(map(str, rows)))


if __name__ == "__main__":
    main()
