"""`python -m fastdit.apps.bench.host`: what an attention site costs the host, and how often a forward waits for a GPU.

A Wan transformer of 30 small layers runs accelerated, and stock with its self-attention left out. The difference, divided by
30, is fastdit's own time a site, its share of `begin_forward` included: the least of several forwards in turns. On the CPU the
kernel is left out as well, and processor time is taken. On a GPU the kernel runs, and the host's time until the last launch is
queued is taken; PyTorch's own watch counts the waits.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers.models.transformers.transformer_wan as wan
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

import fastdit
from fastdit.approx import step_cache
from fastdit.apps.bench.markdown import cpu_name
from fastdit.apps.render.outputs import write_json
from fastdit.config import Config, Phase, Reuse
from fastdit.core.quant import Quant
from fastdit.policies import TopMass, Window

LAYERS, GRID = 30, (3, 16, 16)
WINDOW = Window(size=(1, 1, 1))
CASES: dict[str, Phase] = {
    "window": Phase(policy=WINDOW),
    "window in FP8": Phase(policy=WINDOW, quant=Quant("fp8", "fp8")),
    "window, residual": Phase(policy=WINDOW, reuse=Reuse("residual", refresh=1 << 30)),
    "top mass": Phase(policy=TopMass(density=0.25)),
}


def model(device: str) -> Any:
    torch.manual_seed(0)
    made: Any = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=32, ffn_dim=64, num_layers=LAYERS, rope_max_seq_len=64,
    )  # fmt: skip
    return made.eval().to(device, torch.bfloat16 if device == "cuda" else torch.float32)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Sparse attention answers q itself."""
    defaults = step_cache.attention.__defaults__
    assert defaults is not None

    def answer(q: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return q.clone(), q.new_zeros(q.shape[:3])

    step_cache.attention.__defaults__ = (*defaults[:-2], answer, defaults[-1])
    try:
        yield
    finally:
        step_cache.attention.__defaults__ = defaults


@contextmanager
def without_self_attention() -> Iterator[None]:
    """Stock layers, whose self-attention answers q itself."""
    original = wan.dispatch_attention_fn

    def answer(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return q.clone() if q.shape == k.shape else original(q, k, *args, **kwargs)

    wan.dispatch_attention_fn = answer  # type: ignore[assignment]
    try:
        yield
    finally:
        wan.dispatch_attention_fn = original


def seconds(forward: Callable[[float], None], sigma: float, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter() if device == "cuda" else time.process_time()
    forward(sigma)
    return (time.perf_counter() if device == "cuda" else time.process_time()) - start


def waits(forward: Callable[[float], None], sigma: float) -> int:
    """How often PyTorch itself waits for the GPU in a forward."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            forward(sigma)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(each.message) for each in seen)


def measure(name: str, device: str, repeats: int) -> dict[str, Any]:
    t, h, w = GRID
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    latents = torch.randn(1, 4, t, 2 * h, 2 * w, device=device, dtype=kind)
    text = torch.randn(1, 7, 16, device=device, dtype=kind)
    plain, fast = model(device), model(device)
    fastdit.accelerate(fast, Config((CASES[name],), (1, 8, 8), min_tokens=0, max_density=1.0))

    def runner(which: Any) -> Callable[[float], None]:
        def forward(sigma: float) -> None:
            with torch.no_grad():
                which(latents, torch.full((1,), 1000 * sigma, device=device), text)

        return forward

    times: dict[str, list[float]] = {"fast": [], "plain": []}
    for i in range(repeats + 3):  # the first ones make masks, and compile kernels
        sigma = 0.9 - 0.8 * i / (repeats + 3)
        with without_self_attention():
            times["plain"].append(seconds(runner(plain), sigma, device))
        if device == "cpu":
            with without_kernels():
                times["fast"].append(seconds(runner(fast), sigma, device))
        else:
            times["fast"].append(seconds(runner(fast), sigma, device))
    least = {who: min(found[3:]) for who, found in times.items()}
    row = {"case": name, "device": cpu_name() if device == "cpu" else torch.cuda.get_device_name(), "layers": LAYERS}
    row |= {"host_us_a_site": round(1e6 * (least["fast"] - least["plain"]) / LAYERS, 1), "repeats": repeats}
    row |= {"torch": torch.__version__, "fastdit": fastdit.__version__}
    return row | ({"waits_a_forward": waits(runner(fast), 0.05)} if device == "cuda" else {})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fastdit.apps.bench.host", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = []
    for name in CASES:
        rows.append(row := measure(name, args.device, args.repeats))
        print(
            f"{name:20} {row['host_us_a_site']:7.1f} µs a site"
            + (f", {row['waits_a_forward']} waits" if "waits_a_forward" in row else "")
        )
    if args.out is not None:
        write_json(args.out, rows)


if __name__ == "__main__":
    main()
