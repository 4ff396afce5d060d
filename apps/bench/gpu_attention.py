"""What `fastdit bench gpu` measures of attention alone, a function a section; rows as in `attention.py`.

dense: all of attention, in each format and length. sliding: the setting of Sliding Tile Attention's own table (arXiv 2502.04507
§4). video: Wan's 14B heads at 480p and 720p over densities and tiles. remembered: Re-ttention's epilogue (arXiv 2505.22918)
beside its limits. remainder: what pooled tiles cost. int4: what it costs. others: FlexAttention and SageAttention on the same
tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdit import Config, Phase, Quant, Reuse, Window, ops
from fastdit.approx import step_cache
from fastdit.apps.bench.attention import baselines, inputs, measure, milliseconds
from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Grid, Layout
from fastdit.planning.forward_plan import plan_call

FP8, INT8 = Quant("fp8", "fp8"), Quant("int8", "fp8", smooth_k=True)
FORMATS = [Quant(), FP8, INT8]
VIDEO: dict[str, Grid] = {"480p": (21, 30, 52), "720p": (21, 45, 80)}
"""Tokens of Wan at 81 frames."""
TILES: dict[str, tuple[Grid, ...]] = {"480p": ((2, 8, 8), (3, 10, 4)), "720p": ((2, 8, 8), (1, 8, 16))}
Rows = Iterator[dict[str, Any]]


def dense(repeats: int) -> Rows:
    for dim in (128, 64):
        for frames in (8, 16, 32, 64, 128) if dim == 128 else (16, 32, 64):
            layout = Layout((frames, 32, 32), (2, 8, 8))
            for row in measure(layout, 8, dim, torch.bfloat16, FORMATS, [1.0], "cuda", repeats):
                flop = 4 * layout.length**2 * dim * 8
                yield row | {"tflops": flop / row["attention_ms"] / 1e9, "tflops_call": flop / row["ms"] / 1e9}


def sliding(repeats: int) -> Rows:
    layout = Layout((30, 48, 80), (6, 8, 8))
    yield from measure(layout, 24, 128, torch.bfloat16, FORMATS, [Window(size=(3, 3, 3))], "cuda", repeats)


def video(repeats: int) -> Rows:
    for name, grid in VIDEO.items():
        for tile in TILES[name]:
            densities = [1.0, 0.5, 0.25, 0.125, 0.09] if tile == (2, 8, 8) else [0.125]
            for row in measure(Layout(grid, tile), 40, 128, torch.bfloat16, FORMATS, densities, "cuda", repeats):
                dense_ms = row["baselines_ms"][row["baseline"]]
                yield row | {"clip": name, "over_ideal": row["ms"] / (row["density"] * dense_ms)}


def int4(repeats: int) -> Rows:
    formats = [Quant("int4", "fp8", smooth_q=True, smooth_k=True), Quant("int4", "fp8", smooth_k=True)]
    yield from measure(Layout((32, 32, 32), (2, 8, 8)), 8, 128, torch.bfloat16, [*formats, INT8], [1.0], "cuda", repeats)


def others(repeats: int) -> Rows:
    yield from measure(Layout((32, 32, 32), (2, 8, 8)), 8, 128, torch.bfloat16, FORMATS, [1.0, 0.125], "cuda", repeats, True)


def remembered(repeats: int) -> Rows:
    """One step of Wan 14B at 720p that uses what the last dense step left, and that dense step."""
    grid, tile = VIDEO["720p"], (2, 8, 8)
    q, k, v = inputs(Layout(grid, tile), 40, 128, torch.bfloat16, "cuda")
    lines = baselines(q, k, v)
    for quant in (Quant(), FP8):
        calls: dict[str, Any] = {}
        for reuse in (Reuse(), *(Reuse(kind, refresh=1 << 30) for kind in ("retention", "ratio", "residual", "broadcast"))):
            config = Config((Phase(policy=Window(density=0.125), quant=quant, reuse=reuse),), tile)
            plan = plan_call(config, 0.5, grid, q, k, v)
            calls[reuse.kind] = _step(q, k, v, plan, reuse, step_cache.Memory(), lines)
        yield from _kinds("remembered", calls, quant, lines, plan.density, q.shape[2], repeats)


def remainder(repeats: int) -> Rows:
    """Wan 14B at 720p, a window of an eighth, with what it drops as pooled tiles and without."""
    layout = Layout(VIDEO["720p"], (2, 8, 8))
    q, k, v = inputs(layout, 40, 128, torch.bfloat16, "cuda")
    mask = BlockMask.from_tile_map(Window(density=0.125).select(layout).cuda(), layout)
    lines = baselines(q, k, v)
    for quant in FORMATS:
        calls = {kind: partial(ops.attention, q, k, v, mask, quant, remainder=kind) for kind in ("none", "pooled")}
        yield from _kinds("remainder", calls, quant, lines, mask.density(), layout.length, repeats)


def _kinds(
    key: str, calls: dict[str, Any], quant: Quant, lines: dict[str, Any], density: float, tokens: int, repeats: int
) -> Rows:
    """A row a call, beside the fastest dense baseline of the same turns."""
    took = milliseconds(calls | lines, repeats, "cuda")
    best = min(lines, key=lambda name: took[name])
    for kind in calls:
        yield {key: kind, "quant": str(quant), "ms": took[kind], "baseline": best, "baseline_ms": took[best],
               "ratio": took[best] / took[kind], "density": density, "tokens": tokens}  # fmt: skip


def _step(q: Tensor, k: Tensor, v: Tensor, plan: Any, reuse: Reuse, held: step_cache.Memory, lines: dict[str, Any]) -> Any:
    """A call that reuses, its refresh already done."""

    def call() -> Any:
        return step_cache.attention(q, k, v, plan, reuse, held, None, next(iter(lines.values())))

    if reuse.kind != "none":
        out, how = call()
        if how != "refresh":
            raise RuntimeError(f"{reuse}: {held.no_room}")
        exact = ops.attention(q, k, v)[0]
        if not torch.allclose(out, exact, atol=0.02, rtol=0.02):
            raise RuntimeError(f"{reuse}: its dense step is not dense attention")
    return call


SECTIONS = {"dense": dense, "sliding": sliding, "video": video, "remembered": remembered, "remainder": remainder, "int4": int4,
            "others": others}  # fmt: skip
