"""The functional door to attention: `attention(q, k, v, block_mask, quant, scale) -> (out, lse)`.

One `torch.library.custom_op`, so that torch.compile sees a single opaque node. CPU tensors go to `kernels/cpu.py`, CUDA
tensors to Triton (`kernels/cuda.py`), which is imported only then. What has no kernel is refused by name, never
computed some other way: whoever calls decides what to do instead.

`run` and `repair` are the same without the op and its checks, for an op that calls them for a call it has planned (an op inside
an op costs its wrappers twice). An answer that is not finite raises a flag on the device, and `repair`, behind every `run`,
replaces it there: nobody waits for the GPU to see whether.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from fastdit.core.block_mask import BlockMask
from fastdit.core.quant import Quant
from fastdit.kernels import cpu, cpu_backward

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask | None = None,
    quant: Quant | None = None,
    scale: float | None = None,
    remainder: str = "none",
    bias_q: Tensor | None = None,
    bias_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the tiles a block mask keeps (all of them without one), in a number format.

    q [B, H, Nq, D], k and v [B, Hkv, Nk, D] in token order, any strides, H a multiple of Hkv; quant: default none (the
    inputs' own dtype); scale: default D^-½. remainder "pooled": each dropped tile enters as one key and one value, the means
    of its own, log n heavier; exact where a tile's keys are equal. bias_q [b, h, Nq, R] and bias_k [b, h, Nk, R] (b, h: 1 or
    B, H): bias_q·bias_kᵀ is added to the logits (FlashBias, arXiv 2505.12044); bias_k alone, R = 1: to all logits of a key,
    log n where it stands for n, −inf where it is masked (finite beside a bias_q). Returns out like q and natural-log lse
    [B, H, Nq] in float32 (float64 for float64 inputs). A query whose tiles hold no key gets out = 0 and lse = −inf.

    Differentiable in q, k and v (`no_gradient` names what is not). In a number format the gradient is straight through:
    rounding has the derivative one (`kernels/cpu_backward.py` has the formulas).

        q, k, v = torch.randn(3, 1, 2, 64, 16, requires_grad=True).unbind()
        out, lse = fastdit.ops.attention(q, k, v, block_mask)
        out.square().mean().backward()

    Raises ValueError for shapes, dtypes or a mask that do not fit, NotImplementedError for a device without a kernel; its
    backward NotImplementedError for what `no_gradient` names, and beside a bias.
    """
    quant = quant or Quant()
    refusal = unsupported(q, quant)
    if refusal:
        raise NotImplementedError(f"fastdit.ops.attention: {refusal}")
    _check(q, k, v, block_mask)
    if remainder not in ("none", "pooled"):
        raise ValueError(f"remainder must be none or pooled, got {remainder!r}")
    _check_bias(q, k, bias_q, bias_k, remainder)
    masks = (None,) * 4 if block_mask is None else (
        block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.q_order, block_mask.k_order
    )  # fmt: skip
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _attention(q, k, v, *masks, str(quant), scale, remainder == "pooled", bias_q, bias_k)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask | None,
    quant: Quant,
    scale: float,
    remainder: str = "none",
    bias_q: Tensor | None = None,
    bias_k: Tensor | None = None,
    fault: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What `attention` computes, at once: no custom op, no check, no gradient. For arguments that are known to fit.

    fault: one int32 on q's device, into which 1 is ORed where the answer is not finite: a NaN or infinity in `out` as it is
    stored, a NaN or +∞ in `lse` (−∞ is a query whose tiles hold no key). Never read here, so nothing waits for it. `out` has
    the shape and dtype of q, and its strides where the channels of q lie together.
    """
    masks = None if block_mask is None else (
        block_mask.kv_num_blocks, block_mask.kv_indices, block_mask.q_order, block_mask.k_order
    )  # fmt: skip
    return _run(q, k, v, masks, quant, scale, remainder == "pooled", bias_q, bias_k, fault)


def repair(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, fault: Tensor, lse: Tensor | None = None) -> None:
    """Where `fault` has the 1 that `run` ORs into it: dense attention of the same q, k, v in their own dtype, with scores and
    sums in float32, into `out` [B, H, Nq, D] (any strides) and, if given, `lse` [B, H, Nq] (contiguous, float32; float64
    beside float64 inputs), in place. If that is not finite either, ORs 2: the inputs were broken. Else it changes nothing.

    The device decides: no wait, no memory, so it may be captured in a CUDA graph. A flag is of one `run` and its repair; put it
    back to 0 before the next. Whatever has a kernel in some format (`unsupported` is None) can be repaired.

    Raises NotImplementedError for what has no kernel, ValueError for a flag or an answer that does not fit.
    """
    if q.device.type != "cpu" and (refusal := _irreparable(q)):
        raise NotImplementedError(f"fastdit.ops.repair: {refusal}")
    if fault.dtype != torch.int32 or fault.numel() != 1 or fault.device != q.device:
        found = f"{fault.dtype} {tuple(fault.shape)} on {fault.device}"
        raise ValueError(f"repair needs one int32 on {q.device} as flag, got {found}")
    if out.shape != q.shape or out.dtype != q.dtype or (lse is not None and not lse.is_contiguous()):
        raise ValueError(f"repair needs an answer like q {tuple(q.shape)} in {q.dtype}, got {tuple(out.shape)} in {out.dtype}")
    with on_device(q):
        _kernels(q).repair(q, k, v, out, scale, fault, lse)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within it, kernels are launched on the GPU that a tensor lies on, whichever is the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Within it, autocast of a tensor's device is off. Entering torch's own costs 20 µs also where it is off already."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def unsupported(q: Tensor, quant: Quant) -> str | None:
    """Why there is no kernel for tensors like q in this format, or None if there is one."""
    if q.device.type == "cpu":
        return None
    if q.device.type != "cuda" or torch.version.hip:
        return f"no kernel for {'AMD GPU' if torch.version.hip else q.device.type} tensors"
    if not _has_triton():
        return "Triton is not installed: pip install triton"
    from fastdit.kernels import cuda as triton_kernels

    return triton_kernels.unsupported(q, quant, torch.cuda.get_device_capability(q.device))


def no_gradient(q: Tensor, quant: Quant, remainder: str = "none") -> str | None:
    """Why attention of tensors like q in this format has no backward, or None if it has one."""
    if remainder not in ("none", "pooled"):
        return f"the {remainder} remainder has no backward"
    return None if q.device.type == "cpu" else f"no backward on {q.device.type} yet"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _irreparable(q: Tensor) -> str | None:
    """As `unsupported`, of the format with the widest kernels; nothing is quantized."""
    return unsupported(q, Quant("int8", "int8"))


def _check(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"attention needs q [B, H, Nq, D] and k, v [B, Hkv, Nk, D], got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention needs a multiple of the {k.shape[1]} key heads as query heads, got {q.shape[1]}: {shapes}")
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention needs one floating dtype for q, k and v, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"attention needs q, k and v on one device, got {q.device}, {k.device}, {v.device}")
    if block_mask is None:
        return
    b, h = block_mask.kv_num_blocks.shape[:2]
    if b not in (1, q.shape[0]) or h not in (1, q.shape[1]):
        raise ValueError(f"a block mask for {b} batch elements and {h} heads does not fit {shapes}")
    for name, tokens, length in (("query", block_mask.q_len, q.shape[2]), ("key", block_mask.k_len, k.shape[2])):
        if tokens != length:
            raise ValueError(f"the block mask is for {tokens} {name} tokens, got {length}: {shapes}")


def _check_bias(q: Tensor, k: Tensor, bias_q: Tensor | None, bias_k: Tensor | None, remainder: str) -> None:
    if bias_k is None:
        if bias_q is not None:
            raise ValueError("bias_q needs a bias_k")
        return
    if remainder != "none":
        raise ValueError("no pooled remainder beside a bias: the bias of a dropped tile is not known")
    rank = 1 if bias_q is None else bias_q.shape[-1]
    for name, bias, length in (("bias_q", bias_q, q.shape[2]), ("bias_k", bias_k, k.shape[2])):
        if bias is None:
            continue
        fits = bias.ndim == 4 and bias.shape[0] in (1, q.shape[0]) and bias.shape[1] in (1, q.shape[1])
        if not fits or bias.shape[2:] != (length, rank):
            raise ValueError(
                f"{name} must be [1 or {q.shape[0]}, 1 or {q.shape[1]}, {length}, {rank}], got {tuple(bias.shape)}"
            )


def _kernels(q: Tensor) -> Any:
    """The module that computes attention of tensors like q: both have the same two functions."""
    if q.device.type == "cpu":
        return cpu
    from fastdit.kernels import cuda as triton_kernels

    return triton_kernels


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    quant: Quant,
    scale: float,
    pooled: bool,
    bias_q: Tensor | None,
    bias_k: Tensor | None,
    fault: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    kernels = _kernels(q)
    with on_device(q):
        if masks is None:
            return kernels.dense_attention(q, k, v, scale, quant, bias_q, bias_k, fault)  # nothing dropped: no remainder
        return kernels.block_sparse_attention(q, k, v, *masks, scale, quant, bias_q, bias_k, pooled, fault)


@torch.library.custom_op("fastdit::attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor,
    kv_num_blocks: Tensor | None, kv_indices: Tensor | None, q_order: Tensor | None, k_order: Tensor | None,
    quant: str, scale: float, pooled: bool = False, bias_q: Tensor | None = None, bias_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    masks = _masks(kv_num_blocks, kv_indices, q_order, k_order)
    out, lse = _run(q, k, v, masks, Quant.parse(quant), scale, pooled, bias_q, bias_k)
    return _promised(q, out), lse.contiguous()


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("fastdit::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    kv_num_blocks: Tensor | None, kv_indices: Tensor | None, q_order: Tensor | None, k_order: Tensor | None,
    quant: str, scale: float, pooled: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    fmt, masks = Quant.parse(quant), _masks(kv_num_blocks, kv_indices, q_order, k_order)
    if (refusal := no_gradient(q, fmt, "pooled" if pooled else "none")) is not None:
        raise NotImplementedError(f"fastdit.ops.attention: {refusal}")
    with on_device(q), without_autocast(q):
        dq, dk, dv = cpu_backward.attention_backward(grad_out, grad_lse, q, k, v, out, lse, masks, scale, fmt, pooled)
    return _promised(q, dq), _promised(k, dk), _promised(v, dv)


@_attention_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _masks(*masks: Tensor | None) -> Any:
    """The four tensors of a block mask, or None."""
    return None if any(mask is None for mask in masks) else masks


def _promised(like: Tensor, x: Tensor) -> Tensor:
    """x in the memory layout that a fake kernel promised to the compiler."""
    expected = torch.empty_like(like)
    return x if x.stride() == expected.stride() else expected.copy_(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *masks, ctx.quant, ctx.scale, ctx.pooled, bias_q, bias_k = inputs
    ctx.biased = bias_q is not None or bias_k is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *masks)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if ctx.biased:
        raise NotImplementedError("fastdit.ops.attention: no backward beside a bias")
    q, k, v, out, lse, *masks = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    return *_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, *masks, ctx.quant, ctx.scale, ctx.pooled
    ), *(None,) * 9  # fmt: skip


torch.library.register_autograd("fastdit::attention", _backward, setup_context=_setup)
