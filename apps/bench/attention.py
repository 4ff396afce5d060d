"""Attention kernels against float64, then against PyTorch's own attention: rows for `fastdit bench kernel`.

A row is one number format at one density. Its time is all of `ops.attention` (packing, quantization, tile lists, scattering
the answer back), in turns with every baseline; only the choice of the tiles is outside. Nothing is timed beside an answer
that is wrong.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention import flex_attention as flexible
from torch.profiler import ProfilerActivity, profile

from fastdit import ops
from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.quant import Quant
from fastdit.core.reference import attention, relative_error, token_mask
from fastdit.kernels import cpu
from fastdit.policies import Window

INCLUDES = "packing, quantization, tile lists, attention, scattering back; not the choice of tiles"
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}
ROUNDING = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-20}


def inputs(layout: Layout, heads: int, dim: int, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
    """q, k, v as in a video model: [B, N, H, D] in memory, keys with a bias for each channel, values with a mean."""
    generator = torch.Generator(device).manual_seed(seed)
    q, k, v = (torch.randn(1, layout.length, heads, dim, generator=generator, device=device) for _ in range(3))
    k = k + 2 * torch.randn(dim, generator=generator, device=device)
    return [x.to(dtype).transpose(1, 2) for x in (q, k, v + 0.5)]


RAGGED = (Layout((3, 12, 12), (1, 8, 8), text_len=9), Layout((5, 9, 17), (2, 8, 8)), Layout((4, 17, 9), (6, 8, 8)))
"""Layouts for the test of correctness: text, tiles that overhang on every axis, tiles of several blocks."""
LARGE = (Layout((3, 36, 44), (1, 8, 8)), Layout((5, 36, 36), (2, 8, 8)))
"""Enough tiles to fill a GPU; shorter sequences are cut into parts, which is another kernel."""


def wrong(
    formats: list[Quant], dims: tuple[int, ...], dtype: torch.dtype, device: str, layouts: tuple[Layout, ...] | None = None
) -> list[str]:
    """Test every format on ragged layouts against float64: a line for each result beyond twice its emulation's error."""
    lines = []
    for layout in layouts or (RAGGED if device == "cpu" else RAGGED + LARGE):
        for dim in dims:
            q, k, v = inputs(layout, 2, dim, dtype, "cpu")
            tile_map = torch.rand(1, 2, layout.num_tiles, layout.num_tiles, generator=torch.Generator().manual_seed(1)) < 0.5
            tile_map[:, 1, 1] = False  # rows that see nothing
            mask, there = (BlockMask.from_tile_map(tile_map.to(where), layout) for where in ("cpu", device))
            allowed = token_mask(layout, tile_map).to(device)
            wide_q, wide_k, wide_v = (x.to(device).double() for x in (q, k, v))
            exact, exact_lse = (x.cpu() for x in attention(wide_q, wide_k, wide_v, allowed))
            for quant in formats:
                if (reason := ops.unsupported(q.to(device), quant)) is not None:
                    raise NotImplementedError(reason)
                got = ops.attention(q.to(device), k.to(device), v.to(device), there, quant)
                out, lse = got[0].cpu(), got[1].cpu()
                lists = (mask.kv_num_blocks, mask.kv_indices, mask.q_order, mask.k_order)
                emulated, emulated_lse = cpu.block_sparse_attention(q.float(), k.float(), v.float(), *lists, dim**-0.5, quant)
                error, budget = relative_error(out, exact), 2 * relative_error(emulated, exact) + ROUNDING[dtype]
                seen = ~exact_lse.isneginf()
                norm = float((out.double().norm() / exact.norm() - 1).abs())
                off, room = (float((x - exact_lse)[seen].abs().max()) for x in (lse, emulated_lse))
                good = error <= budget and norm <= budget and off <= 2 * room + 8 * ROUNDING[dtype]
                if not (good and torch.equal(seen, ~lse.isneginf()) and not out[~seen].any()):
                    lines.append(
                        f"{quant}, head dim {dim}, tile {layout.tile}: error {error:.1e} of {budget:.1e}, "
                        f"magnitude off by {norm:.1e}, LSE by {off:.1e} of {2 * room:.1e}"
                    )
    return lines


def baselines(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Any]]:
    """Dense attention by each kernel that takes these tensors."""
    found: dict[str, Callable[[], Any]] = {}
    for name, backend in BACKENDS.items():

        def call(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        try:
            call()
        except RuntimeError:  # PyTorch raises it if the kernel does not take these tensors
            continue
        found[f"SDPA {name}"] = call
    try:
        from sageattention import sageattn
    except ImportError:
        return found
    return found | {"SageAttention": lambda: sageattn(q, k, v, tensor_layout="HND")}


def flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout, mask: BlockMask) -> Callable[[], Any]:
    """FlexAttention over the same tiles, including the permutation into tile order; slow to compile."""
    block, kept = layout.tile_tokens, mask.to_tile_map()
    kept = kept.expand(q.shape[0], q.shape[1], -1, -1)

    def attends(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return kept[b, h, i // block, j // block]

    lists = mask.kv_num_blocks.expand(kept.shape[:3]).contiguous(), mask.kv_indices.expand(kept.shape).contiguous()
    # Whole blocks: the compiled kernel looks at the lists alone, eager evaluation at `attends` alone.
    blocks = flexible.BlockMask.from_kv_blocks(torch.zeros_like(lists[0]), lists[1], *lists, block, attends)
    compiled: Any = torch.compile(flexible.flex_attention, dynamic=False)

    def call() -> Tensor:
        tiled = (layout.to_tiles(x).flatten(2, 3) for x in (q, k, v))
        return layout.from_tiles(compiled(*tiled, block_mask=blocks).unflatten(2, (-1, block)))

    return call


IN_A_ROW = 4
"""Calls of one timing on a GPU. The GPU is kept busy until all are queued, as in a denoising loop."""
BUSY = 20_000_000
"""GPU cycles for which it is kept busy, about 10 ms. The CPU's cost of a call is measured separately, as `host_ms`."""
LONG = 20.0
"""A call of at least so many milliseconds is timed alone: its launch cost no longer shows."""


def milliseconds(calls: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Median time of each call; the calls take turns, and the first turn does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            took = _gpu_time(call) if device == "cuda" else _cpu_time(call)
            if turn:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def _cpu_time(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def _gpu_time(call: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for often in (1, IN_A_ROW):
        torch.cuda.synchronize()
        torch.cuda._sleep(BUSY)
        begin.record()
        for _ in range(often):
            call()
        end.record()
        torch.cuda.synchronize()
        if (took := begin.elapsed_time(end) / often) > LONG:
            break
    return took


def items(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Milliseconds of one call: GPU kernels for packing, for attention and for the rest, and the CPU."""
    if device == "cpu":
        return {}
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(IN_A_ROW):
            call()
        torch.cuda.synchronize()
    spent = {"packing_ms": 0.0, "attention_ms": 0.0, "other_ms": 0.0}
    for event in seen.key_averages():
        packing = event.key in ("_pack", "_statistics", "_finish")
        spent["packing_ms" if packing else "attention_ms" if event.key == "forward" else "other_ms"] += (
            event.self_device_time_total / 1000 / IN_A_ROW
        )
    return spent | {"host_ms": 1000 * host}


def measure(
    layout: Layout, heads: int, dim: int, dtype: torch.dtype, formats: list[Quant], densities: Sequence[float | Window],
    device: str, repeats: int = 7, with_flex: bool = False,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """One row per density of a window, or window, and format; density 1 is a full tile map."""
    q, k, v = inputs(layout, heads, dim, dtype, device)
    others = baselines(q, k, v)
    for density in densities:
        if density == 1:
            tile_map = torch.ones(1, 1, layout.num_tiles, layout.num_tiles, dtype=torch.bool, device=device)
        else:
            window = density if isinstance(density, Window) else Window(density=density)
            tile_map = window.select(layout).to(device)
        mask = BlockMask.from_tile_map(tile_map, layout)
        calls = dict(others)
        if with_flex:
            calls["FlexAttention"] = flex(q, k, v, layout, mask)
            calls["FlexAttention"]()  # compiles
        ours = {str(x): partial(ops.attention, q, k, v, mask, x) for x in formats}
        best = milliseconds(calls | ours, repeats, device)
        some = slice(None, None, max(1, layout.length // 512))
        exact = attention(q[:, :1, some].double(), k[:, :1].double(), v[:, :1].double())[0]
        for quant in formats:
            name = str(quant)
            row: dict[str, Any] = {
                "tokens": layout.length,
                "heads": heads,
                "head_dim": dim,
                "tile": list(layout.tile),
                "quant": name,
            }
            row |= {"density": mask.density(), "ms": best[name]} | items(ours[name], device)
            if density == 1:
                row["error"] = relative_error(ours[name]()[0][:, :1, some], exact)
            baseline = min(others, key=lambda other: best[other])
            row |= {"baselines_ms": {other: best[other] for other in calls}, "baseline": baseline}
            yield row | {"ratio": best[baseline] / best[name]}
