"""`fastdit bench gpu`: kernels held against float64 on this GPU, then attention and whole denoisers timed, into JSON files.

Each section has a file, which is written after every row, so an interrupted run keeps its rows. docs/benchmarks.md is made from
these files.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdit.apps.bench import gpu_tests, tables
from fastdit.apps.bench.markdown import write_block
from fastdit.apps.errors import UserError
from fastdit.apps.render.outputs import write_json


def bench_gpu(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the JSON files.")] = Path("docs/results"),
    only: Annotated[str, typer.Option(help="Sections, separated by commas; all by default.")] = "",
    repeats: Annotated[int, typer.Option(help="Interleaved runs of each; the median counts.")] = 5,
    table: Annotated[Path | None, typer.Option(help="Measure nothing: write the tables into this Markdown file.")] = None,
) -> None:
    """Measure attention and Wan-shaped denoisers on a CUDA GPU, correctness first."""
    if table is not None:
        page = table.read_text(encoding="utf-8")
        wanted = [(name, text) for name, text in tables.tables(out) if f"<!-- gpu:{name} -->" in page]
        for name, text in wanted:
            write_block(table, f"<!-- gpu:{name} -->", f"<!-- /gpu:{name} -->", text)
        typer.echo(f"{table}: {len(wanted)} tables written")
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError("PyTorch sees no CUDA GPU here: fastdit bench and fastdit bench kernel measure on a CPU")
    from fastdit.apps.bench.attention import wrong
    from fastdit.apps.bench.gpu_attention import FORMATS, SECTIONS
    from fastdit.apps.bench.gpu_denoisers import denoisers
    from fastdit.apps.bench.quality.selection_cost import cost

    sections: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
        "tests": gpu_tests.tests,
        "sanitizer": gpu_tests.sanitizer,
        **SECTIONS,
        "selection": lambda repeats: iter(cost(repeats, "cuda")),
        "denoisers": denoisers,
    }
    absent = gpu_tests.absent()
    chosen = only.split(",") if only else [name for name in sections if name not in absent]
    if unknown := set(chosen) - set(sections):
        raise UserError(f"--only: no section {', '.join(sorted(unknown))}: choose from {', '.join(sections)}", 2)
    for name, why in absent.items():
        if name in chosen:
            raise UserError(f"--only {name}: it {why}")
        if not only:
            typer.echo(f"{name}: not run, it {why}")
    if faults := wrong(FORMATS, (64, 128), torch.bfloat16, "cuda"):
        raise UserError(f"a kernel is wrong, so nothing is timed: {'; '.join(faults)}")
    facts = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), "device": torch.cuda.get_device_name(),
        "torch": torch.__version__, "triton": version("triton"), "cudnn": torch.backends.cudnn.version(),
    }  # fmt: skip
    typer.echo(f"{facts['device']}, torch {facts['torch']}: every format is right on ragged layouts")
    for name in chosen:
        rows: list[dict[str, Any]] = []
        start = time.perf_counter()
        for row in sections[name](repeats):
            rows.append(row)
            write_json(out / f"gpu_{name}.json", facts | {"rows": rows})
            typer.echo(f"{name}: " + json.dumps({key: _short(x) for key, x in row.items() if not isinstance(x, dict)}))
        typer.echo(f"{name}: {len(rows)} rows in {time.perf_counter() - start:.0f} s")
        torch.cuda.empty_cache()


def _short(x: Any) -> Any:
    return float(f"{x:.4g}") if isinstance(x, float) else x
