"""Reads diffusers' hooks on a model's modules: how its sequence is split over processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn


def splits_text(model: nn.Module | None) -> bool:
    """Whether the plan of `enable_parallelism` splits the text as well as the picture."""
    plans = [hook.metadata for name, hook in _hooks(model) if name.startswith("cp_input")]
    return any("encoder_hidden_states" in plan for plan in plans)


def _hooks(model: nn.Module | None) -> Iterator[tuple[str, Any]]:
    for module in () if model is None else model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        yield from () if registry is None else registry.hooks.items()
