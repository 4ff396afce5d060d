"""Launch settings of the attention kernels: nobody's first step waits for autotuning.

Hopper's own kernel (`hopper.py`), 32,768 tokens, 8 heads of 128: on an H200, 16 bit 6.1 ms with blocks of 128×128 and two
stages, 7.4 with 128×64 and four; FP8 5.05 with four stages, 5.12 with two. On an H100, blocks of 64 rows 8.5 ms in 16 bit and
7.9 in FP8 where 128 took 7.1 and 6.7: tiles of 128 tokens pay. What follows is of the kernel of `triton_forward.py`.

Chosen on an H100 and an H200 at 32,768 tokens from blocks of 64 and 128, 4 and 8 warps, 2 to 5 stages (docs/results/
sweep_h100.json): five stages are 10-25 % faster than three wherever they fit; 64-row blocks of four
warps beat 128 rows, by a quarter in 8 bits, since two blocks on a multiprocessor hide each other's softmax. Elsewhere: what
compiles without spills into the architecture's shared memory (tests/kernels/test_compile.py), not yet timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from fastdit.core.quant import Quant


@dataclass(frozen=True)
class Launch:
    """Largest blocks of query and key rows; stages counts the load of the tile list as one, so three give two buffers.

    local: P relative to the maximum of its own tile instead of the maximum so far. least: smallest block; 64 in the kernel
    of `hopper.py`, whose stages are buffers.
    """

    block_q: int
    block_k: int
    stages: int
    local: bool = False
    least: int = 32

    def warps(self, block_q: int, dim: int) -> int:
        """Eight for 128 rows of wide heads: four spill there on every architecture."""
        return 8 if block_q * dim >= 128 * 128 or dim > 128 else 4


def choose(dim: int, quant: Quant, capability: tuple[int, int], wide: bool = False) -> Launch:
    """Settings for heads of `dim` channels in a format on a compute capability; wide: inputs of 32 bits, not 16."""
    if wide and "none" in (quant.qk, quant.pv):
        return Launch(32, 32, 2)  # three TF32 products for one: larger blocks spill by the kilobyte, or do not fit
    roomy = capability in ((9, 0), (10, 0), (10, 3))  # 227 KB of shared memory a block; Ampere and Ada 99-163, sm_120 99
    # INT8 steps are even, so P below 1/127 of the maximum so far would vanish. On Ada, ptxas folds the accumulator of FP8 into
    # the tensor core, which adds in 22 bits: a factor of its own for each tile keeps them apart.
    local = quant.pv == "int8" or (quant.pv == "fp8" and capability == (8, 9))
    if dim > 128:
        return Launch(64, 64 if roomy else 32, 3 if roomy else 2, local)
    if not roomy:
        return Launch(128 if dim <= 64 and not local else 64, 64, 3, local)
    if quant.pv == "none" or (dim <= 64 and local):
        return Launch(64, 64, 5, local)
    return Launch(128, 64, 5) if dim <= 64 else Launch(64, 128, 5, local)


NEVER = float("inf")
PAYS_FROM = {"none": (0.0, 0.0), "fp8": (32768, 16384), "int8": (NEVER, 16384), "int4": (NEVER, NEVER)}
"""Tokens from which all of attention in a format of Q·Kᵀ beats the best dense kernel of 16 bits on an H200, for heads of up to
64 channels and of more: the first length measured at which it did. 128 channels: FP8 .99 × at 8,192 and 1.14 × at 16,384, INT8
.90 and 1.10, INT4 .73-.89 at 32,768. 64 channels: FP8 1.00 × at 16,384 and 1.03 × at 32,768, INT8 .88-.96 to 65,536."""


def pays_from(dim: int, quant: Quant) -> float:
    return PAYS_FROM[quant.qk][dim > 64]


GLUON_FROM = (3, 6)
"""Triton from which `gl.warp_specialize` takes a list of functions with their arguments. Triton 3.4 and 3.5 (torch 2.8 and
2.9) want one default function and workers apart, 3.3 (torch 2.7) has no Gluon:
https://github.com/triton-lang/triton/blob/v3.5.1/python/triton/experimental/gluon/language/_core.py"""


@cache
def no_gluon() -> str | None:
    """Why the kernel of `hopper.py` cannot run with the Triton that is installed, or None if it can."""
    import triton

    if (reason := too_old(triton.__version__)) is not None:
        return reason
    try:
        import fastdit.kernels.hopper  # noqa: F401 - Gluon is experimental: its names move from release to release
    except (ImportError, AttributeError) as error:
        return f"Triton {triton.__version__} has another Gluon: {error}"
    return None


def too_old(version: str) -> str | None:
    """Why a Triton of this version ("3.5.1", "3.6.0+git1a2b") has not the Gluon of `hopper.py`, or None if it has."""
    if tuple(int(part) for part in version.split(".")[:2]) >= GLUON_FROM:
        return None
    return f"Triton {version}: the overlapped kernel needs {'.'.join(map(str, GLUON_FROM))} or newer (torch 2.10)"


def overlapped(dim: int, quant: Quant, slots: int) -> Launch | None:
    """Settings of the kernel of `hopper.py` for query tiles of `slots` tokens, or None where it has none."""
    if no_gluon() is not None:
        return None
    if not 32 < dim <= 128 or quant.qk == "int4" or quant.pv == "int8" or quant.smooth_q:
        return None
    pair = -(-slots // 64) % 2 == 0  # two warpgroups share what is loaded
    wide = (quant.qk, quant.pv).count("none")  # of K and V in 16 bits: as many stages as fit
    if pair:
        return Launch(128, 128, 4 - wide, least=64)
    return Launch(64, 128, 2, least=64) if wide == 0 else Launch(64, 64, 2, least=64)


def splits(programs: int, steps: int, device: torch.device) -> int:
    """Parts into which to cut each list (LeanAttention, arXiv 2405.10480), so that few query tiles still fill the GPU.

    A part has at least four steps: merging costs more than shorter ones save.
    """
    if device.type != "cuda":
        return 1
    return max(1, min(resident(device) // programs, steps // 4, 32))


def resident(device: torch.device) -> int:
    """Programs that lie on a GPU at a time, two a multiprocessor; where there is none a few: tests see them take turns."""
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3
