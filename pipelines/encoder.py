"""The encoder of a denoiser, whose features hardly change from step to step (Faster Diffusion, arXiv 2312.09608).

UNets: everything before the first up block. DiT transformers: the first 18 of 28 blocks (the paper's Table 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from fastdit.planning.adapter import Encoder, Join

SHARE = 18 / 28


def encoder_of(model: nn.Module, depth: int | None = None) -> Encoder:
    """The encoder of a denoiser. depth: number of its blocks, for transformers; default 18/28 of all.

    Raises ValueError for an unknown class, a depth given for a UNet, or a depth that leaves no decoder.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in _ENCODERS:
            return _ENCODERS[cls.__name__](model, depth)
    raise ValueError(
        f"propagate_encoder cannot tell encoder from decoder in {type(model).__name__}; it knows {', '.join(sorted(_ENCODERS))}"
    )


def _unet(model: Any, depth: int | None) -> Encoder:
    if depth is not None:
        raise ValueError(f"depth={depth}: a {type(model).__name__} has its encoder's end at its up blocks; leave depth out")
    parts = [model.conv_in, getattr(model, "transformer_in", None), *model.down_blocks, model.mid_block]
    return Encoder([part for part in parts if part is not None], [], list(_joins(model)))


def _dit(model: Any, depth: int | None) -> Encoder:
    blocks = list(model.transformer_blocks)
    if len(blocks) < 2:
        raise ValueError(f"this {type(model).__name__} has {len(blocks)} block: there is no decoder behind an encoder")
    if depth is None:
        depth = min(max(round(SHARE * len(blocks)), 1), len(blocks) - 1)
    if not 1 <= depth < len(blocks):
        raise ValueError(f"depth={depth} of {len(blocks)} blocks: at least one must be encoder, and one decoder")
    return Encoder([blocks[depth - 1]], blocks[: depth - 1], [])


def _joins(model: Any) -> Iterator[Join]:
    """The convolutions that read a decoder feature joined to a skip; the first reads propagated features only."""
    width = 0
    for block in model.up_blocks:
        for module in block.resnets:
            resnet = getattr(module, "spatial_res_block", module)
            if type(resnet) is not ResnetBlock2D or resnet.upsample is not None or resnet.downsample is not None:
                return  # an unknown way of joining: later joins are unknown too
            channels = resnet.norm1.num_channels // resnet.norm1.num_groups
            varies = -(-width // channels) * channels  # a whole normalization group varies with one channel
            if varies < resnet.norm1.num_channels:  # with one group, every channel varies
                yield Join(resnet.conv1, varies)
            if resnet.conv_shortcut is not None:
                yield Join(resnet.conv_shortcut, width)
            width = resnet.conv2.out_channels


_ENCODERS: dict[str, Callable[[Any, int | None], Encoder]] = {
    "UNet2DConditionModel": _unet,
    "UNetMotionModel": _unet,
    "UNet3DConditionModel": _unet,
    "UNetSpatioTemporalConditionModel": _unet,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _dit,
}
