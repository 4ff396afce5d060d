"""The few calls people need: `accelerate`, `install`, `restore`, `report`, and `set_attn_processor(FastAttnProcessor())`.

diffusers has `set_attn_processor` on models; importing fastdit adds it to pipelines, and teaches the models' own to take a
`FastAttnProcessor`. Every other processor goes where it always went.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.models.attention import AttentionMixin
from torch import nn

from fastdit.config import Config
from fastdit.handle import Handle
from fastdit.pipelines import own
from fastdit.pipelines.adapter import adapter_for
from fastdit.presets import DEFAULT, preset
from fastdit.processor import install as install_model
from fastdit.processor import installed, replace, uninstall
from fastdit.report import Report

DENOISERS = ("transformer", "transformer_2", "unet")
"""Names under which pipelines keep their denoisers; Wan 2.2 has two."""


class FastAttnProcessor:
    """What to hand to `set_attn_processor` of a pipeline or a model: a preset's name or a `Config`."""

    def __init__(self, config: str | Config = DEFAULT) -> None:
        self.config = _config(config)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("FastAttnProcessor is not a processor of one module: pass it to pipe.set_attn_processor(...)")

    def __repr__(self) -> str:
        return f"FastAttnProcessor({self.config!r})"


def accelerate(target: Any, config: str | Config = DEFAULT) -> Handle:
    """Replace the self-attention of every denoiser of a pipeline (or of one model) until `restore`.

    config: "exact", "balanced", "fast", or a `Config`. An accelerated target takes the new configuration. Returns the handle,
    which is also a context manager: ``with fastdit.accelerate(pipe): ...`` restores at the end, exception or not.

    Raises ValueError for an unknown preset, a model family fastdit does not know, or a target without a denoiser; the
    target is unchanged then.
    """
    resolved = _config(config)
    models = dict(_denoisers(target))
    adapters = {  # a model that was described by `install` stays described
        name: adapter_for(model) if (denoiser := installed(model)) is None else denoiser.adapter
        for name, model in models.items()
    }
    restore(target)
    handle = Handle(resolved)
    for name, model in models.items():
        install_model(model, name, adapters[name], handle)
    handle.restore = functools.partial(restore, target)
    if not isinstance(target, nn.Module):
        handle.pipeline = weakref.ref(target)
    return handle


def install(
    model: nn.Module, layout: own.Description, config: str | Config = DEFAULT, *, skip: Mapping[str, str] = own.SKIP
) -> Handle:
    """`accelerate` for a model that fastdit does not know: an own subclass with other arguments, or a denoiser of one's own.

    layout: a function that gets the arguments of the model's forward by name and returns `fastdit.Facts`: the grid (T, H, W)
    in tokens, the noise level σ, and how many other tokens of the same sequence lie before and behind the grid. It is called
    once per forward and traced by torch.compile, so it may use shapes and tensor operations, but not read tensors' values.
    Or the name of a model class that has its tokens in the same places ("WanTransformer3DModel"), or an object like those
    of `fastdit.pipelines`. skip: parts of module names that are no self-attention, each with the reason the report shall give.

    The model's attention modules must keep their attention in a `processor`, as diffusers' do. Returns the handle, as
    `accelerate` does. Raises ValueError for a layout that describes nothing; the model is unchanged then.
    """
    resolved, model = _config(config), getattr(model, "_orig_mod", model)
    adapter = own.adapter_of(model, layout, skip)
    restore(model)
    handle = Handle(resolved)
    install_model(model, "model", adapter, handle)
    handle.restore = functools.partial(restore, model)
    return handle


def restore(target: Any) -> None:
    """Give a pipeline or model back exactly the processors it had. One that is not accelerated is left alone."""
    for _, model in _denoisers(target):
        uninstall(model)


def report(target: Any) -> Report:
    """What ran in the latest run. Raises ValueError for a pipeline or model that is not accelerated."""
    for _, model in _denoisers(target):
        if (denoiser := installed(model)) is not None:
            return Report.of(denoiser.handle)
    raise ValueError(f"this {type(target).__name__} is not accelerated: call fastdit.accelerate(pipe) first")


def _config(config: str | Config) -> Config:
    if isinstance(config, str):
        return preset(config)
    if not isinstance(config, Config):
        raise ValueError(f"expected a preset's name or a fastdit.Config, got {config!r}")
    return config


def _denoisers(target: Any) -> Iterator[tuple[str, nn.Module]]:
    """(name, model), torch.compile's wrapper taken off."""
    if isinstance(target, nn.Module):
        found = [("model", target)]
    else:
        found = [(name, model) for name in DENOISERS if isinstance(model := getattr(target, name, None), nn.Module)]
    if not found:
        raise ValueError(f"{type(target).__name__} has no denoiser: none of {', '.join(DENOISERS)} is a model")
    for name, model in found:
        yield name, getattr(model, "_orig_mod", model)


_set_on_model = AttentionMixin.set_attn_processor


@functools.wraps(_set_on_model)
def _model_set_attn_processor(self: Any, processor: Any) -> None:
    if isinstance(processor, FastAttnProcessor):
        accelerate(self, processor.config)
    elif installed(self) is None:
        _set_on_model(self, processor)
    else:
        replace(self, processor, functools.partial(_set_on_model, self))


def _pipeline_set_attn_processor(self: Any, processor: Any) -> None:
    """Set the attention processor of every denoiser of the pipeline (added by fastdit)."""
    if isinstance(processor, FastAttnProcessor):
        accelerate(self, processor.config)
        return
    for _, model in _denoisers(self):
        model.set_attn_processor(processor)  # type: ignore[operator]


def patch_diffusers() -> None:
    """Make `set_attn_processor` of models and pipelines take a `FastAttnProcessor`. Done once, when fastdit is imported."""
    AttentionMixin.set_attn_processor = _model_set_attn_processor  # type: ignore[method-assign]
    DiffusionPipeline.set_attn_processor = _pipeline_set_attn_processor  # type: ignore[attr-defined]
