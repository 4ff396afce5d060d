"""What the kernels compile to on GPUs that are not here: enough registers and shared memory, the tensor cores that were meant.

`compile_table.json` holds what was read when it was last looked at, with two versions of Triton. Tensor-core instructions may
not change, the inner loop may grow by a twentieth. Remake it with `python tests/compile_kernels.py` (once per version).
"""

import json
import os
import subprocess
import sys

import pytest
from util import ROOT

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from fastdit.core.quant import Quant
from fastdit.kernels import launch

TESTS = ROOT / "tests"
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory one block may have, from NVIDIA's tables."""
KEY = ("triton", "arch", "dim", "quant")
TABLE = {tuple(row[k] for k in KEY): row for row in map(json.loads, (TESTS / "compile_table.json").read_text().splitlines())}
MEANT = {
    (80, "none"): "HMMA", (80, "int8"): "IMMA", (86, "none"): "HMMA", (86, "int8"): "IMMA", (89, "none"): "HMMA",
    (89, "int8"): "IMMA", (89, "fp8"): "QMMA", (90, "none"): "HGMMA", (90, "int8"): "IGMMA", (90, "fp8"): "QGMMA",
    (100, "none"): "UTCHMMA", (100, "int8"): "UTCIMMA", (100, "fp8"): "UTCQMMA", (120, "none"): "HMMA", (120, "int8"): "IMMA",
    (120, "fp8"): "QMMA",
}  # fmt: skip
"""The tensor-core instruction of each format; INT4 is unpacked to INT8."""


def run(*arguments, path=""):
    """Rows that `compile_kernels.py` prints, with a Triton from `path`."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (path, str(ROOT), environment.get("PYTHONPATH"))))
    command = [sys.executable, "compile_kernels.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def faults(row, longest):
    """What is wrong with a compiled kernel whose inner loop may have `longest` instructions."""
    qk, _, pv = row["quant"].partition("+")[0].partition("/")
    meant = {MEANT[row["arch"], {"int4": "int8", "": "none"}.get(x, x)] for x in (qk, pv)}
    if row["triton"] < "3.9" and row["arch"] == 100 and "int" in qk:
        meant = {"IMMA" if name == "UTCIMMA" else name for name in meant}  # that version has no tcgen05 for INT8
    found = {
        f"spills {row['spills']} bytes": row["spills"] > 32,  # a few scalars around the loop: ptxas, not the kernel
        "spills in the loop": row["mix"]["spill"] > 0,
        "wgmma serialized": row["serialized"],
        f"shared memory {row['shared']}": row["shared"] > SHARED[row["arch"]],
        f"{row['mma']} instead of {sorted(meant)}": set(row["mma"]) != meant,
        f"{row['loop']} instructions in the loop, not {longest}": row["loop"] > longest,
    }
    return [fault for fault, there in found.items() if there]


def check(rows, dims):
    versions = {row["triton"] for row in rows}
    assert len(versions) == 1
    known = {key[1:]: row for key, row in TABLE.items() if key[0] in versions and key[2] in dims}
    if not known:  # a Triton that nobody has looked at yet: only the budgets that hold for all
        known = {key[1:]: row | {"loop": 2 * row["loop"]} for key, row in TABLE.items() if key[2] in dims}
    assert {tuple(row[k] for k in KEY[1:]) for row in rows} == set(known)
    wrong = {
        tuple(row[k] for k in KEY[1:]): found
        for row in rows
        if (found := faults(row, 1.05 * known[tuple(row[k] for k in KEY[1:])]["loop"]))
    }
    assert not wrong, wrong


def test_every_shipped_kernel_of_head_dim_128_compiles_as_it_should():
    check(run("128"), {128})


@pytest.mark.slow
def test_every_shipped_kernel_compiles_as_it_should():
    check(run(), {64, 128, 256})


def check_hopper(rows):
    """The loop without a mask: what was read of Triton 3.6 and 3.9 (438 to 476 instructions, INT8 503 to 530), and a tenth.
    Behind it, the loop with a mask may spill a few scalars."""
    for row in rows:
        qk, _, pv = row["quant"].partition("+")[0].partition("/")
        meant = {MEANT[90, {"": "none"}.get(x, x)] for x in (qk, pv)}
        assert set(row["mma"]) == meant, row
        assert row["mix"]["spill"] == 0, row
        assert row["spills"] <= 160, row
        assert not row["serialized"], row
        assert row["shared"] <= SHARED[90] // (1 if row["block_q"] == 128 else 2), row
        assert row["loop"] <= (580 if "int8" in qk else 525), row


def test_the_hopper_kernel_compiles_as_it_should():
    """The last raises the flag of `raise_fault`: its loop is that of the first."""
    rows = run("hopper-short")
    assert len(rows) == 3
    check_hopper(rows)
    assert rows[2]["mix"] == rows[0]["mix"]


@pytest.mark.slow
def test_every_hopper_kernel_compiles_as_it_should():
    rows = run("hopper", "64", "80", "128")
    assert len(rows) == 24
    check_hopper(rows)


@pytest.mark.slow
def test_triton_3_6_too(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), "triton==3.6.0"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Triton 3.6.0 cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    check(run(path=str(tmp_path)), {64, 128, 256})
    check_hopper(run("hopper", "128", path=str(tmp_path)))


def test_kernels_that_raise_the_flag():
    """Without it a kernel is the table's, to the register; with it, its loop is no longer than the table allows."""
    rows = run("flag")
    assert len(rows) == 4 * len(SHARED)
    for row in rows:
        if "pooled" in row:
            assert row["spills"] == 0, row
            continue
        known = TABLE.get(tuple(row[k] for k in KEY))
        if known is not None and not row["flag"]:
            assert {name: row[name] for name in known} == known
        elif row["arch"] == 100:  # what is read as its loop holds peeled copies, and here the ends of them
            assert row["spills"] <= 16, row
        else:
            assert not faults(row, 1.05 * known["loop"] if known else float("inf")), row


@pytest.mark.parametrize(("kernel", "each"), [("scores", 2), ("pooled", 5), ("repair", 5), ("merge", 2)])
def test_the_smaller_kernels_fit_every_gpu(kernel, each):
    rows = run(kernel)
    assert len(rows) == each * len(SHARED)
    for row in rows:
        assert row["shared"] <= SHARED[row["arch"]], row
        few = 192 if kernel == "pooled" and row["wide"] else 64 if kernel == "repair" else 0  # three TF32 products for one
        assert row["spills"] <= few, row
        assert row["mma"] or kernel == "merge", row


def test_which_triton_has_the_gluon_of_the_hopper_kernel():
    """Older ones must go to the plain kernel: 3.3 has no Gluon, 3.4 and 3.5 another signature of `warp_specialize`."""
    for version in ("3.3.1", "3.4.0", "3.5.1", "3.5.0+git1a2b3c4"):
        assert version in launch.too_old(version)
    for version in ("3.6.0", "3.6.0+git1a2b3c4", "3.10.0", "4.0"):
        assert launch.too_old(version) is None
    assert launch.no_gluon() is None
    assert launch.overlapped(128, Quant(), 128) is not None


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.3.1", "3.5.1"])
def test_an_old_triton_has_the_plain_kernel_alone(version, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), f"triton=={version}"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Triton {version} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    code = """
from fastdit.apps.bench import sass
from fastdit.core.quant import Quant
from fastdit.kernels import launch
print(launch.no_gluon(), launch.overlapped(128, Quant(), 128), sep="|")
sass._facts = lambda *kernel: (sass._compile(*kernel)[0].asm["cubin"] and {}, [])  # older logs say less
sass.compile_forward(90, 128, Quant())
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(tmp_path), str(ROOT)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"Triton {version}: ")
    assert done.stdout.strip().endswith("|None")


def test_fp8_on_hopper_keeps_within_560_instructions_a_tile():
    """128 keys and 16 queries a warp: what 8 warps do of a 128×128 tile, or 4 warps of 64×128."""
    for version in {key[0] for key in TABLE}:
        row = TABLE[version, 90, 128, "fp8/fp8"]
        assert row["block_k"] == 128
        assert row["block_q"] == 16 * row["warps"]
        assert row["loop"] <= 560


def test_mistakes_in_the_kernel_are_caught():
    """Each mutant of the FP8 kernel on sm_90 is a twentieth longer than the kernel, or spills."""
    rows = run("controls")
    assert len(rows) == 5
    for row in rows:
        kernel = TABLE.get((row["triton"], 90, 128, "fp8/fp8"), {"loop": 533})
        assert faults(row, 1.05 * kernel["loop"]), row["control"]
