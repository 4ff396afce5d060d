"""The seam: each attention module keeps its own processor; only the core attention is replaced.

A bound processor runs a clone of the original processor's `__call__` in whose globals `dispatch_attention_fn` and
`F.scaled_dot_product_attention` are ours. Projections, norms, rotary embedding, LoRA and fused weights stay the model's own
code. Both functions call one opaque op (`fastdit.attach.site_op`), which looks its plan up at run time. A compiled
denoiser is therefore one graph for all steps and, compiled block by block, one graph for all layers.

Attention that fastdit does not support (causal or grouped attention, dropout, cross-attention) goes to the original function,
with the original backend, and is reported.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
import types
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from fastdit.attach import context_parallel
from fastdit.attach.handle import Site
from fastdit.attach.site_call import SDPA
from fastdit.attach.site_op import attend
from fastdit.runs.forward import Forward
from fastdit.runs.site_state import CallRecord

_current = threading.local()
"""`.site`: the bound processor that is running in this thread; `.reached`: whether it has called the core attention. Set here
for the main thread: torch.compile compiles once more when an attribute appears."""
_current.site, _current.reached = None, True


class _EqualToOriginal(type):
    """Metaclass of bound classes: each compares equal to its original class. diffusers looks processors up by class, in
    dictionaries (`AttentionProcessorRegistry`) and in tuples (`set_default_attn_processor`)."""

    original: type[Any]

    def __eq__(cls, other: object) -> bool:
        return cls is other or cls.__dict__.get("original") is other

    def __hash__(cls) -> int:
        return hash(cls.__dict__.get("original", cls.__name__))


class BoundProcessor(metaclass=_EqualToOriginal):
    """Wraps an attention module's original processor, `inner`. It is a subclass of the original's class (`bound_class`) and
    shares its attributes: what diffusers sets on one is set on both.

    site: None for a processor that a loader created from the class alone; `replace` binds it.
    """

    __slots__ = ("inner", "layer", "site")
    inner: Any
    site: Site | None
    layer: Tensor | None

    def __new__(cls, inner: Any = None, site: Site | None = None) -> Any:
        bound = object.__new__(cls)
        inner = cls.original() if inner is None else inner
        # A tensor: an integer would be a constant of the compiled graph, and each layer would need its own graph.
        layer = None if site is None else torch.tensor([site.layer], dtype=torch.int64, device="cpu")
        for name, value in (("__dict__", inner.__dict__), ("inner", inner), ("site", site), ("layer", layer)):
            object.__setattr__(bound, name, value)  # past nn.Module's __setattr__, which would register `inner` as a submodule
        return bound

    def __init__(self, inner: Any = None, site: Site | None = None) -> None:
        pass

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundProcessor:
        site = copy.deepcopy(self.site, memo)
        return type(self)(copy.deepcopy(self.inner, memo), site)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles as its original, so that loading does not need fastdit."""
        return copy.copy, (self.inner,)


@functools.cache
def bound_class(inner: Any) -> type[BoundProcessor]:
    """The subclass of a processor class whose `__call__` uses fastdit's attention."""
    original: Any = inner.__call__
    if original is nn.Module.__call__:  # a processor that is a module
        original = inner.forward
    namespace = dict(original.__globals__)
    namespace.update(
        {name: ours for name, ours in (("dispatch_attention_fn", _dispatch), ("F", _functional)) if name in namespace}
    )
    # torch.compile looks up an inlined function's globals by re-importing the module `__name__`, which is the original's.
    namespace.pop("__name__", None)
    clone = types.FunctionType(original.__code__, namespace, original.__name__, original.__defaults__, original.__closure__)
    clone.__kwdefaults__ = original.__kwdefaults__

    def __call__(self: BoundProcessor, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        if self.site is None:
            return self.inner(attn, *args, **kwargs)
        outer, _current.site, _current.reached = getattr(_current, "site", None), self, False
        try:
            out = clone(self.inner, attn, *args, **kwargs)
            if not _current.reached:
                _record_skip(self, "its processor computes attention by itself")
            return out
        finally:  # otherwise this thread keeps the pipeline's statistics alive
            _current.site, _current.reached = outer, True

    # diffusers' Attention.forward passes only keyword arguments that are in the processor's signature.
    __call__.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    body = {"__call__": __call__, "original": inner, "__doc__": inner.__doc__, "__module__": inner.__module__}
    bound: Any = _EqualToOriginal(f"Fast{inner.__name__}", (BoundProcessor, inner), body)
    return bound


def _record_skip(bound: BoundProcessor, reason: str) -> None:
    """Record why a call goes to the original attention. Raises RuntimeError if the configuration is strict."""
    site = bound.site
    assert site is not None
    site.refusal = site.denoiser.handle.config.accept(site.name, reason)
    token = getattr(site.denoiser.call, "token", None)
    if token is None or torch.compiler.is_compiling():  # a record would be traced once, not made in every call
        return
    forward = Forward.find(int(token))
    forward.state(site.layer).calls.append(CallRecord(None, 1.0, "dense", reason, forward.step, forward.sigma))


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
    """Replaces diffusers' `dispatch_attention_fn`: q, k, v [B, N, H, D] -> [B, N, H, D]."""
    bound = _current.site
    refusal = _refusal(bound, query, key, value, dropout_p, is_causal, enable_gqa)
    if attention_kwargs and refusal is None:
        refusal = f"its processor passes {', '.join(map(str, attention_kwargs))} on to the attention backend"
    if parallel_config is not None and refusal is None and bound.site.denoiser.handle.trains and torch.is_grad_enabled():
        refusal = "split over processes: no gradient passes"
    if parallel_config is not None and refusal is None:
        refusal = context_parallel.refusal(bound.site.denoiser, parallel_config, attn_mask)
    if refusal is not None:
        _record_skip(bound, refusal)
        return dispatch_attention_fn(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
            backend=backend, parallel_config=parallel_config,
        )  # fmt: skip
    name = "" if backend is None else str(AttentionBackendName(backend).value)
    query, key, value = _autocast(query, key, value)
    if parallel_config is not None:
        return context_parallel.attention(
            bound.site.denoiser, bound.layer, query, key, value, attn_mask, scale, name, parallel_config
        )
    denoiser = bound.site.denoiser
    return attend(denoiser.call.token, bound.layer, query, key, value, attn_mask, scale, name, trains=denoiser.handle.trains)


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
    """Replaces `F.scaled_dot_product_attention`: q, k, v [B, H, N, D] -> [B, H, N, D]."""
    bound = _current.site
    refusal = _refusal(bound, query.transpose(1, 2), key.transpose(1, 2), value, dropout_p, is_causal, enable_gqa)
    if refusal is not None:
        _record_skip(bound, refusal)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    query, key, value = (x.transpose(1, 2) for x in _autocast(query, key, value))
    denoiser = bound.site.denoiser
    out = attend(denoiser.call.token, bound.layer, query, key, value, attn_mask, scale, SDPA, trains=denoiser.handle.trains)
    return out.transpose(1, 2)


_functional = types.ModuleType("fastdit_functional")
_functional.__dict__.update({name: thing for name, thing in vars(F).items() if not name.startswith("__")})
_functional.scaled_dot_product_attention = _sdpa  # type: ignore[attr-defined]


def _refusal(
    bound: BoundProcessor, query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> str | None:
    _current.reached = True
    if is_causal or enable_gqa or dropout_p:
        return "causal or grouped attention, or dropout"
    if query.shape[1] != key.shape[1]:
        return "cross-attention"
    if not query.dtype == key.dtype == value.dtype and not torch.is_autocast_enabled(query.device.type):
        return f"q, k and v are of different dtypes: {query.dtype}, {key.dtype}, {value.dtype}"
    if mode := _intercepting():
        return f"{mode} may change attention"
    if bound.site is None or getattr(bound.site.denoiser.call, "token", None) is None:
        if bound.site is not None and bound.site.denoiser.handle.train:
            raise RuntimeError(
                f"{bound.site.name}: called outside of its denoiser's forward, so that its plan is not known. To recompute"
                " blocks in the backward use the model's enable_gradient_checkpointing()"
            )
        return "called outside of its denoiser's forward"
    return None


def _intercepting() -> str | None:
    """Name of an active torch function mode, or None. Our op would hide attention from it; diffusers' guidance skips attention
    with such a mode."""
    for mode in _get_current_function_mode_stack():
        if not isinstance(mode, DeviceContext):  # `with torch.device(...)` only changes where tensors are created
            return type(mode).__name__
    return None


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast does for SDPA, because autocast does not see inside our op."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
