"""What a denoiser will see of a clip, known without a call: tokens, text, noise levels, branches.

Sizes come from the pipeline's own scale of its autoencoder and the denoiser's patch; noise levels from a copy of its scheduler.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn

from fastdit.core.layout import Grid
from fastdit.pipelines.family import Family
from fastdit.pipelines.registry import adapter_for
from fastdit.pipelines.unet import UNet
from fastdit.planning.sequence import SequenceSpan
from fastdit.runs.noise_level import TRAIN_TIMESTEPS, Scale

SPACE = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor", "vae_scale_factor")
TIME = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
"""Under which pipelines keep the scale of their autoencoder."""


def family(model: nn.Module) -> Family:
    """The family of a denoiser. Raises ValueError where its tokens are not known without a call."""
    found = adapter_for(model)
    if not isinstance(found, Family) or isinstance(found, UNet):
        raise ValueError(f"fastdit.predict does not know the tokens of a {type(model).__name__} without calling it")
    return found


def arguments(pipe: Any) -> dict[str, Any]:
    """Arguments of the pipeline's call and their defaults."""
    call = getattr(type(pipe), "__call__", None)  # noqa: B004
    found = {} if call is None else inspect.signature(call).parameters
    return {name: None if each.default is each.empty else each.default for name, each in found.items()}


def multiples(pipe: Any, model: Any) -> tuple[int, int, int]:
    """(frames − 1, height, width) must be multiples of these: the autoencoder's scale times the denoiser's patch (h, w)."""
    found = family(model)
    space: int = next((size for name in SPACE if isinstance(size := getattr(pipe, name, None), int)), 8)
    time: int = next((size for name in TIME if isinstance(size := getattr(pipe, name, None), int)), 4)
    _, h, w = found.patch(model)
    return time, space * h, space * w


def grid(pipe: Any, model: Any, height: int, width: int, num_frames: int | None) -> Grid:
    """Tokens (T, H, W) of a clip. Raises ValueError for a size that the pipeline does not draw as it is, naming the nearest."""
    time, h, w = multiples(pipe, model)
    for name, size, step in (("height", height, h), ("width", width, w)):
        if size < step or size % step:
            raise ValueError(f"{name} must be a multiple of {step} for this model, got {size}: nearest is "
                             f"{max(1, round(size / step)) * step}")  # fmt: skip
    if num_frames is None:
        return 1, height // h, width // w
    found = family(model)
    return -(-found.latents(num_frames, time) // found.patch(model)[0]), height // h, width // w


def text_of(pipe: Any, found: Family, text_tokens: int | None) -> tuple[int, int, bool]:
    """(tokens of text in the sequence, of text in all, whether that is exact): the prompt's where padding is cut, which is then
    at most the longest."""
    longest = arguments(pipe).get("max_sequence_length")
    if text_tokens is None:
        text, exact = (longest if isinstance(longest, int) else 0), isinstance(longest, int) and "cut" not in found.mask
    else:
        text, exact = text_tokens, True
    apart = found.text.startswith("apart")
    return (0 if apart else text), text, exact or apart


def span(found: Family, tokens: Grid, text: int) -> SequenceSpan:
    return SequenceSpan(tokens, before=text) if found.text == "before" else SequenceSpan(tokens, after=text)


def branches(pipe: Any, model: Any, guidance: float | None) -> int:
    """Calls of the denoiser in a step, a clip: twice with classifier-free guidance, once where the model was distilled."""
    known = arguments(pipe)
    if "true_cfg_scale" in known or getattr(model.config, "guidance_embeds", False):  # the scale is one of its inputs
        guidance = known.get("true_cfg_scale")
    elif guidance is None:
        guidance = known.get("guidance_scale")
    return 2 if isinstance(guidance, (int, float)) and guidance > 1 else 1


def noise_levels(pipe: Any, found: Family, steps: int, tokens: int) -> list[float] | None:
    """σ of every call of a run, by a copy of the pipeline's scheduler; None where the pipeline has a schedule of its own, or
    its scheduler takes more than the number of steps."""
    if (scheduler := getattr(pipe, "scheduler", None)) is None or found.even is None:
        return None
    scheduler, config = copy.deepcopy(scheduler), scheduler.config
    more: dict[str, Any] = {}
    if getattr(config, "use_dynamic_shifting", False):
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        more["mu"] = low + (high - low) * (tokens - few) / (many - few)
    takes = inspect.signature(scheduler.set_timesteps).parameters
    if found.even and "sigmas" in takes and not getattr(config, "use_flow_sigmas", False):
        more["sigmas"] = torch.linspace(1.0, 1 / steps, steps).tolist()
    try:
        scheduler.set_timesteps(steps, device="cpu", **more)
    except (TypeError, ValueError, AttributeError):
        return None
    times = torch.as_tensor(scheduler.timesteps).double().flatten().tolist()
    if getattr(config, "invert_sigmas", False):
        times = [TRAIN_TIMESTEPS - t for t in times]
    scale = Scale.of(scheduler, times[0] if times else 1.0)
    return [scale(t) for t in times]


def heads_of(model: Any, module: Any) -> tuple[int, int]:
    """(heads, channels of a head) of a site."""
    config, project = model.config, getattr(module, "to_q", None)
    heads = getattr(module, "heads", None) or getattr(module, "num_heads", None) or getattr(config, "num_attention_heads", None)
    if heads is None:
        raise ValueError(f"fastdit.predict does not know the heads of a {type(module).__name__}")
    wide = getattr(project, "out_features", None) or heads * config.attention_head_dim
    return heads, wide // heads
