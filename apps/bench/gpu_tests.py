"""What `fastdit bench gpu` runs before it times anything on a new GPU: the checkout's kernel tests and compute-sanitizer.

The sanitizer watches `python -m fastdit.apps.bench.gpu_tests`, which runs every kernel once, on shapes that fill no tile
(without a GPU: the CPU's kernels).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from fastdit.apps.errors import UserError

Rows = Iterator[dict[str, Any]]
WORKERS = 14
"""Processes of pytest: most of the time goes into compiling a kernel for each format and shape."""
TESTS = sorted((Path(__file__).resolve().parents[2] / "tests" / "kernels").glob("test_*.py"))
SANITIZER, FAULT = "compute-sanitizer", 99


def absent() -> dict[str, str]:
    """{section that cannot run on this machine: what is missing}."""
    found: dict[str, str] = {}
    if not TESTS:
        found["tests"] = "needs a checkout of the repository: an installed fastdit has no tests"
    elif find_spec("pytest") is None:
        found["tests"] = "needs pytest"
    if shutil.which(SANITIZER) is None:
        found["sanitizer"] = f"needs {SANITIZER}, which comes with the CUDA toolkit"
    return found


def tests(repeats: int) -> Rows:
    """A row for each file of kernel tests. Raises UserError if a test failed."""
    rows = list(suite(TESTS))
    yield from rows
    if wrong := sum(row["failed"] for row in rows):
        raise UserError(f"{wrong} kernel tests failed on this GPU: nothing that follows would mean anything")


def suite(files: Sequence[Path]) -> Rows:
    """Run pytest on files, in parallel if pytest-xdist is installed: {"file", "passed", "skipped", "failed", "seconds"}."""
    parallel = ["-n", str(min(WORKERS, max(1, (os.cpu_count() or 1) - 2)))] if find_spec("xdist") else []
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "junit.xml"
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", "-o", "junit_family=xunit2", *parallel]
        run = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *map(str, files)],
            env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        if not report.exists():
            raise UserError(f"pytest did not run: {(run.stdout + run.stderr).strip()[-500:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    for file in files:
        mine = [case for case in cases if case.get("classname", "").split(".")[-1] == file.stem]
        skipped = sum(case.find("skipped") is not None for case in mine)
        failed = sum(case.find("failure") is not None or case.find("error") is not None for case in mine)
        if not mine:
            raise UserError(f"pytest ran nothing of {file.name}: {run.stdout.strip()[-500:]}")
        yield {"file": file.stem, "passed": len(mine) - skipped - failed, "skipped": skipped, "failed": failed,
               "seconds": round(sum(float(case.get("time", 0)) for case in mine), 1)}  # fmt: skip


def sanitizer(repeats: int) -> Rows:
    """Run every kernel once under compute-sanitizer's memcheck. Raises UserError if it finds a fault."""
    command = [
        SANITIZER,
        "--tool",
        "memcheck",
        f"--error-exitcode={FAULT}",
        sys.executable,
        "-m",
        "fastdit.apps.bench.gpu_tests",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    said = (run.stdout + run.stderr).strip()
    if run.returncode:
        raise UserError(f"compute-sanitizer (exit code {run.returncode}): {said[-2000:]}")
    yield {"tool": "memcheck", "calls": int(said.partition("calls: ")[2].split()[0]), "errors": 0}


def main() -> None:
    import torch

    from fastdit import Quant, ops
    from fastdit.apps.bench.attention import inputs
    from fastdit.apps.bench.gpu_attention import FORMATS
    from fastdit.core.block_mask import BlockMask
    from fastdit.core.layout import Layout

    device = "cuda" if torch.cuda.is_available() else "cpu"
    calls = 0
    for dim, heads in ((64, 2), (64, 10), (128, 2), (128, 10)):  # two heads: lists cut into parts; ten: Hopper's own kernel
        for tile in ((2, 8, 8), (1, 8, 8)):
            layout = Layout((3, 17, 20), tile, 9)
            q, k, v = inputs(layout, heads, dim, torch.bfloat16, device)
            some = torch.rand(1, heads, layout.num_tiles, layout.num_tiles, generator=torch.Generator().manual_seed(0)) < 0.5
            mask = BlockMask.from_tile_map(some.to(device), layout)
            for quant in (*FORMATS, Quant("int4", "fp8", smooth_q=True, smooth_k=True)):
                for remainder in ("none", "pooled"):
                    ops.attention(q, k, v, mask, quant, remainder=remainder)
                    calls += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"calls: {calls}")


if __name__ == "__main__":
    main()
