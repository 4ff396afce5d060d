"""Which denoiser class has its tokens where: the index of the small files beside this one."""

from __future__ import annotations

from torch import nn

from fastdit.handle import Adapter
from fastdit.pipelines import wan

ADAPTERS: dict[str, Adapter] = {"WanTransformer3DModel": wan.Wan()}
"""By class name, so that diffusers' models are not imported to look one up; subclasses of a known class count."""


def adapter_for(model: nn.Module) -> Adapter:
    """Raises ValueError for a model family that fastdit does not know."""
    for cls in type(model).__mro__:
        if cls.__name__ in ADAPTERS:
            return ADAPTERS[cls.__name__]
    raise ValueError(
        f"fastdit does not know where {type(model).__name__} keeps its tokens. Known: {', '.join(sorted(ADAPTERS))}"
    )
