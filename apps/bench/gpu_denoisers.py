"""Wan-shaped denoisers on a CUDA GPU for `fastdit bench gpu`: one step, compiled, dense against windows and presets.

Weights are random and in bfloat16: time does not depend on them, quality is not claimed. Times are CUDA events around whole
calls through diffusers, the median of interleaved ones: packing, quantization, statistics and everything else that a user waits
for is in them. A preset's step is the mean over ten noise levels, so its dense refreshes are in it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

import fastdit
from fastdit import Config, Phase, Quant, Window
from fastdit.core.reference import relative_error

SHAPES = {
    # layers, heads of 128, feed-forward width, latent (T, H, W) before 1×2×2 patches
    "Wan 1.3B, 81 frames, 480p": (30, 12, 8960, (21, 60, 104)),
    "Wan 14B, 4 of its 40 layers, 81 frames, 720p": (4, 40, 13824, (21, 90, 160)),
    "Wan 1.3B, 81 frames, 720p": (30, 12, 8960, (21, 90, 160)),
}
FP8, INT8 = Quant("fp8", "fp8"), Quant("int8", "fp8", smooth_k=True)
LEVELS = [900 - 20 * step for step in range(10)]
"""Timesteps of a preset's ten steps: below its dense beginning."""


def configs() -> dict[str, tuple[Config, list[int]]]:
    """Configurations by name, each with the timesteps of a measurement."""
    windows = (((1, 8, 8), 0.125, Quant()), ((2, 8, 8), 0.25, Quant()), ((2, 8, 8), 0.125, Quant()), ((2, 8, 8), 0.125, FP8),
               ((2, 8, 8), 0.125, INT8))  # fmt: skip
    found = {
        f"window {density:g}, {'x'.join(map(str, tile))}, {'bf16' if quant.is_none else quant}": (
            Config((Phase(policy=Window(density=density), quant=quant),), tile), [500]
        )
        for tile, density, quant in windows
    }  # fmt: skip
    found["dense, fp8/fp8"] = Config((Phase(quant=FP8),)), [500]
    return found | {f"preset {name}": (fastdit.preset(name), LEVELS) for name in ("balanced", "fast")}


def milliseconds(calls: dict[str, Callable[[], int]], repeats: int) -> dict[str, float]:
    """Median time of a step for each call, which returns its number of steps; the first turn does not count."""
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            steps = call()
            end.record()
            torch.cuda.synchronize()
            if turn:
                took[name].append(start.elapsed_time(end) / steps)
    return {name: statistics.median(times) for name, times in took.items()}


@torch.no_grad()
def denoisers(repeats: int) -> Iterator[dict[str, Any]]:
    for name in SHAPES:
        yield from measure(name, repeats)
        torch.cuda.empty_cache()


@torch.no_grad()
def measure(name: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Rows of one denoiser: stock against every configuration."""
    denoiser: Any = WanTransformer3DModel  # diffusers' own types hide nn.Module's methods
    layers, heads, ffn, latent = SHAPES[name]
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = denoiser(
            patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=128, in_channels=16, out_channels=16,
            text_dim=4096, freq_dim=256, ffn_dim=ffn, num_layers=layers,
        ).to(torch.bfloat16).eval()  # fmt: skip
        torch.nn.init.normal_(model.proj_out.weight, std=0.02)
        model.compile_repeated_blocks(fullgraph=True)
        inputs = {
            "hidden_states": torch.randn(1, 16, *latent, dtype=torch.bfloat16),
            "encoder_hidden_states": torch.randn(1, 512, 4096, dtype=torch.bfloat16),
            "return_dict": False,
        }
        times = {level: torch.tensor([level]) for level in (500, *LEVELS)}
        tokens = latent[0] * latent[1] * latent[2] // 4
        q, k, v = (torch.randn(1, heads, tokens, 128, dtype=torch.bfloat16) for _ in range(3))

    def run(levels: list[int]) -> int:
        for level in levels:
            model(**inputs, timestep=times[level])
        return len(levels)

    def attention() -> int:
        F.scaled_dot_product_attention(q, k, v)
        return 1

    stock = model(**inputs, timestep=times[500])[0]
    alone = milliseconds({"sdpa": attention}, repeats)["sdpa"] * layers
    for what, (config, levels) in configs().items():

        def fast(config: Config = config, levels: list[int] = levels) -> int:
            with fastdit.accelerate(model, config):
                return run(levels)

        torch.cuda.reset_peak_memory_stats()
        with fastdit.accelerate(model, config):
            out = model(**inputs, timestep=times[levels[0]])[0]
            run(levels[1:])
            report = fastdit.report(model)
        peak = torch.cuda.max_memory_allocated()
        if not bool(out.isfinite().all()):
            raise RuntimeError(f"{name}, {what}: the answer is not finite")
        took = milliseconds({"dense": lambda: run([500]), "fast": fast}, repeats if len(levels) == 1 else 1)
        yield {
            "model": name, "tokens": tokens, "config": what, "density": report.density, "dense_ms": took["dense"],
            "fast_ms": took["fast"], "ratio": took["dense"] / took["fast"], "attention_alone_ms": alone, "peak_gb": peak / 1e9,
            "output_change": relative_error(out, stock) if levels == [500] else None,
        }  # fmt: skip
