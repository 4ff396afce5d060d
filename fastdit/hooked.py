"""What diffusers' hooks on a model's modules tell: which call of a step it is in, and how its sequence is split."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from diffusers.hooks.hooks import StateManager
from torch import nn


def context(reference: weakref.ref[nn.Module]) -> str | None:
    """The name that the pipeline gave to the running call of a model, as the step caches hooked into its blocks hold it."""
    for _, hook in _hooks(reference()):
        for state in vars(hook).values():
            # a CacheContext since diffusers 0.39, the bare name before
            found = getattr(state, "_context", None) or getattr(state, "_current_context", None)
            if isinstance(state, StateManager) and found is not None:
                return str(getattr(found, "name", found))
    return None


def splits_text(reference: weakref.ref[nn.Module]) -> bool:
    """Whether the plan that `enable_parallelism` followed splits the text beside the picture."""
    plans = [hook.metadata for name, hook in _hooks(reference()) if name.startswith("cp_input")]
    return any("encoder_hidden_states" in plan for plan in plans)


def _hooks(model: nn.Module | None) -> Iterator[tuple[str, Any]]:
    for module in () if model is None else model.modules():
        registry = getattr(module, "_diffusers_hook", None)
        yield from () if registry is None else registry.hooks.items()
