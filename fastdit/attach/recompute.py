"""Gradient checkpointing: a block that is run again in the backward finds the forward it was part of, and so the same plan.

By then its denoiser's call is over, perhaps several others too, and on a GPU another thread runs it. diffusers hands every
block to the `_gradient_checkpointing_func` of the module it is part of; `watch` wraps that function.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import nn

from fastdit.attach.handle import Denoiser


class Resumed:
    """A `_gradient_checkpointing_func` (`inner`) that takes the running forward along. A pickle of it is the inner function."""

    def __init__(self, inner: Any, denoiser: Denoiser) -> None:
        self.inner, self.denoiser = inner, denoiser

    def __call__(self, block: Any, *args: Any, **kwargs: Any) -> Any:
        call = self.denoiser.call
        token, forward = getattr(call, "token", None), getattr(call, "forward", None)
        if token is None or torch.compiler.is_compiling():  # in a graph the token is data, and kept for the backward as such
            return self.inner(block, *args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            before = getattr(call, "token", None), getattr(call, "forward", None)
            call.token, call.forward = token, forward
            try:
                return block(*args, **kwargs)
            finally:
                call.token, call.forward = before

        return self.inner(run, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Resumed:
        return Resumed(copy.deepcopy(self.inner, memo), copy.deepcopy(self.denoiser, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copy.copy, (self.inner,)


def watch(model: nn.Module, denoiser: Denoiser) -> None:
    """Wrap what diffusers checkpoints with, where it is on and not wrapped yet: it may be turned on at any time."""
    if denoiser.checkpointing is None:
        found = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        denoiser.checkpointing = [weakref.ref(module) for module in found]
    for reference in denoiser.checkpointing:
        module: Any = reference()
        if module is None or not module.gradient_checkpointing:
            continue
        inner = getattr(module, "_gradient_checkpointing_func", None)
        if inner is not None and not (isinstance(inner, Resumed) and inner.denoiser is denoiser):
            module._gradient_checkpointing_func = Resumed(inner, denoiser)


def unwatch(model: nn.Module) -> None:
    """Put the functions back that `watch` wrapped."""
    for module in model.modules():
        while isinstance(wrapped := vars(module).get("_gradient_checkpointing_func"), Resumed):
            module._gradient_checkpointing_func = wrapped.inner
