"""The op of a site, `fastdit::site_attention`: opaque to torch.compile, so that noise levels, phases, prompt lengths and
statistics never cause a recompilation.

Where gradients are asked for, an eager call is no op: autograd sees its parts, and dense attention trains as it does without
fastdit. In a graph the op has a backward, an op itself, which computes the call once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit import ops
from fastdit.attach.cuda_graphs import STAYS_OUT, refuse_capture
from fastdit.attach.site_call import SiteCall
from fastdit.runs.forward import Forward


def attend(
    token: Tensor,
    layer: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    backend: str,
    at: Tensor | None = None,
    trains: bool = False,
) -> Tensor:
    """Attention of one layer in the denoiser's running call: [B, N, H, D] -> [B, N, H, D]. Traced by torch.compile.

    token, layer: int64 [1] on the CPU, the `Forward`'s number and the site's index in it. at: int64 [n], the sequence's tokens
    that q holds; None: all. trains: gradients pass (`Handle.trains`).
    """
    compiled = torch.compiler.is_compiling()
    if trains and not compiled and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _answer(SiteCall(Forward.find(int(token)), int(layer), at, scale, backend), q, k, v, mask, False)
    return _site_attention(q, k, v, mask, token, layer, at, scale, backend, compiled, trains)


def _answer(call: SiteCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, compiled: bool) -> Tensor:
    # The seam has cast as autocast would. Our own products in float32 must not be autocast.
    with ops.on_device(q), ops.without_autocast(q):
        return call.answer(q, k, v, mask, compiled).contiguous()


@torch.library.custom_op("fastdit::site_attention", mutates_args=(), **STAYS_OUT)
def _site_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    token: Tensor,
    layer: Tensor,
    at: Tensor | None,
    scale: float | None,
    backend: str,
    compiled: bool,
    trains: bool = False,
) -> Tensor:
    return _answer(SiteCall(Forward.find(int(token)), int(layer), at, scale, backend), q, k, v, mask, compiled)


@_site_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    refuse_capture()
    return q.new_empty(q.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.backend, _, ctx.trains = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if not ctx.trains:
        raise RuntimeError(
            "fastdit accelerated this pipeline for inference only. To train it: fastdit.accelerate(pipe, config, train=True)"
        )
    if ctx.needs_input_grad[3]:
        raise RuntimeError("fastdit has no gradient for an attention mask in a compiled model: train it without torch.compile")
    return *_site_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.backend), *(None,) * 8


@torch.library.custom_op("fastdit::site_attention_backward", mutates_args=(), **STAYS_OUT)
def _site_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    token: Tensor,
    layer: Tensor,
    at: Tensor | None,
    scale: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    call = SiteCall(Forward.find(int(token)), int(layer), at, scale, backend, again=True)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad(), _autograd():
        out = _answer(call, leaves[0], leaves[1], leaves[2], mask, True)
        found = torch.autograd.grad(out, leaves, grad)
    dq, dk, dv = (torch.empty_like(x).copy_(slope) for x, slope in zip((q, k, v), found, strict=True))
    return dq, dk, dv


@_site_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    refuse_capture()
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _autograd() -> Any:
    """Within it autograd works, as it does not in an op's kernel: that is called below it."""
    shut = torch._C._dispatch_tls_local_exclude_set()
    keys = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.ADInplaceOrView)  # all below autograd
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), shut & keys)


torch.library.register_autograd("fastdit::site_attention", _backward, setup_context=_setup)
