"""How long a kernel should take on a GPU, computed without the GPU from the instructions of its inner loop.

Per multiprocessor and clock an H100 or H200 issues 4 instructions of a warp, runs 16 lanes of special functions (exp2), 64 of
the integer and conversion pipe, 128 of float32, and 4096 (FP8, INT8) or 2048 (16 bits) multiply-adds of the tensor cores. A
step is one block of keys: the tensor cores' cycles and the busiest of the other pipes' either overlap wholly ("overlapped") or
not at all ("serial"). Bytes are what must cross the memory bus once: Q, K, V and the answer. Nominal rates, and no waiting for
anything: something to hold a measurement against, not a promise (docs/kernels.md does that).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """Nominal rates: multiprocessors, clock (GHz), bytes a second, tensor-core multiply-adds a clock by bits."""

    name: str
    arch: int
    multiprocessors: int
    ghz: float
    bandwidth: float
    sixteen: int
    eight: int


H200 = Gpu("H200", 90, 132, 1.98, 4.8e12, 2048, 4096)


def model(row: dict[str, Any], gpu: Gpu, tokens: int, heads: int, density: float) -> dict[str, float]:
    """Milliseconds of a compiled kernel (`sass.py`) by pipe, overlapped and serial, for B = 1."""
    block_q, block_k, dim, mix = row["block_q"], row["block_k"], row["dim"], row["mix"]
    qk, _, pv = row["quant"].partition("+")[0].partition("/")
    rate = [gpu.sixteen if fmt in ("none", "") else gpu.eight for fmt in (qk, pv or qk)]
    quarter = row["warps"] / 4  # warps on each of a multiprocessor's four schedulers
    cycles = {
        "tensor": block_q * block_k * dim * sum(1 / x for x in rate),
        "issue": row["loop"] * quarter,
        "exp2": 8 * (mix["exp2"] + mix["mufu"]) * quarter,
        "alu": 2 * mix["alu"] * quarter,
        "fma": mix["fma"] * quarter,
    }
    steps = tokens / block_q * tokens / block_k * heads * density
    milliseconds = {name: x * steps / gpu.multiprocessors / gpu.ghz / 1e6 for name, x in cycles.items()}
    size = {"none": 2, "": 2, "int4": 0.5}
    moved = heads * tokens * dim * (2 + 2 * (size.get(qk, 1) + size.get(pv or qk, 1)))
    milliseconds["memory"] = 1000 * moved / gpu.bandwidth
    others = max(milliseconds[name] for name in ("issue", "exp2", "alu", "fma"))
    milliseconds["overlapped"] = max(milliseconds["tensor"], others, milliseconds["memory"])
    milliseconds["serial"] = milliseconds["tensor"] + others
    return milliseconds
