"""Checkpoints of training, whole for going on exactly, and light in pieces of a few megabytes for carrying about.

`whole.pt` holds weights, averages, both optimisers and the step. The light form holds weights and averages in float16
and the step, cut into files `NAME.0`, `NAME.1`, …; the optimisers' momentum is lost in it and warms up again.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIECE = 15 * 2**20  # bytes


def half(state: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {k: {n: t.half() if t.is_floating_point() else t for n, t in s.items()} for k, s in state.items()}


def write_light(folder: Path, name: str, state: dict[str, Any], raw: bool = True) -> list[Path]:
    """Write a checkpoint's light form to `folder`; `raw`: the weights too, not the averages alone."""
    kept = {"step": state["step"], "ema": half(state["ema"])} | ({"models": half(state["models"])} if raw else {})
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    data = buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{name}.[0-9]*"):
        old.unlink()
    paths = []
    for i in range(0, len(data), PIECE):
        paths.append(folder / f"{name}.{i // PIECE}")
        paths[-1].write_bytes(data[i : i + PIECE])
    return paths


def read_light(folder: Path, name: str) -> dict[str, Any]:
    """What `write_light` wrote, in float32; without raw weights the averages stand in for them."""
    pieces = sorted(folder.glob(f"{name}.[0-9]*"), key=lambda p: int(p.suffix[1:]))
    if not pieces:
        raise FileNotFoundError(f"no checkpoint {name}.0 in {folder}")
    state = torch.load(io.BytesIO(b"".join(p.read_bytes() for p in pieces)), map_location="cpu", weights_only=True)
    for key in {"ema", "models"} & state.keys():
        for weights in state[key].values():
            weights.update({n: t.float() for n, t in weights.items() if t.is_floating_point()})
    state.setdefault("models", state["ema"])
    return state
