"""`python -m fastdit.apps.bench_gpu`: Wan-shaped denoisers on a CUDA GPU, dense against windows, in one process.

Weights are random and in bfloat16: time does not depend on them, quality is not claimed. First the kernels are held against
float64; if one is wrong, nothing is timed. Times are CUDA events, the best of interleaved calls of the whole denoiser through
diffusers: packing, quantization and everything else that a user waits for is in them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fastdit
from fastdit import Config, Phase, Window, ops
from fastdit.apps.bench import write_block
from fastdit.blockmask import BlockMask
from fastdit.kernels import cpu
from fastdit.layout import Layout
from fastdit.policies import Dense
from fastdit.quant import Quant
from fastdit.reference import attention, relative_error, token_mask

SHAPES = {
    # layers, heads of 128, feed-forward width, latent (T, H, W) before 1×2×2 patches
    "Wan 1.3B, 81 frames, 480p": (30, 12, 8960, (21, 60, 104)),
    "Wan 1.3B, 81 frames, 720p": (30, 12, 8960, (21, 90, 160)),
    "Wan 14B, 8 of its 40 layers, 81 frames, 720p": (8, 40, 13824, (21, 90, 160)),
}
FORMATS = (Quant(), Quant("fp8", "fp8"), Quant("int8", "fp8", smooth_k=True), Quant("int8", smooth_k=True))
BEGIN, END = "<!-- bench:gpu -->", "<!-- /bench:gpu -->"
INT4 = Quant("int4", "fp8", smooth_q=True, smooth_k=True)


def check() -> list[str]:
    """Every format on ragged layouts against float64: a line for each that is outside twice its emulation's error."""
    wrong = []
    layouts = (Layout((3, 20, 24), (1, 8, 8), text_len=9), Layout((6, 17, 17), (2, 8, 8)), Layout((5, 17, 17), (6, 8, 8)))
    for layout, quant in itertools.product(layouts, (*FORMATS, INT4)):
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, layout.length, 2, 128, generator=generator).transpose(1, 2) for _ in range(3))
        q, k, v = (x.bfloat16() for x in (q, k + 3 * torch.randn(128, generator=generator), v + 1))
        tile_map = torch.rand(1, 2, layout.num_tiles, layout.num_tiles, generator=generator) < 0.5
        tile_map[:, 1, 1] = False
        m = BlockMask.from_tile_map(tile_map, layout)
        if ops.unsupported(q.cuda(), quant):
            continue
        out, lse = ops.attention(q.cuda(), k.cuda(), v.cuda(), BlockMask.from_tile_map(tile_map.cuda(), layout), quant)
        exact, exact_lse = attention(q.double(), k.double(), v.double(), token_mask(layout, tile_map))
        masks = (m.kv_num_blocks, m.kv_indices, m.q_order, m.k_order)
        emulated, _ = cpu.block_sparse_attention(q.float(), k.float(), v.float(), *masks, 128**-0.5, quant)
        error, budget = relative_error(out.cpu(), exact), 2 * relative_error(emulated, exact) + 2**-7
        same_rows = torch.equal(lse.cpu().isneginf(), exact_lse.isneginf())
        if error > budget or not same_rows:
            wrong.append(f"{layout.tile} {quant}: error {error:.2e}, budget {budget:.2e}, empty rows right: {same_rows}")
    return wrong


def milliseconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Best time of each call, taken in turns after one warm-up."""
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            torch.cuda.synchronize()
            if turn:
                best[name] = min(best[name], start.elapsed_time(end))
    return best


def configs() -> dict[str, Config]:
    """By name: windows in 16 bits and in eight, and all of attention in FP8."""
    found = {}
    for density, quant in ((0.22, FORMATS[0]), *((0.125, quant) for quant in FORMATS[:3])):
        phase = Phase(policy=Window(density=density), quant=quant)
        found[f"window {density:g}, {'bf16' if quant.is_none else quant}"] = Config((phase,), (1, 8, 8))
    return found | {"dense, fp8/fp8": Config((Phase(policy=Dense(), quant=FORMATS[1]),))}


@torch.no_grad()
def measure(name: str, repeats: int) -> list[dict[str, Any]]:
    """Rows of one denoiser: stock against every configuration."""
    from diffusers import WanTransformer3DModel

    denoiser: Any = WanTransformer3DModel  # diffusers' own types hide nn.Module's methods
    layers, heads, ffn, latent = SHAPES[name]
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = denoiser(
            patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=128, in_channels=16, out_channels=16,
            text_dim=4096, freq_dim=256, ffn_dim=ffn, num_layers=layers,
        ).to(torch.bfloat16).eval()  # fmt: skip
        torch.nn.init.normal_(model.proj_out.weight, std=0.02)
        inputs = {
            "hidden_states": torch.randn(1, 16, *latent, dtype=torch.bfloat16),
            "timestep": torch.tensor([500]),
            "encoder_hidden_states": torch.randn(1, 512, 4096, dtype=torch.bfloat16),
            "return_dict": False,
        }
        tokens = latent[0] * latent[1] * latent[2] // 4
        q, k, v = (torch.randn(1, heads, tokens, 128, dtype=torch.bfloat16) for _ in range(3))
    stock = model(**inputs)[0]
    alone = milliseconds({"sdpa": lambda: F.scaled_dot_product_attention(q, k, v)}, repeats)["sdpa"] * layers
    rows = []
    for what, config in configs().items():

        def fast(config: Config = config) -> Any:
            with fastdit.accelerate(model, config):
                return model(**inputs)[0]

        with fastdit.accelerate(model, config):
            out = model(**inputs)[0]
            report = fastdit.report(model)
        error, finite = relative_error(out, stock), bool(out.isfinite().all())
        best = milliseconds({"dense": lambda: model(**inputs), "fast": fast}, repeats)
        rows.append(
            {
                "model": name, "tokens": tokens, "config": what, "density": report.density, "ran": report.sites[0].ran,
                "dense_ms": best["dense"], "fast_ms": best["fast"], "ratio": best["dense"] / best["fast"],
                "attention_alone_ms": alone, "output_change": error, "finite": finite,
            }
        )  # fmt: skip
        print(f"  {what}: {best['fast']:.0f} ms against {best['dense']:.0f}: {rows[-1]['ratio']:.2f} x", flush=True)
    return rows


def markdown(measured: dict[str, Any]) -> str:
    """The rows as a Markdown table: a line per model and configuration."""
    lines = [
        f"One call of the denoiser on {measured['device']}, torch {measured['torch']}, bfloat16, random weights:",
        "",
        "| model | tokens | dense (SDPA) | configuration | density | fast | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in measured["rows"]:
        lines.append(
            f"| {row['model']} | {row['tokens']:,} | {row['dense_ms']:.0f} ms | {row['config']} | {row['density']:.2f} "
            f"| {row['fast_ms']:.0f} ms | {row['ratio']:.2f} × |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/wan_gpu.json"), help="JSON file of rows")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved calls of each; the best counts")
    parser.add_argument("--table", type=Path, help="measure nothing: write the rows of --out into this Markdown file")
    options = parser.parse_args(arguments)
    if options.table:
        write_block(options.table, BEGIN, END, markdown(json.loads(options.out.read_text(encoding="utf-8"))))
        return
    if not torch.cuda.is_available():
        sys.exit("bench_gpu: PyTorch sees no CUDA GPU here; fastdit bench measures on a CPU")
    if wrong := check():
        sys.exit("bench_gpu: a kernel is wrong, so nothing is timed:\n" + "\n".join(wrong))
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "fastdit": fastdit.__version__}
    rows: list[dict[str, Any]] = []
    for name in SHAPES:
        print(name, flush=True)
        rows += measure(name, options.repeats)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(facts | {"rows": rows}, indent=1), encoding="utf-8")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
