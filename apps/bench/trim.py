"""`python -m fastdit.apps.bench.trim`: what cutting padded text saves, on a denoiser of HunyuanVideo's shape.

HunyuanVideo pads every prompt to 256 tokens and hides the padding from the whole sequence by a mask. Stock and `exact` (which
only cuts the padding) are timed in turns, in one process: one attention call, and one forward of the real model class with
random weights. Nothing is timed if their results differ by more than the order of sums explains.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn

import fastdit
from fastdit.apps.bench.markdown import cpu_name, write_block
from fastdit.apps.render.outputs import write_json
from fastdit.apps.sizes import parse_size
from fastdit.attach.processor import installed
from fastdit.attach.site_op import attend
from fastdit.core.reference import relative_error

GRIDS = "1x30x52,1x64x64,5x30x52"
"""Tokens in time, height and width: pictures of 832x480 and 1024x1024, 17 frames of 832x480."""
SLOTS = 256
"""Text tokens that HunyuanVideo pads to."""
HEADS, DIM = 2, 128
"""HunyuanVideo has 24 heads; attention's time is proportional to them, and so is nearly all of the rest."""
LIMIT = 1e-5
"""A relative error above this has another cause than the order of float32 sums."""
BEGIN, END = "<!-- trim -->", "<!-- /trim -->"


def denoiser() -> Any:
    """A HunyuanVideo of one dual and two single blocks."""
    torch.manual_seed(0)
    cls: Any = HunyuanVideoTransformer3DModel  # diffusers' own types hide nn.Module's methods
    model = cls(num_attention_heads=HEADS, attention_head_dim=DIM, num_layers=1, num_single_layers=2, num_refiner_layers=1)
    return model.eval().requires_grad_(False)


def inputs(grid: tuple[int, int, int], used: int) -> dict[str, Any]:
    t, h, w = grid
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(1, SLOTS, dtype=torch.long)
    mask[:, :used] = 1
    return {
        "hidden_states": torch.randn(1, 16, t, 2 * h, 2 * w, generator=generator), "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, SLOTS, 4096, generator=generator), "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(1, 768, generator=generator), "guidance": torch.tensor([6000.0]),
        "return_dict": False,
    }  # fmt: skip


def seconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Least CPU time of each call, taken in turns after one warm-up: what one undisturbed core would need."""
    best = dict.fromkeys(calls, float("inf"))
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn:
                best[name] = min(best[name], time.process_time() - start)
    return best


@torch.no_grad()
def measure(grid: tuple[int, int, int], model: Any, used: int, repeats: int) -> dict[str, Any]:
    """Measure one row. Raises RuntimeError if the results differ."""
    given = inputs(grid, used)
    stock = model(**given)[0]

    def fast() -> Any:
        with fastdit.accelerate(model, "exact"):
            return model(**given)[0]

    forward_error = relative_error(fast(), stock)
    video = grid[0] * grid[1] * grid[2]
    tokens = video + SLOTS
    q, k, v = (torch.randn(1, tokens, HEADS, DIM, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = (torch.arange(tokens) < video + used)[None, None, None]
    with fastdit.accelerate(model, "exact"):
        model(**given)
        facts: Any = installed(model)
        token, layer = torch.tensor([facts.call.forward.number]), torch.tensor([0])
        calls = {
            "stock": lambda: dispatch_attention_fn(q, k, v, mask),
            "cut": lambda: attend(token, layer, q, k, v, mask, None, ""),
        }
        cut, masked = (call()[:, : video + used] for call in (calls["cut"], calls["stock"]))  # nobody reads the padding
        call_error = relative_error(cut, masked)
        if max(call_error, forward_error) > LIMIT:
            raise RuntimeError(f"{grid}: cut text changes the answer by {call_error:.1e} a call, {forward_error:.1e} in all")
        call = seconds(calls, repeats)
        trimmed = facts.handle.sites[0].calls[-1].trimmed
    forward = seconds({"stock": lambda: model(**given), "cut": fast}, repeats)
    return {
        "clip": f"{4 * grid[0] - 3}x{16 * grid[1]}x{16 * grid[2]}", "grid": grid, "tokens": tokens,
        "text_slots": SLOTS, "text_used": used, "cut": trimmed, "repeats": repeats,
        "call_stock_s": call["stock"], "call_cut_s": call["cut"], "call_ratio": call["stock"] / call["cut"],
        "forward_stock_s": forward["stock"], "forward_cut_s": forward["cut"],
        "forward_ratio": forward["stock"] / forward["cut"], "call_error": call_error, "forward_error": forward_error,
    }  # fmt: skip


def markdown(measured: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| clip | tokens | one attention call: masked | cut | ratio | one forward: masked | cut | ratio | error |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in measured["rows"]:
        lines.append(
            f"| {row['clip']} | {row['tokens']:,} | {row['call_stock_s']:.3f} s | {row['call_cut_s']:.3f} s "
            f"| **{row['call_ratio']:.2f} ×** | {row['forward_stock_s']:.2f} s | {row['forward_cut_s']:.2f} s "
            f"| **{row['forward_ratio']:.2f} ×** | {max(row['call_error'], row['forward_error']):.0e} |"
        )
    facts = measured["rows"][0]
    lines += [
        "",
        f"{measured['cpu']}, one thread, CPU time, float32, torch {measured['torch']}, diffusers"
        f" {measured['diffusers']}; {facts['text_slots']} text slots, {facts['text_used']} used; {HEADS} heads of {DIM},"
        " one dual and two single blocks, random weights; best of interleaved calls. Error: relative L2 against stock.",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/trim_cpu.json"), help="JSON file of rows")
    parser.add_argument("--grids", default=GRIDS, help="grids in tokens, separated by commas")
    parser.add_argument("--used", type=int, default=20, help=f"text tokens of {SLOTS} that the prompt fills")
    parser.add_argument("--repeats", type=int, default=5, help="interleaved calls of each; the best counts")
    parser.add_argument("--table", type=Path, help="measure nothing: write the rows of --out into this Markdown file")
    options = parser.parse_args(arguments)
    if options.table:
        write_block(options.table, BEGIN, END, markdown(json.loads(options.out.read_text(encoding="utf-8"))))
        return
    torch.set_num_threads(1)  # so that time does not depend on what else the machine does
    model = denoiser()
    facts = {
        "cpu": cpu_name(), "torch": torch.__version__,
        "diffusers": diffusers.__version__, "fastdit": fastdit.__version__,
    }  # fmt: skip
    rows = []
    for t, h, w in (parse_size(each, "--grids") for each in options.grids.split(",")):
        try:
            rows.append(measure((t, h, w), model, options.used, options.repeats))
        except RuntimeError as error:
            sys.exit(f"bench_trim: nothing is timed: {error}")
        row = rows[-1]
        print(f"{row['clip']}: attention {row['call_ratio']:.2f} x, forward {row['forward_ratio']:.2f} x", flush=True)
        write_json(options.out, facts | {"rows": rows})


if __name__ == "__main__":
    main()
