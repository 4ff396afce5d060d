"""Bind a model's attention modules to a handle, and restore them: `install`, `bind`, `replace`, `uninstall`."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from fastdit.attach import recompute
from fastdit.attach.handle import Denoiser, Handle, Site
from fastdit.attach.observe import Observe, Over
from fastdit.attach.seam import BoundProcessor, bound_class
from fastdit.planning.adapter import Adapter

__all__ = ["BoundProcessor", "bind", "install", "installed", "replace", "uninstall", "without_others"]


def install(model: nn.Module, name: str, adapter: Adapter, handle: Handle) -> None:
    """Bind every self-attention site of a model to a handle. The model must not be installed yet."""
    names = tuple(inspect.signature(type(model).forward).parameters)[1:]
    denoiser = Denoiser(name, adapter, handle, weakref.ref(model), len(handle.denoisers), names)
    first = len(handle.sites)
    for layer, (site_name, module) in enumerate(adapter.sites(model)):
        denoiser.sites.append(Site(site_name, first + layer, layer, denoiser))
        denoiser.attentions.append(weakref.ref(module))
    denoiser.skipped_modules.update(why for _, why in adapter.left(model))
    handle.denoisers.append(denoiser)
    handle.reset()
    bind(model, denoiser)
    model.register_forward_pre_hook(Observe(denoiser), with_kwargs=True)
    model.register_forward_hook(Over(denoiser))
    denoiser.deleted = weakref.finalize(model, _deleted, weakref.ref(handle))
    denoiser.deleted.atexit = False


def _deleted(reference: weakref.ref[Handle]) -> None:
    """A model was deleted without `restore`. If it was the last of its pipeline, free the large tensors now: the handle is part
    of a reference cycle, which Python may collect much later."""
    handle = reference()
    if handle is not None and all(denoiser.model() is None for denoiser in handle.denoisers):
        handle.release()


def bind(model: nn.Module, denoiser: Denoiser) -> None:
    """Wrap the processor of every site that is not wrapped. Repeated after diffusers replaces them (`fuse_qkv_projections`)."""
    for site, (_, module) in zip(denoiser.sites, denoiser.adapter.sites(model), strict=True):
        inner: Any = module.processor
        if isinstance(inner, BoundProcessor) and inner.site is None:
            inner = inner.inner
        if not isinstance(inner, BoundProcessor):
            cls: Any = type(inner)
            _set(module, bound_class(cls)(inner, site))


def uninstall(model: nn.Module) -> None:
    """Restore the processor objects that `install` found; does nothing to a model that is not installed."""
    denoiser = installed(model)
    for module in model.modules():
        if isinstance(getattr(module, "processor", None), BoundProcessor):
            _set(module, module.processor.inner)
    recompute.unwatch(model)
    kept = getattr(model, "original_attn_processors", None) or {}  # which `unfuse_qkv_projections` restores
    for name, processor in kept.items():
        if isinstance(processor, BoundProcessor):
            kept[name] = processor.inner
    for key in [key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, Observe)]:
        del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]
    for key in [key for key, hook in model._forward_hooks.items() if isinstance(hook, Over)]:
        del model._forward_hooks[key]
    if denoiser is not None:
        if denoiser.deleted is not None:
            denoiser.deleted.detach()
        denoiser.handle.release()


def replace(model: nn.Module, processors: Any, setter: Callable[[Any], None]) -> None:
    """Set other processors on an installed model, on behalf of diffusers or a user.

    Fusing projections sets a processor of another class, and adapter loaders create processors from our classes: both compute
    the same attention and are bound again. A user's own dictionary is set as given, and the report names the sites that it
    takes over. One processor for all layers, or the original objects, removes fastdit from the model.
    """
    denoiser = installed(model)
    assert denoiser is not None
    processors = without_others(processors, denoiser)
    held = [getattr(module, "processor", None) for module in denoiser.modules()]
    bound = [processor for processor in held if isinstance(processor, BoundProcessor)]
    if isinstance(processors, dict):
        given = list(processors.values())
        again = processors is getattr(model, "original_attn_processors", None) or any(  # `unfuse_qkv_projections`
            isinstance(each, BoundProcessor) and each.site is None for each in given
        )
        without = bool(bound) and {id(each.inner) for each in bound} <= set(map(id, given))
    else:
        again = type(processors).__name__.startswith("Fused")
        without = not again
    if without:
        uninstall(model)
    setter(processors)
    if again:
        bind(model, denoiser)


def without_others(processors: Any, denoiser: Denoiser | None) -> Any:
    """Processors as given, except that those bound by another acceleration are replaced by their originals."""
    mine = [] if denoiser is None else denoiser.sites

    def own(processor: Any) -> Any:
        foreign = isinstance(processor, BoundProcessor) and processor.site is not None and processor.site not in mine
        return processor.inner if foreign else processor

    if isinstance(processors, dict):
        found = {name: own(processor) for name, processor in processors.items()}
        return found if any(found[name] is not processors[name] for name in found) else processors
    return own(processors)


def installed(model: nn.Module) -> Denoiser | None:
    """The denoiser that `install` made for this model, or None."""
    return next((hook.denoiser for hook in model._forward_pre_hooks.values() if isinstance(hook, Observe)), None)


def _set(module: nn.Module, processor: Any) -> None:
    setter: Callable[[Any], None] | None = getattr(module, "set_processor", None)
    if setter is None:
        module.processor = processor
    else:
        setter(processor)
