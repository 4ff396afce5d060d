"""`fastdit bench kernel`: attention kernels against float64 and then against PyTorch's own, as JSON rows. With `--model`, the
time that their compiled code should take on an H200.
"""

from __future__ import annotations

import datetime
import os
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fastdit
from fastdit.apps.bench import roofline
from fastdit.apps.bench.markdown import cpu_name
from fastdit.apps.errors import UserError
from fastdit.apps.render.outputs import write_json
from fastdit.apps.sizes import parse_size

if TYPE_CHECKING:
    from fastdit.core.layout import Grid
    from fastdit.core.quant import Quant


def bench_kernel(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file of rows.")] = None,
    grid: Annotated[str, typer.Option(help="Tokens in time x height x width; default by device.")] = "",
    tile: Annotated[str, typer.Option(help="Tokens of a tile.")] = "2x8x8",
    heads: Annotated[int, typer.Option(help="Heads.")] = 8,
    dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32; default by device.")] = "",
    formats: Annotated[str, typer.Option(help="Number formats, separated by commas.")] = "none,fp8/fp8,int8/fp8+k",
    densities: Annotated[str, typer.Option(help="Densities of 3D windows; 1: everything.")] = "1,0.5,0.25,0.125",
    repeats: Annotated[int, typer.Option(help="Interleaved runs of each; the median counts.")] = 7,
    flex: Annotated[
        bool, typer.Option("--flex", help="FlexAttention with the same tiles too (compiles for a minute).")
    ] = False,
    model: Annotated[bool, typer.Option("--model", help="Run nothing: the time each kernel should take on an H200.")] = False,
) -> None:
    """Measure the attention kernels alone, correctness first."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = parse_size(grid or ("32x32x32" if device == "cuda" or model else "8x16x16"), "--grid")
    wanted, shares = [_format(text) for text in formats.split(",")], _numbers(densities)
    if model:
        print_model(wanted, shares, dim, heads, shape[0] * shape[1] * shape[2])
        return
    rows = run(shape, parse_size(tile, "--tile"), heads, dim, dtype or _default(device), wanted, shares, device, repeats, flex)
    if out is not None:
        write_json(out, rows)


def run(
    grid: Grid, tile: Grid, heads: int, dim: int, dtype: str, formats: list[Quant], densities: list[float], device: str,
    repeats: int, flex: bool,
) -> dict[str, Any]:  # fmt: skip
    """Check, measure and print; returns the content of the file. Raises UserError for a wrong or missing kernel."""
    import torch

    from fastdit.apps.bench.attention import INCLUDES, measure, wrong
    from fastdit.core.layout import Layout

    kind = getattr(torch, dtype, None)
    if kind not in (torch.bfloat16, torch.float16, torch.float32):
        raise UserError(f"--dtype must be bfloat16, float16 or float32, got {dtype!r}", 2)
    try:
        faults = wrong(formats, (dim,), kind, device)
    except NotImplementedError as error:
        raise UserError(f"no kernel for this: {error}") from None
    if faults:
        raise UserError(f"a kernel is wrong, so nothing is timed: {'; '.join(faults)}")
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "dtype": dtype, "fastdit": fastdit.__version__, "torch": torch.__version__, "triton": _triton(), "includes": INCLUDES,
    }  # fmt: skip
    typer.echo(f"{facts['device']}, {dtype}, torch {torch.__version__}: every format is right on ragged layouts. Times in ms.")
    rows = []
    for row in measure(Layout(grid, tile), heads, dim, kind, formats, densities, device, repeats, flex):
        rows.append(row)
        parts = "".join(f", {name[:-3]} {row[name]:.3f}" for name in ("packing_ms", "attention_ms", "other_ms") if name in row)
        typer.echo(
            f"{row['tokens']} tokens, {heads} heads of {dim}, density {row['density']:.3f}, {row['quant']}: "
            f"{row['ms']:.3f}{parts}; "
            + ", ".join(f"{name} {took:.3f}" for name, took in row["baselines_ms"].items())
            + f": {row['ratio']:.2f} x {row['baseline']}"
        )
    return facts | {"rows": rows}


def print_model(formats: list[Quant], densities: list[float], dim: int, heads: int, tokens: int) -> None:
    """Compile each format for sm_90 and print the milliseconds of each pipe."""
    os.environ.pop("TRITON_INTERPRET", None)
    from fastdit.apps.bench.sass import compile_forward

    typer.echo(f"{roofline.H200.name}, {tokens} tokens, {heads} heads of {dim}, milliseconds of each pipe; nothing was run")
    for quant in formats:
        row = compile_forward(roofline.H200.arch, dim, quant)
        block = f"{row['block_q']}x{row['block_k']}, {row['warps']} warps, {row['loop']} instructions a step"
        for density in densities:
            pipes = roofline.model(row, roofline.H200, tokens, heads, density)
            typer.echo(f"{quant} at {density:g} ({block}): " + ", ".join(f"{name} {x:.2f}" for name, x in pipes.items()))


def _default(device: str) -> str:
    return "bfloat16" if device == "cuda" else "float32"


def _triton() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < x <= 1 for x in numbers):
        raise UserError(f"--densities: {text!r} is not numbers in (0, 1] with commas between", 2)
    return numbers


def _format(text: str) -> Quant:
    from fastdit.core.quant import Quant

    try:
        return Quant.parse(text.strip())
    except ValueError as error:
        raise UserError(f"--formats: {error}", 2) from None
