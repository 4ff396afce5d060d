"""A denoiser that fastdit does not know, described by whoever does: `fastdit.install(model, layout=…)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fastdit.facts import Adapter
from fastdit.pipelines.adapter import ADAPTERS
from fastdit.pipelines.family import Facts, Family

Description = str | Callable[[dict[str, Any]], Facts] | Adapter
SKIP = {"attn2": "cross-attention"}
"""diffusers' own name for it."""


class Own(Family):
    """Facts by a function of the call's arguments by name; sites are all modules with a processor but those of `skip`."""

    def __init__(self, model: nn.Module, layout: Callable[[dict[str, Any]], Facts], skip: Mapping[str, str]) -> None:
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]  # type: ignore[misc]
        self.skips = dict(skip)  # type: ignore[misc]
        self.layout = layout

    def read(self, model: Any, call: dict[str, Any]) -> Facts:
        return self.layout(call)


def adapter_of(model: nn.Module, layout: Description, skip: Mapping[str, str] = SKIP) -> Adapter:
    """The adapter that a user's description makes. Raises ValueError for one that describes nothing."""
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
