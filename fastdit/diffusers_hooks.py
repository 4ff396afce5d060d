"""Changes to diffusers: `set_attn_processor` of models and pipelines takes a `FastAttnProcessor`, pipelines tell where their
denoising loops begin and end, and what they call their models for.

They are made when the module of diffusers is imported, or at once if it has been. Making them when a name of fastdit is first
used would be too late: in `pipe.set_attn_processor(fastdit.FastAttnProcessor())` Python looks up the method first, and finds
none. Importing diffusers here would cost seconds, for which `fastdit --help` need not wait.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from fastdit.pipelines import modular
from fastdit.runs import loops


def _set_attn_processor(self: Any, processor: Any) -> None:
    """Set the attention processor of every denoiser of the pipeline (added by fastdit)."""
    from fastdit.api import set_on_pipeline

    set_on_pipeline(self, processor)


def _pipelines(module: Any) -> None:
    module.DiffusionPipeline.set_attn_processor = _set_attn_processor
    loops.watch_loops(module.DiffusionPipeline)


def _modular_pipelines(module: Any) -> None:
    module.ModularPipeline.set_attn_processor = _set_attn_processor
    modular.watch(module.ModularPipeline, module.LoopSequentialPipelineBlocks)


def _models(module: Any) -> None:
    original = module.AttentionMixin.set_attn_processor

    @functools.wraps(original)
    def set_attn_processor(self: Any, processor: Any) -> None:
        from fastdit.api import set_on_model

        set_on_model(self, processor, functools.partial(original, self))

    module.AttentionMixin.set_attn_processor = set_attn_processor


CHANGES: dict[str, Callable[[Any], None]] = {
    "diffusers.pipelines.pipeline_utils": _pipelines,
    "diffusers.modular_pipelines.modular_pipeline": _modular_pipelines,
    "diffusers.models.attention": _models,
    "diffusers.models.cache_utils": lambda module: loops.watch_names(module.CacheMixin),
}
"""Modules of diffusers, and what is done to each when it has been executed."""


class _ImportHook(MetaPathFinder):
    """Finds these modules as the other finders do, and changes them after their execution."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in CHANGES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if module.__name__ == name:  # one loader may serve many modules, as zipimport's does
                    CHANGES[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def patch_diffusers() -> None:
    """Called once, when fastdit is imported."""
    for name, change in CHANGES.items():
        if name in sys.modules:
            change(import_module(name))  # waits for another thread that is importing it
    sys.meta_path.insert(0, _ImportHook())
