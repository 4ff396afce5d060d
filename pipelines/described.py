"""Adapters for denoisers that fastdit does not know, from a description by the user: `fastdit.install(model, layout=…)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fastdit.pipelines.family import Facts, Family
from fastdit.pipelines.registry import ADAPTERS
from fastdit.planning.adapter import Adapter

Description = str | Callable[[dict[str, Any]], Facts] | Adapter
SKIP = {"attn2": "cross-attention"}
"""diffusers' usual name for cross-attention."""


class Own(Family):
    """Facts from a function of the call's arguments by name. Sites: all modules with a processor except those in `skip`."""

    def __init__(self, model: nn.Module, layout: Callable[[dict[str, Any]], Facts], skip: Mapping[str, str]) -> None:
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]  # type: ignore[misc]
        self.skips = dict(skip)  # type: ignore[misc]
        self.layout = layout

    def facts(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Facts:
        """The facts that the user's function returns. If it fails, the call stays dense, with the error as the reason."""
        call = dict(zip(self.names, args, strict=False)) | kwargs
        try:
            return self.read(model, call)
        except Exception as error:  # user code may raise anything
            why = f"the layout function fails: {type(error).__name__}: {error}"
            return Facts((0, 0, 0), self._level(model, call), missing=why)

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        facts = self.layout(call)
        if not isinstance(facts, Facts) or not isinstance(facts.sigma, Tensor) or len(facts.grid) != 3:
            raise TypeError(f"it must give Facts with a grid of three sides and a tensor sigma, not {facts!r}")
        return facts


def adapter_of(model: nn.Module, layout: Description, skip: Mapping[str, str] = SKIP) -> Adapter:
    """The adapter of a user's description. Raises ValueError if it is none, or if the model has no self-attention site."""
    if isinstance(layout, str):
        if layout not in ADAPTERS:
            raise ValueError(f"layout: no model class {layout!r}; known are {', '.join(sorted(ADAPTERS))}")
        adapter = ADAPTERS[layout]
    elif callable(layout):
        adapter = Own(model, layout, skip)
    elif hasattr(layout, "facts") and hasattr(layout, "sites"):
        adapter = layout
    else:
        raise ValueError(f"layout must be a function of the call's arguments or the name of a model class, got {layout!r}")
    if next(iter(adapter.sites(model)), None) is None:
        raise ValueError(
            f"{type(model).__name__} has no self-attention that fastdit could reach: no module but those left out"
            f" ({', '.join(skip) or 'none'}) has a `processor`, as diffusers' attention modules do"
        )
    return adapter
