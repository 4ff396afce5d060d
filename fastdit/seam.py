"""What importing fastdit does to diffusers: `set_attn_processor` of models and pipelines takes a `FastAttnProcessor`, pipelines
tell where their denoising loops begin and end, and what they call their models for.

It has to be there before any name of fastdit is used: in `pipe.set_attn_processor(fastdit.FastAttnProcessor())` Python looks up
the method first, and a bar may be opened before `accelerate` is called. Importing diffusers takes seconds, for which
`fastdit --help` need not wait. So each class is changed when its module is imported, or at once if it has been.
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

from fastdit.runs import loops


def _pipelines(module: Any) -> None:
    def set_attn_processor(self: Any, processor: Any) -> None:
        """Set the attention processor of every denoiser of the pipeline (added by fastdit)."""
        from fastdit.api import set_on_pipeline

        set_on_pipeline(self, processor)

    module.DiffusionPipeline.set_attn_processor = set_attn_processor
    loops.watch_loops(module.DiffusionPipeline)


def _models(module: Any) -> None:
    original = module.AttentionMixin.set_attn_processor

    @functools.wraps(original)
    def set_attn_processor(self: Any, processor: Any) -> None:
        from fastdit.api import set_on_model

        set_on_model(self, processor, functools.partial(original, self))

    module.AttentionMixin.set_attn_processor = set_attn_processor


CHANGES: dict[str, Callable[[Any], None]] = {
    "diffusers.pipelines.pipeline_utils": _pipelines,
    "diffusers.models.attention": _models,
    "diffusers.models.cache_utils": lambda module: loops.watch_names(module.CacheMixin),
    "diffusers.modular_pipelines.modular_pipeline": lambda module: loops.watch_loops(module.LoopSequentialPipelineBlocks),
}
"""Modules of diffusers, and what is done to each once it has been executed."""


class _Watch(MetaPathFinder):
    """Finds these modules as the other finders do, and has them changed behind their execution."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in CHANGES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                CHANGES[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader, made for this module
        return spec


def patch_diffusers() -> None:
    """Done once, when fastdit is imported."""
    for name, change in CHANGES.items():
        if name in sys.modules:
            change(import_module(name))  # which waits for another thread that is just importing it
    sys.meta_path.insert(0, _Watch())
