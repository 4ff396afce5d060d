"""The seam: each attention module keeps its own processor, of which only the core attention is replaced.

A bound processor runs a clone of the original processor's `__call__` in whose globals `dispatch_attention_fn` and
`F.scaled_dot_product_attention` are ours. So projections, norms, rotary embedding, LoRA and fused weights stay the
model's own code. Both names end in one opaque op (`fastdit.attend`), which decides at run time (noise level, phase, plan), so
that a compiled denoiser is one graph for all steps and, block by block, one graph for all layers.

What fastdit does not do (causal or grouped attention, dropout, cross-attention) goes to the
original function, with the original backend, and is reported.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn

from fastdit import hooked, parallel, plan
from fastdit.attend import SDPA, attend
from fastdit.facts import Adapter
from fastdit.handle import Denoiser, Handle, Site
from fastdit.observe import Observe

_current = threading.local()
"""`.site`: the site whose processor is running in this thread, between the bound processor and the core attention."""


class BoundProcessor:
    """One attention module's processor around its original one, `inner`. Subclassed per class of inner (`_bound_class`)."""

    original: type[Any]
    """Class of `inner`."""

    def __new__(cls, inner: Any = None, site: Site | None = None) -> Any:
        # Loaders (IP-Adapter) make processors anew by their class and no argument: they mean the model's own.
        return cls.original() if inner is None else object.__new__(cls)

    def __init__(self, inner: Any, site: Site) -> None:
        self.inner = inner
        self.site = site
        # A tensor, not integers: integers would be constants of the compiled graph, one graph per layer.
        self.ids = torch.tensor([site.denoiser.handle.number, site.index], device="cpu")

    # diffusers sets these two on processors (`set_attention_backend`, `enable_parallelism`). A processor without them is
    # skipped in silence while the sequence is split all the same.
    @property
    def _attention_backend(self) -> Any:
        return getattr(self.inner, "_attention_backend", None)

    @_attention_backend.setter
    def _attention_backend(self, value: Any) -> None:
        self.inner._attention_backend = value

    @property
    def _parallel_config(self) -> Any:
        return getattr(self.inner, "_parallel_config", None)

    @_parallel_config.setter
    def _parallel_config(self, value: Any) -> None:
        self.inner._parallel_config = value

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundProcessor:
        site = copy.deepcopy(self.site, memo)
        return type(self)(copy.deepcopy(self.inner, memo), site)


@functools.cache
def _bound_class(inner: Any) -> type[BoundProcessor]:
    original: Any = inner.__call__
    namespace = dict(original.__globals__)
    namespace.update(
        {name: ours for name, ours in (("dispatch_attention_fn", _dispatch), ("F", _functional)) if name in namespace}
    )
    # torch.compile looks an inlined function's globals up by re-importing the module of this name: the original's.
    namespace.pop("__name__", None)
    clone = types.FunctionType(original.__code__, namespace, original.__name__, original.__defaults__, original.__closure__)
    clone.__kwdefaults__ = original.__kwdefaults__

    def __call__(self: BoundProcessor, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        _current.site = self
        try:
            return clone(self.inner, attn, *args, **kwargs)
        finally:  # or this thread would keep the pipeline's statistics alive
            _current.site = None

    # diffusers' Attention.forward passes only the keyword arguments that it finds in the processor's signature.
    __call__.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return type(f"Fast{inner.__name__}", (BoundProcessor,), {"__call__": __call__, "original": inner, "__doc__": inner.__doc__})


def _dispatch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """Stands for diffusers' `dispatch_attention_fn`: q, k, v [B, N, H, D]."""
    bound = _current.site
    refusal = _refusal(query, key, dropout_p, is_causal, enable_gqa)
    if parallel_config is not None and refusal is None:
        refusal = parallel.refusal(bound.site.denoiser, parallel_config, attn_mask)
    bound.site.refusal = refusal
    if refusal is not None:
        return dispatch_attention_fn(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
            backend=backend, parallel_config=parallel_config,
        )  # fmt: skip
    name = "" if backend is None else str(AttentionBackendName(backend).value)
    if parallel_config is not None:
        return parallel.attention(bound.site.denoiser, bound.ids, query, key, value, attn_mask, scale, name, parallel_config)
    return attend(bound.site.denoiser, bound.ids, query, key, value, attn_mask, scale, name)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stands for `F.scaled_dot_product_attention`: q, k, v [B, H, N, D]."""
    bound = _current.site
    refusal = _refusal(query.transpose(1, 2), key.transpose(1, 2), dropout_p, is_causal, enable_gqa)
    bound.site.refusal = refusal
    if refusal is not None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return attend(bound.site.denoiser, bound.ids, query, key, value, attn_mask, scale, SDPA).transpose(1, 2)


_functional = types.ModuleType("fastdit_functional")
_functional.__dict__.update({name: thing for name, thing in vars(F).items() if not name.startswith("__")})
_functional.scaled_dot_product_attention = _sdpa  # type: ignore[attr-defined]


def _refusal(query: Tensor, key: Tensor, dropout_p: float, is_causal: bool, enable_gqa: bool) -> str | None:
    if is_causal or enable_gqa or dropout_p:
        return "causal or grouped attention, or dropout"
    if query.shape[1] != key.shape[1]:
        return "cross-attention"
    return None


def install(model: nn.Module, name: str, adapter: Adapter, handle: Handle) -> None:
    """Bind every self-attention site of a model into a handle. The model must not be installed yet."""
    reference = weakref.ref(model)
    denoiser = Denoiser(
        name, adapter, handle, contexts=functools.partial(hooked.context, reference),
        splits_text=functools.partial(hooked.splits_text, reference),
    )  # fmt: skip
    first = len(handle.sites)
    for layer, (site_name, _) in enumerate(adapter.sites(model)):
        denoiser.sites.append(Site(site_name, first + layer, layer, denoiser))
    denoiser.left.update(why for _, why in adapter.left(model))
    handle.denoisers.append(denoiser)
    bind(model, denoiser)
    model.register_forward_pre_hook(Observe(denoiser), with_kwargs=True)


def bind(model: nn.Module, denoiser: Denoiser) -> None:
    """Wrap the processor of every site that is not wrapped; again after diffusers replaced them (`fuse_qkv_projections`)."""
    for site, (_, module) in zip(denoiser.sites, denoiser.adapter.sites(model), strict=True):
        if not isinstance(module.processor, BoundProcessor):
            cls: Any = type(module.processor)
            _set(module, _bound_class(cls)(module.processor, site))


def uninstall(model: nn.Module) -> None:
    """Give back the very processors that `install` found; a model without ours is left alone."""
    if (denoiser := installed(model)) is not None:
        for site in denoiser.sites:  # a cycle that Python's collector may find much later: what is large goes now
            site.memories.clear()
        plan.forget()
    for module in model.modules():
        if isinstance(getattr(module, "processor", None), BoundProcessor):
            _set(module, module.processor.inner)
    kept = getattr(model, "original_attn_processors", None) or {}  # what `unfuse_qkv_projections` will give back
    for name, processor in kept.items():
        if isinstance(processor, BoundProcessor):
            kept[name] = processor.inner
    for key in [key for key, hook in model._forward_pre_hooks.items() if isinstance(hook, Observe)]:
        del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]


def replace(model: nn.Module, processors: Any, setter: Callable[[Any], None]) -> None:
    """Set other processors on an installed model, the way diffusers does it in the middle of things.

    Fusing and unfusing projections and loading adapters change the processors around the same attention: they are bound again.
    One processor for all layers, or the very objects that were there before, is somebody's wish to be without us.
    """
    denoiser = installed(model)
    assert denoiser is not None
    if isinstance(processors, dict):
        inner = {
            id(module.processor.inner)
            for _, module in denoiser.adapter.sites(model)
            if isinstance(module.processor, BoundProcessor)
        }
        keep = not inner or not inner <= {id(processor) for processor in processors.values()}
    else:
        keep = type(processors).__name__.startswith("Fused")
    if not keep:
        uninstall(model)
    setter(processors)
    if keep:
        bind(model, denoiser)


def installed(model: nn.Module) -> Denoiser | None:
    """The denoiser that `install` made of this model, if it did."""
    return next((hook.denoiser for hook in model._forward_pre_hooks.values() if isinstance(hook, Observe)), None)


def _set(module: nn.Module, processor: Any) -> None:
    setter: Callable[[Any], None] | None = getattr(module, "set_processor", None)
    if setter is None:
        module.processor = processor
    else:
        setter(processor)
