"""The index of model families: which adapter reads which denoiser class."""

from __future__ import annotations

from torch import nn

from fastdit.pipelines import cogvideox, flux, hunyuan, images, ltx, unet, videos, wan
from fastdit.pipelines.family import Family
from fastdit.planning.adapter import Adapter

_FAMILIES: dict[Family, tuple[str, ...]] = {
    wan.Wan(): (
        "WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel", "SkyReelsV2Transformer3DModel",
        "ChronoEditTransformer3DModel",
    ),
    wan.AnyFlow(): ("AnyFlowTransformer3DModel",),
    hunyuan.HunyuanVideo(): ("HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel"),
    hunyuan.FramePack(): ("HunyuanVideoFramepackTransformer3DModel",),
    hunyuan.HunyuanImage(): ("HunyuanImageTransformer2DModel",),
    cogvideox.CogVideoX(): ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    ltx.LTX(): ("LTXVideoTransformer3DModel",),
    ltx.LTX2(): ("LTX2VideoTransformer3DModel",),
    videos.Mochi(): ("MochiTransformer3DModel",),
    videos.Allegro(): ("AllegroTransformer3DModel",),
    videos.EasyAnimate(): ("EasyAnimateTransformer3DModel",),
    videos.Cosmos(): ("CosmosTransformer3DModel",),
    videos.Latte(): ("LatteTransformer3DModel",),
    videos.Kandinsky(): ("Kandinsky5Transformer3DModel",),
    videos.Kandinsky6(): ("Kandinsky6Transformer3DModel",),
    flux.Flux(): ("FluxTransformer2DModel",),
    flux.Unpooled(): ("LongCatImageTransformer2DModel", "OvisImageTransformer2DModel"),
    flux.Chroma(): ("ChromaTransformer2DModel",),
    flux.Flux2(): ("Flux2Transformer2DModel",),
    flux.Flux3(): ("Flux3Transformer2DModel",),
    flux.Bria(): ("BriaTransformer2DModel",),
    images.SD3(): ("SD3Transformer2DModel",),
    images.PixArt(): ("PixArtTransformer2DModel",),
    images.DiT(): ("DiTTransformer2DModel", "HunyuanDiT2DModel", "LuminaNextDiT2DModel"),
    images.CogView(): ("CogView4Transformer2DModel", "CogView3PlusTransformer2DModel"),
    images.AuraFlow(): ("AuraFlowTransformer2DModel",),
    images.Lumina2(): ("Lumina2Transformer2DModel",),
    images.HiDream(): ("HiDreamImageTransformer2DModel",),
    images.ZImage(): ("ZImageTransformer2DModel",),
    images.QwenImage(): ("QwenImageTransformer2DModel",),
    unet.UNet(): (
        "UNet2DConditionModel", "UNetMotionModel", "UNet3DConditionModel", "UNetSpatioTemporalConditionModel",
    ),
}  # fmt: skip

ADAPTERS: dict[str, Adapter] = {name: family for family, names in _FAMILIES.items() for name in names}
"""By class name, so that a look-up imports no diffusers model. Subclasses of a known class are found as well."""

HOPELESS = {
    "SanaTransformer2DModel": "its self-attention is linear: nothing in it is quadratic",
    "SanaVideoTransformer3DModel": "its self-attention is linear: nothing in it is quadratic",
    "SanaWMTransformer3DModel": "its self-attention is linear: nothing in it is quadratic",
    "AnyFlowFARTransformer3DModel": "its self-attention is causal by chunks and compiled with its own mask",
    "QwenImage21Transformer2DModel": "its self-attention is causal by blocks, over text and pictures in turns",
    "OmniGenTransformer2DModel": "its self-attention is causal over text",
    "Transformer2DModel": "it is one block of a UNet: accelerate the UNet",
}
"""Denoisers that cannot be accelerated, and why."""


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model. Raises ValueError for a model family that fastdit does not know or cannot accelerate."""
    for cls in type(model).__mro__:
        if cls.__name__ in ADAPTERS:
            return ADAPTERS[cls.__name__]
        if cls.__name__ in HOPELESS:
            raise ValueError(f"fastdit cannot help {type(model).__name__}: {HOPELESS[cls.__name__]}")
    raise ValueError(
        f"fastdit does not know where {type(model).__name__} keeps its tokens: tell it with fastdit.install(model, layout=...)."
        f" Known: {', '.join(sorted(ADAPTERS))}"
    )
