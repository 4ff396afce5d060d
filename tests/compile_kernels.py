"""Cross-compiles the attention kernel for a GPU that is not there, and prints what ptxas and the SASS say, as JSON lines.

A program of its own: in the test process Triton is in interpreter mode. `python tests/compile_kernels.py` prints the table
that `compile_table.json` keeps.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ |= {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
sys.path.insert(0, str(Path(__file__).parent.parent))

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdit.kernels import configs
from fastdit.kernels.attention import _forward, unsupported
from fastdit.quant import Quant

SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory one block may have."""
CAPABILITIES = {80: (8, 0), 86: (8, 6), 89: (8, 9), 90: (9, 0), 100: (10, 0), 120: (12, 0)}
FORMATS = (
    Quant(),
    Quant("fp8", "fp8"),
    Quant("int8", "fp8", smooth_k=True),
    Quant("int8", smooth_k=True),
    Quant("int4", smooth_k=True),
)
TYPES = {"none": "bf16", "fp8": "fp8e4nv", "int8": "i8", "int4": "i8"}
MMA = re.compile(r"\b(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTCHMMA|UTCQMMA|UTCIMMA)\b")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def compile_forward(arch: int, dim: int, quant: Quant, **changes: object) -> dict[str, object]:
    """One kernel for heads of `dim` channels, as `launch` would run it; `changes` override its constants and options."""
    launch = configs.launch(dim, quant, CAPABILITIES[arch])
    options = {"num_warps": launch.warps(launch.block_q, dim), "num_stages": launch.stages}
    constants: dict[str, object] = {
        "D": dim, "DP": triton.next_power_of_2(dim), "BM": launch.block_q, "BN": launch.block_k, "Q_PARTS": 1, "K_PARTS": 1,
        "QK": quant.qk, "PV": quant.pv, "PADDED": False, "BIASED": False, "CENTRED_V": False,
        "P_SHIFT": 8.807354922057604 if quant.pv == "fp8" else 0.0,
    }  # fmt: skip
    for name, value in changes.items():
        (options if name in options else constants)[name] = value
    v = "fp8e4nv" if quant.pv == "fp8" else "bf16"
    pointers = {
        "Q": TYPES[quant.qk],
        "K": TYPES[quant.qk],
        "V": v,
        "Out": "bf16",
        "Lse": "fp32",
        "QScale": "fp32",
        "KScale": "fp32",
    }
    pointers |= {
        "VScale": "fp32",
        "VMean": "fp32",
        "Bias": "fp32",
        "QOrder": "i64",
        "KCount": "i32",
        "Num": "i32",
        "Index": "i32",
    }
    signature = {name: f"*{kind}" for name, kind in pointers.items()} | {"scale": "fp32"}
    signature = {name: signature.get(name, "constexpr" if name in constants else "i32") for name in _forward.arg_names}
    aligned = [*pointers, "q_b", "q_h", "q_n", "o_b", "o_h", "o_n"]
    attributes = {(_forward.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(_forward, signature, constants, attributes)
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options | {"enable_fp_fusion": True})
    said = log.getvalue()
    spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert spills is not None and registers is not None, said  # noqa: PT018
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        sass = subprocess.run([TOOLS / "cuobjdump", "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return {
        "arch": arch, "dim": dim, "quant": str(quant), "registers": int(registers[1]), "stack": int(spills[1]),
        "spills": int(spills[2]), "shared": done.metadata.shared, "serialized": "C7510" in said or "serializ" in said.lower(),
        "mma": sorted(set(MMA.findall(sass))), "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.MULTILINE)),
    }  # fmt: skip


def cases(archs: tuple[int, ...] = tuple(CAPABILITIES)) -> list[tuple[int, int, Quant]]:
    import torch

    q = {dim: torch.empty(1, 1, 1, dim, dtype=torch.bfloat16) for dim in (64, 128, 256)}
    return [
        (arch, dim, quant)
        for arch in archs
        for dim in q
        for quant in FORMATS
        if unsupported(q[dim], quant, CAPABILITIES[arch]) is None and (dim != 256 or quant.is_none)
    ]


if __name__ == "__main__":
    for case in cases(tuple(map(int, sys.argv[1:])) or tuple(CAPABILITIES)):
        print(json.dumps(compile_forward(*case)), flush=True)
