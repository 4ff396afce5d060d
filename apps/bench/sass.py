"""What the attention kernel becomes on a GPU that is not here: compiled by Triton, read from ptxas' report and the SASS.

The inner loop is the smallest backward branch that holds the most tensor-core instructions; for sm_100 that includes
copies the compiler peeled off, so its length is compared with itself only. Needs nothing but the Triton package, and
Triton's interpreter must be off.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdit.core.quant import LARGEST, Quant
from fastdit.kernels import launch
from fastdit.kernels.cuda import unsupported
from fastdit.kernels.triton_forward import forward

SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Bytes of shared memory one block may have."""
MMA = re.compile(r"^(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTCHMMA|UTCQMMA|UTCIMMA)\b")
KINDS = {
    "mma": MMA,
    "exp2": re.compile(r"^MUFU\.EX2"),
    "mufu": re.compile(r"^MUFU"),
    "fma": re.compile(r"^F(FMA|MUL|ADD)"),
    "alu": re.compile(r"^(FMNMX|LOP|SEL|FSEL|PRMT|F2FP|I2F|I2I|ISETP|FSETP|PLOP|SHF|LEA|VIADD|IADD|IMNMX)"),
    "spill": re.compile(r"^(STL|LDL)"),
}
"""Instructions by the unit that runs them; a pattern takes what those before it left."""
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA(?:\.\S+)*\s+(?:!?U?P\w+,\s*)*(?:`\(\S+\)|(0x[0-9a-f]+))")


def compile_forward(
    arch: int, dim: int, quant: Quant, kernel: Any = forward, wide: bool = False, **changes: Any
) -> dict[str, Any]:
    """One kernel for heads of `dim` channels in bfloat16 (wide: float32) on sm_`arch`, as `launch.choose` would run it.

    `changes` override its constants and options (num_warps, num_stages), `kernel` its code.
    """
    chosen = launch.choose(dim, quant, (arch // 10, arch % 10), wide)
    block_q, block_k = changes.get("BM", chosen.block_q), changes.get("BN", chosen.block_k)
    options = {"num_warps": chosen.warps(block_q, dim), "num_stages": chosen.stages, "enable_fp_fusion": True}
    width = max(triton.next_power_of_2(dim), 64 if quant.qk == "int4" else 32 if not quant.is_none else 16)
    constants: dict[str, Any] = {
        "D": dim, "DP": width, "BM": block_q, "BN": block_k, "Q_PARTS": 1, "K_PARTS": 1, "QK": quant.qk, "PV": quant.pv,
        "PADDED": False, "TILE_BIAS": quant.smooth_q, "RANK": 0, "KEY_BIAS": False,
        "CENTRED_K": quant.smooth_k, "CENTRED_V": quant.smooth_v, "P_SHIFT": LARGEST.get(quant.pv, 1.0),
        "LOCAL": chosen.local, "SPLIT": False, "ASM": True,
    }  # fmt: skip
    for name, value in changes.items():
        (options if name in options else constants)[name] = value
    plain = "fp32" if wide else "bf16"
    eight = {"none": plain, "fp8": "fp8e4nv", "int8": "i8", "int4": "i8"}
    kinds = {"Q": eight[quant.qk], "RawQ": plain, "K": eight[quant.qk], "V": eight[quant.pv], "Out": plain, "QOrder": "i64"}
    kinds |= dict.fromkeys(("KCount", "Num", "Whole", "Index", "Schedule"), "i32")
    kinds |= dict.fromkeys(("Lse", "QScale", "KScale", "VScale", "VMean", "TileBias", "BiasQ", "BiasK", "KMean"), "fp32")
    row = {"arch": arch, "dim": dim, "quant": str(quant), "triton": triton.__version__, "block_q": block_q, "block_k": block_k}
    row |= {"warps": options["num_warps"], "stages": options["num_stages"]}
    facts, code = _facts(_source(kernel, kinds, constants, "o_s"), arch, options)
    loop = _inner_loop(code)
    return row | facts | {"loop": len(loop), "mix": _mix(loop)}


def compile_hopper(dim: int, quant: Quant, slots: int = 128, padded: bool = True) -> dict[str, Any]:
    """The kernel of `hopper.py` for query tiles of `slots` tokens in bfloat16. Its loop is the one without a mask."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource

    from fastdit.kernels.hopper import forward as kernel

    chosen = launch.overlapped(dim, quant, slots)
    if chosen is None:
        raise ValueError(f"no such kernel for head dim {dim} in {quant}")
    block_q, block_k, width = min(chosen.block_q, slots), chosen.block_k, max(64, triton.next_power_of_2(dim))
    k_type, v_type = ({"none": "bf16", "fp8": "fp8e4nv", "int8": "i8"}[x] for x in (quant.qk, quant.pv))
    types = {"bf16": gl.bfloat16, "fp8e4nv": gl.float8e4nv, "i8": gl.int8}

    def blocks(kind: str, rows: int, columns: int) -> str:
        layout = gl.NVMMASharedLayout.get_default_for([rows, columns], types[kind])
        return f"tensordesc<{kind}[{rows}, {columns}],{layout!r}>"

    constants = {
        "D": dim, "DP": width, "BM": block_q, "BN": block_k, "Q_PARTS": 1, "K_PARTS": 1, "STAGES": chosen.stages,
        "QK": quant.qk, "PV": quant.pv, "PADDED": padded, "CENTRED_K": quant.smooth_k, "CENTRED_V": quant.smooth_v,
        "P_SHIFT": LARGEST.get(quant.pv, 1.0),
    }  # fmt: skip
    kinds = {"Q": k_type, "RawQ": "bf16", "Out": "bf16", "QOrder": "i64"}
    kinds |= dict.fromkeys(("KCount", "Num", "Whole", "Index", "Schedule"), "i32")
    kinds |= dict.fromkeys(("Lse", "QScale", "KScale", "VScale", "VMean", "KMean"), "fp32")
    signature = {name: f"*{kind}" for name, kind in kinds.items()} | {"scale": "fp32", "keys": blocks(k_type, block_k, width)}
    signature["values"] = blocks(v_type, *((block_k, width) if quant.pv == "none" else (width, block_k)))
    signature = {name: signature.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    aligned = [*kinds, "q_b", "q_h", "q_n", "o_b", "o_h", "o_n"]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"num_warps": 4, "enable_fp_fusion": True} | ({} if block_q == 128 else {"maxnreg": 128})
    facts, code = _facts(GluonASTSource(kernel, signature, constants, attributes), 90, options)
    # Warp specialization puts everything into a loop: of those that hold no other, the shortest with a block's exponentials.
    loops = [body for body in _loops(code) if sum(bool(KINDS["exp2"].match(name)) for name in body) >= block_k // 2]
    loop = min(loops, key=len)
    return {"dim": dim, "quant": str(quant), "block_q": block_q, "block_k": block_k} | facts | {
        "loop": len(loop), "mix": _mix(loop)
    }  # fmt: skip


def compile_pooled(arch: int, dim: int, wide: bool) -> dict[str, Any]:
    """The kernel of the pooled remainder; wide: of float32, else of bfloat16."""
    from fastdit.kernels.pooled import _add as kernel
    from fastdit.kernels.pooled import settings

    launch, plain = settings(dim, wide), "fp32" if wide else "bf16"
    options = {name: launch.pop(name) for name in ("num_warps", "num_stages")}
    kinds = dict.fromkeys(("Q", "K", "V", "Out"), plain) | {"Centre": "fp32", "Weight": "fp32", "QOrder": "i64", "Lse": "fp32"}
    constants = launch | {"D": dim, "DP": triton.next_power_of_2(dim), "Q_PARTS": 1}
    return {"arch": arch, "dim": dim, "wide": wide} | _facts(_source(kernel, kinds, constants, "tiles"), arch, options)[0]


def compile_scores(arch: int, dim: int, wide: bool) -> dict[str, Any]:
    """The kernel of antidiagonal scores, tiles of 64 tokens in cells of eight; wide: of float32, else of bfloat16."""
    from fastdit.kernels.tile_scores import BLOCKS
    from fastdit.kernels.tile_scores import _cell_lse as kernel

    kinds = {"Q": "fp32" if wide else "bf16", "K": "fp32" if wide else "bf16", "Live": "i1", "Lse": "fp32"}
    block = BLOCKS[4 if wide else 2]
    constants = {"D": dim, "STRIDE": 8, "CELLS": 8, "TILES": block // 8, "BM": block, "BK": block}
    return {"arch": arch, "dim": dim, "wide": wide} | _facts(_source(kernel, kinds, constants), arch, {"num_warps": 4})[0]


def _source(kernel: Any, kinds: dict[str, str], constants: dict[str, Any], *more: str) -> ASTSource:
    """A kernel whose pointers (to `kinds`) and strides of q, k and the answer are multiples of 16, and so is `more`."""
    signature = {name: f"*{kind}" for name, kind in kinds.items()} | {"scale": "fp32"}
    signature = {name: signature.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    strides = {f"{x}_{axis}" for x in "qko" for axis in "bhn"}
    aligned = [name for name in kernel.arg_names if name in kinds or name in strides or name in more]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    return ASTSource(kernel, signature, constants, attributes)


def _facts(source: Any, arch: int, options: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[int, str]]]:
    """What ptxas and the compiler say of a kernel, and its instructions."""
    done, said = _compile(source, arch, options)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", said)
    registers = re.search(r"Used (\d+) registers", said)
    if frame is None or registers is None:
        raise RuntimeError(f"ptxas said nothing of registers: {said}")
    code = _sass(done.asm["cubin"])
    row = {"registers": int(registers[1]), "stack": int(frame[1]), "spills": int(frame[2]), "shared": done.metadata.shared}
    # C7510 and its neighbours say that ptxas waits for every wgmma before the next.
    row["serialized"] = bool(re.search(r"C75\d\d|serializ", said))
    return row | {"mma": sorted({m[0] for _, text in code if (m := MMA.match(_name(text)))})}, code


FORMATS = (
    Quant(),
    Quant("fp8", "fp8"),
    Quant("int8", "fp8", smooth_k=True),
    Quant("int8", smooth_k=True),
    Quant("int8", "int8", smooth_k=True),
    Quant("int4", "fp8", smooth_q=True, smooth_k=True),
    Quant("int4", smooth_k=True),
)
"""What is compiled for the table: each pair of formats there is a kernel for."""


def cases(archs: Iterable[int] = SHARED, dims: Iterable[int] = (64, 128, 256)) -> Iterator[tuple[int, int, Quant]]:
    """Every kernel an architecture is given."""
    for arch, dim, quant in itertools.product(archs, dims, FORMATS):
        q = torch.empty(1, 1, 1, dim, dtype=torch.bfloat16, device="cpu")
        if unsupported(q, quant, (arch // 10, arch % 10)) is None:
            yield arch, dim, quant


def _compile(source: Any, arch: int, options: dict[str, Any]) -> tuple[Any, str]:
    wanted = {"TRITON_ALWAYS_COMPILE": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    log = io.StringIO()
    try:
        os.environ |= wanted
        with contextlib.redirect_stdout(log):
            done = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return done, log.getvalue()


def _sass(cubin: bytes) -> list[tuple[int, str]]:
    """(address, instruction) of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    return [(int(m[1], 16), m[2].strip()) for m in map(_INSTRUCTION.match, text.splitlines()) if m]


def _name(instruction: str) -> str:
    """The operation, without the predicate in front of it."""
    return re.sub(r"^@!?U?P[0-9T]+\s+", "", instruction).split()[0].rstrip(",")


def _loops(code: list[tuple[int, str]]) -> list[list[str]]:
    """Operations of every loop that holds tensor-core instructions."""
    found = []
    for end, text in code:
        branch = _BRANCH.search(text)
        if branch and branch[1] and (start := int(branch[1], 16)) < end:
            body = [_name(text) for at, text in code if start <= at <= end]
            if any(map(MMA.match, body)):
                found.append(body)
    return found


def _inner_loop(code: list[tuple[int, str]]) -> list[str]:
    return max(_loops(code), key=lambda body: (sum(bool(MMA.match(name)) for name in body), -len(body)), default=[])


def _mix(loop: list[str]) -> dict[str, int]:
    counts = Counter(next((kind for kind, pattern in KINDS.items() if pattern.match(name)), "other") for name in loop)
    return {kind: counts[kind] for kind in (*KINDS, "other")}
