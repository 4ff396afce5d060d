"""`fastdit bench`: dense and every preset on the embedded model, into JSON rows; the README's table is made from them.

A row is one size with one preset. Rows are written as they come, and an interrupted benchmark goes on where it stopped. Rows of
other sizes, presets or step counts in the same file are kept.
"""

from __future__ import annotations

import datetime
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

import fastdit
from fastdit.apps.bench.markdown import cpu_name, write_block
from fastdit.apps.errors import UserError
from fastdit.apps.render.load import check_shape, denoisers, load
from fastdit.apps.render.outputs import write_json
from fastdit.apps.render.settings import Settings
from fastdit.apps.sizes import FRAMES, parse_size
from fastdit.pipelines import embedded

INCLUDES = "denoising loop: denoiser, guidance, scheduler; planning, block masks, permutation and quantization with it"
BEGIN, END = "<!-- bench:main -->", "<!-- /bench:main -->"
PROMPT, GUIDANCE = embedded.PROMPT, embedded.GUIDANCE
KEY = ("shape", "preset", "steps", "prompt", "seed")
"""Fields that tell rows apart."""


def bench(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file of rows; existing rows are kept.")] = Path(
        "docs/results/bench_cpu.json"
    ),
    sizes: Annotated[str, typer.Option(help="Sizes, frames x height x width, separated by commas.")] = "33x256x256,17x64x64",
    presets: Annotated[str, typer.Option(help="Presets, separated by commas.")] = "balanced,fast",
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = embedded.STEPS,
    repeats: Annotated[int, typer.Option(help="Interleaved runs of each; the best counts.")] = 3,
    prompt: Annotated[str, typer.Option(help="What to draw.")] = PROMPT,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 1,
    again: Annotated[bool, typer.Option("--again", help="Also measure the rows that the file has already.")] = False,
    table: Annotated[
        Path | None, typer.Option("--table", help="Measure nothing: write the rows of --out into this Markdown file.")
    ] = None,
) -> None:
    """Measure the presets against dense attention, or write the table of what was measured."""
    if context.invoked_subcommand is not None:  # bench kernel, bench gpu: not this one too
        return
    if table is not None:
        write_table(table, read_rows(out, must_exist=True))
        typer.echo(f"{table}: table written from {out}")
        return
    asked = [parse_size(each, "--sizes", FRAMES) for each in sizes.split(",")]
    run(out, asked, [name.strip() for name in presets.split(",")], steps, repeats, prompt, seed, again)


def run(
    out: Path,
    sizes: list[tuple[int, int, int]],
    presets: list[str],
    steps: int = embedded.STEPS,
    repeats: int = 3,
    prompt: str = PROMPT,
    seed: int = 1,
    again: bool = False,
    model: str | None = None,
) -> list[dict[str, Any]]:
    """Measure the rows that the file lacks; returns all of them. Raises UserError."""
    from fastdit.apps.compare.measure import measure
    from fastdit.apps.compare.runs import describe

    cases = {
        size: [Settings(prompt, "", seed, model, name, *size, steps=steps, guidance=GUIDANCE) for name in presets]
        for size in sizes
    }
    for settings in (one for case in cases.values() for one in case):
        settings.check()
    if repeats < 1:
        raise UserError(f"--repeats must be at least 1, got {repeats}", 2)
    rows = read_rows(out)
    write_json(out, {"rows": rows})  # before anything is measured: a folder that cannot be written should not cost an hour
    pipe = load(cases[sizes[0]][0])
    for size in sizes:
        check_shape(pipe, *size)
    for case in cases.values():
        have = set() if again else {_key(row) for row in rows}
        wanted = [settings for settings in case if _key(_named(settings)) not in have]
        if not wanted:
            typer.echo(f"{_named(case[0])['shape']}: measured already")
            continue
        found = measure(pipe, wanted[0], {s.preset: s.config() for s in wanted}, repeats)
        for settings in wanted:
            row = _named(settings) | _machine(pipe) | {"tokens": found.tokens, "guidance": settings.guidance}
            row |= {"repeats": repeats, "baseline": found.kernel, "includes": INCLUDES, "dense_s": found.dense_seconds}
            row |= found.variants[settings.preset].to_dict(found.dense_seconds)
            row["config"] = settings.config().to_dict()
            rows = [old for old in rows if _key(old) != _key(row)] + [row]
            typer.echo(describe(settings, found, settings.preset, repeats))
        write_json(out, {"rows": rows})
    return rows


def _named(settings: Any) -> dict[str, Any]:
    shape = f"{settings.frames}x{settings.height}x{settings.width}"
    return {"shape": shape} | {field: getattr(settings, field) for field in KEY[1:]}


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(field) for field in KEY)


def _machine(pipe: Any) -> dict[str, Any]:
    """The date, the kind of processor, and the versions; not the machine's name."""
    import diffusers
    import torch

    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(next(denoisers(pipe)).dtype).removeprefix("torch."),
        "fastdit": fastdit.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def read_rows(path: Path, must_exist: bool = False) -> list[dict[str, Any]]:
    """The rows of a file; empty if it does not exist yet. Raises UserError for another kind of file."""
    if not path.exists() and not must_exist:
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        if not all(set(KEY) <= set(row) for row in rows):
            raise KeyError("rows")
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): measure first, with fastdit bench --out {path}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} does not hold rows of fastdit bench: choose another file with --out") from None
    return list(rows)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, largest clips first, and a line on how they were measured."""
    lines = [
        "| clip | tokens | preset | dense | fastdit | speed | density | velocity error | PSNR | SSIM |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: (-row["tokens"], row["shape"], row["steps"], row["fast_s"] * -1)):
        psnr = "identical" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
        errors = max((phase["error"] for phase in row["velocity_error"]), default=0.0)
        speed = "stays dense" if row["stayed_dense"] else f"**{row['ratio']:.2f} ×**"
        lines.append(
            f"| {row['shape']}, {row['steps']} steps | {row['tokens']} | {row['preset']} | {row['dense_s']:.2f} s "
            f"| {row['fast_s']:.2f} s | {speed} | {row['density']:.2f} | {errors:.1%} | {psnr} | {row['ssim']:.3f} |"
        )
    facts = sorted(
        {f"{r['cpu']}, {r['threads']} threads, {r['dtype']}, torch {r['torch']}, diffusers {r['diffusers']}" for r in rows}
    )
    baselines = sorted({f"stock diffusers with {row['baseline']}" for row in rows})
    lines += ["", f"{'; '.join(facts)}. Dense: {'; '.join(baselines)}. Time: {INCLUDES}; best of interleaved runs."]
    lines += ["Velocity error: teacher-forced, relative L2, of the worst phase. PSNR and SSIM: decoded frames against dense."]
    return "\n".join(lines)


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the table into a Markdown file. Raises UserError."""
    write_block(path, BEGIN, END, markdown(rows))
