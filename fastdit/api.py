"""The few calls people need: `accelerate`, `install`, `propagate_encoder`, `restore`, `report`, and
`set_attn_processor(FastAttnProcessor())`.

diffusers has `set_attn_processor` on models; importing fastdit adds it to pipelines, and teaches the models' own to take a
`FastAttnProcessor` (`diffusers_hooks.py`). Every other processor goes where it always went.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastdit.attach.handle import Handle
from fastdit.attach.processor import install as install_model
from fastdit.attach.processor import installed, replace, uninstall, without_others
from fastdit.config import Config
from fastdit.encoder_reuse.propagate import KEY_STEPS, Propagation, propagation_of
from fastdit.pipelines import described
from fastdit.pipelines.encoder import encoder_of
from fastdit.pipelines.registry import adapter_for, is_hopeless, is_known
from fastdit.planning.adapter import Adapter
from fastdit.planning.trainable import untrainable
from fastdit.presets import DEFAULT, preset, read_profile
from fastdit.reporting.report import Report

DENOISERS = ("transformer", "transformer_2", "unet")
"""Names under which pipelines keep a denoiser, whatever its class; under others it is one if its class is known."""


class FastAttnProcessor:
    """What to hand to `set_attn_processor` of a pipeline or a model: a preset's name, a `Config` or a JSON file with one."""

    def __init__(self, config: str | os.PathLike[str] | Config = DEFAULT) -> None:
        self.config = config_of(config)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("FastAttnProcessor is not a processor of one module: pass it to pipe.set_attn_processor(...)")

    def __repr__(self) -> str:
        return f"FastAttnProcessor({self.config!r})"


def accelerate(target: Any, config: str | os.PathLike[str] | Config = DEFAULT, *, train: bool = False) -> Handle:
    """Replace the self-attention of every denoiser of a pipeline (or of one model) until `restore`.

    config: "exact", "balanced", "fast", "fps", a `Config`, or a JSON file with one (`tune` writes it). An accelerated target
    takes the new configuration. Returns the handle, which is also a context manager: ``with fastdit.accelerate(pipe): ...``
    restores at the end, exception or not.

    train: gradients pass through the tiles; each forward is planned by itself, and `error_budget` measures nothing. What is
    dense everywhere, such as "exact", trains as the pipeline does without fastdit, with or without it (docs/training.md).

        fastdit.accelerate(model, Config((Phase(policy=Window(density=0.125)),), tile=(1, 8, 8)), train=True)
        model.enable_gradient_checkpointing()
        loss(model(**inputs)).backward()

    Raises ValueError for an unknown preset, a file without a configuration, a model family fastdit does not know, a target
    without a denoiser, or with `train` for a configuration that cannot be trained; the target is unchanged then.
    """
    resolved, parts = config_of(config), adapters_of(target)
    if train:
        _check_trainable(resolved, [model for _, model, _ in parts])
    return attach(target, resolved, parts, train)


def adapters_of(target: Any) -> list[tuple[str, nn.Module, Adapter]]:
    """(name, model, its adapter) of every denoiser, unwrapped; a model that was described by `install` stays described.

    Raises ValueError as `accelerate` does.
    """
    found = []
    for name, model in unwrapped_denoisers(target):
        denoiser = installed(model)
        found.append((name, model, adapter_for(model) if denoiser is None else denoiser.adapter))
    return found


def attach(target: Any, config: Config, parts: Sequence[tuple[str, nn.Module, Adapter]], train: bool = False) -> Handle:
    """`accelerate` with what `adapters_of` the target found, perhaps before it was restored."""
    _restore_attention(target)
    handle = Handle(config, train)
    for name, model, adapter in parts:
        install_model(model, name, adapter, handle)
    handle.restore, handle.describe = _restorer([model for _, model, _ in parts]), _describe
    if not isinstance(target, nn.Module):
        handle.pipeline = weakref.ref(target)
    return handle


def _describe(handle: Handle) -> str:
    return str(Report.of(handle, None if handle.pipeline is None else handle.pipeline()))


def _check_trainable(config: Config, models: Iterable[nn.Module]) -> None:
    for model in models:
        if getattr(model, "_parallel_config", None) is not None:
            raise ValueError("train=True: no gradient passes through attention split over processes by enable_parallelism")
        for like in {parameter.device: parameter for parameter in model.parameters()}.values():
            if (why := untrainable(config, like)) is not None:
                raise ValueError(f"train=True: {why}")


def install(
    model: nn.Module,
    layout: described.Description,
    config: str | Config = DEFAULT,
    *,
    skip: Mapping[str, str] = described.SKIP,
    train: bool = False,
) -> Handle:
    """`accelerate` for a model that fastdit does not know: an own subclass with other arguments, or a denoiser of one's own.

    layout: a function that gets the arguments of the model's forward by name and returns `fastdit.Facts`: the grid (T, H, W)
    in tokens, the noise level σ, and how many other tokens of the same sequence lie before and behind the grid. It is called
    once per forward and traced by torch.compile, so it may use shapes and tensor operations, but not read tensors' values.
    Or the name of a model class that has its tokens in the same places ("WanTransformer3DModel"), or an object like those
    of `fastdit.pipelines`. skip: parts of module names that are no self-attention, each with the reason the report shall give.
    train: as in `accelerate`.

    The model's attention modules must keep their attention in a `processor`, as diffusers' do. Returns the handle, as
    `accelerate` does. Raises ValueError for a layout that describes nothing; the model is unchanged then.
    """
    resolved, model = config_of(config), getattr(model, "_orig_mod", model)
    if train:
        _check_trainable(resolved, [model])
    adapter = described.adapter_of(model, layout, skip)
    _restore_attention(model)
    handle = Handle(resolved, train)
    install_model(model, "model", adapter, handle)
    handle.restore, handle.describe = _restorer([model]), _describe
    return handle


def propagate_encoder(
    target: Any,
    key_steps: int | Iterable[int] = KEY_STEPS,
    *,
    noise: float = 0.0,
    batch: int | None = 1,
    depth: int | None = None,
) -> Propagation:
    """Run the encoder of a UNet, DiT or PixArt at key steps only, until `restore` (Faster Diffusion, arXiv 2312.09608).

    target: a pipeline, or its denoiser alone. A pipeline's ControlNet runs at key steps only as well.
    key_steps: indices of steps, from 0, or k for every k-th; the first is always one. Default: the paper's for 50 steps.
    noise: α of the paper's prior noise injection, .003 there; 0 for none. Needs a pipeline.
    batch: how many steps are decoded in one call; 1: one after another; None: all up to the next key step. More than 1 needs a
    pipeline, whose scheduler knows the steps to come, and memory for so many times the batch.
    depth: of a transformer, how many blocks are its encoder; default 18/28 of them.

    Steps are told apart by their timestep, guidance's branches by their conditioning. What is kept belongs to a run: pipelines
    and threads that share a model do not meet. Composes with `accelerate`. Returns the handle, which is also a context manager.

    Raises ValueError for a model whose encoder is not known, and for arguments out of range; the target is unchanged then.
    """
    pipeline = None if isinstance(target, nn.Module) else target
    steps = _key_steps(key_steps)
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise ValueError(f"batch={batch!r}: a number of steps from 1 up, or None for all up to the next key step")
    if not 0 <= noise < 1:
        raise ValueError(f"noise={noise!r}: a share of the first latents, from 0 to 1; the paper's is 0.003")
    if pipeline is None and (noise or batch != 1):
        raise ValueError("noise and batch need the pipeline, whose scheduler knows the steps: pass it instead of its model")
    models = [model for _, model in unwrapped_denoisers(target)]
    encoders = [encoder_of(model, depth) for model in models]
    _restore_encoder(target)
    propagation = Propagation(steps, noise, batch, pipeline)
    for model, encoder in zip(models, encoders, strict=True):
        propagation.install(model, encoder)
    control = getattr(pipeline, "controlnet", None)
    if isinstance(control, nn.Module):
        propagation.install_control(getattr(control, "_orig_mod", control))
    return propagation


def _key_steps(key_steps: int | Iterable[int]) -> int | tuple[int, ...]:
    steps = (key_steps,) if isinstance(key_steps, int) else tuple(key_steps)
    first = 1 if isinstance(key_steps, int) else 0
    if not steps or any(isinstance(step, bool) or not isinstance(step, int) or step < first for step in steps):
        raise ValueError(f"key_steps={key_steps!r}: indices of steps from 0 up, or one number k from 1 up for every k-th step")
    return key_steps if isinstance(key_steps, int) else steps


def restore(target: Any) -> None:
    """Give a pipeline or model back exactly as it was: its processors, its encoder. One that fastdit did not change is left
    alone; raises ValueError for an object without a denoiser."""
    _restore_attention(target)
    _restore_encoder(target)


def _restorer(models: Iterable[nn.Module]) -> Callable[[], None]:
    """What restores these models, without keeping them alive: a handle must not hold on to gigabytes of weights."""
    references = [weakref.ref(model) for model in models]

    def restore() -> None:
        for reference in references:
            if (model := reference()) is not None:
                uninstall(model)

    return restore


def _restore_attention(target: Any) -> None:
    for _, model in unwrapped_denoisers(target):
        uninstall(model)


def _restore_encoder(target: Any) -> None:
    for _, model in unwrapped_denoisers(target):
        if (propagation := propagation_of(model)) is not None:
            propagation.restore()


def report(target: Any) -> Report:
    """What ran in the latest run. Raises ValueError for a pipeline or model that is not accelerated."""
    for _, model in unwrapped_denoisers(target):
        if (denoiser := installed(model)) is not None:
            return Report.of(denoiser.handle, target)
    raise ValueError(f"this {type(target).__name__} is not accelerated: call fastdit.accelerate(pipe) first")


def config_of(config: str | os.PathLike[str] | Config) -> Config:
    if isinstance(config, os.PathLike) or (isinstance(config, str) and config.endswith(".json")):
        return read_profile(config)
    if isinstance(config, str):
        return preset(config)
    if not isinstance(config, Config):
        raise ValueError(f"expected a preset's name, a JSON file or a fastdit.Config, got {config!r}")
    return config


def denoisers_of(pipeline: Any) -> list[tuple[str, nn.Module]]:
    """(name, model) of the denoisers that a pipeline has, as it holds them: found among its components by what they are."""
    parts = {name: part for name, part in getattr(pipeline, "__dict__", {}).items() if not name.startswith("_")}
    parts |= {name: part for name in DENOISERS if (part := getattr(pipeline, name, None)) is not None}
    models = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    found = {name for name, part in models.items() if name in DENOISERS or _is_denoiser(unwrapped(part))}
    found = found or {name for name, part in models.items() if is_hopeless(unwrapped(part))}  # to say why
    return [(name, part) for name, part in models.items() if name in found]


def _is_denoiser(model: nn.Module) -> bool:
    """Of a class that is known, or described by `install`."""
    return is_known(model) or installed(model) is not None


def unwrapped(model: nn.Module) -> nn.Module:
    """Without the wrappers of torch.compile and of data parallelism."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner.module if isinstance(inner, DistributedDataParallel) else inner


def unwrapped_denoisers(target: Any) -> Iterator[tuple[str, nn.Module]]:
    """(name, model), unwrapped."""
    found = [("model", target)] if isinstance(target, nn.Module) else denoisers_of(target)
    if not found:
        raise ValueError(
            f"{type(target).__name__} has no denoiser: none of {', '.join(DENOISERS)} is a model, and no other component is of"
            " a class that fastdit knows"
        )
    seen: set[int] = set()
    for name, model in found:
        inner = unwrapped(model)
        if id(inner) not in seen:  # one model may stand in both places of Wan 2.2
            seen.add(id(inner))
            yield name, inner


def set_on_model(model: Any, processor: Any, original: Callable[[Any], None]) -> None:
    """What a model's `set_attn_processor` does; original: the bound method that diffusers gave it."""
    if isinstance(processor, FastAttnProcessor):
        accelerate(model, processor.config)
    elif installed(model) is None:
        original(without_others(processor, None))
    else:
        replace(model, processor, original)


def set_on_pipeline(pipeline: Any, processor: Any) -> None:
    """What a pipeline's `set_attn_processor` does."""
    if isinstance(processor, FastAttnProcessor):
        accelerate(pipeline, processor.config)
        return
    for _, model in unwrapped_denoisers(pipeline):
        model.set_attn_processor(processor)  # type: ignore[operator]
