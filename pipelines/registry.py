"""The index of model families: which adapter reads which denoiser class."""

from __future__ import annotations

from torch import nn

from fastdit.pipelines import cogvideox, flux, hunyuan, images, ltx, minimax, packed, unet, videos, wan
from fastdit.pipelines.family import Family
from fastdit.planning.adapter import Adapter

_FAMILIES: dict[Family, tuple[str, ...]] = {
    wan.Wan(): (
        "WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel", "SkyReelsV2Transformer3DModel",
        "ChronoEditTransformer3DModel",
    ),
    wan.AnyFlow(): ("AnyFlowTransformer3DModel",),
    wan.Helios(): ("HeliosTransformer3DModel",),
    minimax.MiniMaxH3(): ("MiniMaxH3Transformer3DModel",),
    hunyuan.MotifVideo(): ("MotifVideoTransformer3DModel",),
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
    packed.Fibo(): ("BriaFiboTransformer2DModel",),
    packed.Krea2(): ("Krea2Transformer2DModel",),
    packed.Ideogram4(): ("Ideogram4Transformer2DModel",),
    packed.JoyImage(): ("JoyImageEditTransformer3DModel",),
    packed.JoyImagePlus(): ("JoyImageEditPlusTransformer3DModel",),
    images.Ernie(): ("ErnieImageTransformer2DModel",),
    images.GlmImage(): ("GlmImageTransformer2DModel",),
    images.Fibo2(): ("BriaFibo2Transformer2DModel",),
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

_BLOCK = "it is one block of a UNet: accelerate the UNet"
_SOUND = "it makes sound: there is no grid of a picture or video"
_FEWER = "its queries are the picture's alone, and its keys the text's as well: fewer queries than keys are not made sparse"

HOPELESS = {
    "SanaTransformer2DModel": "its self-attention is linear: nothing in it is quadratic",
    "SanaVideoTransformer3DModel": "its self-attention is linear: nothing in it is quadratic",
    "SanaWMTransformer3DModel": "its self-attention is linear: nothing in it is quadratic",
    "AnyFlowFARTransformer3DModel": "its self-attention is causal by chunks and compiled with its own mask",
    "QwenImage21Transformer2DModel": "its self-attention is causal by blocks, over text and pictures in turns",
    "OmniGenTransformer2DModel": "its self-attention is causal over text",
    "Transformer2DModel": _BLOCK,
    "TransformerTemporalModel": _BLOCK,
    "DreamLiteTransformer2DModel": _BLOCK,
    "Cosmos3OmniTransformer": _FEWER,
    "NucleusMoEImageTransformer2DModel": _FEWER,
    "PRXTransformer2DModel": _FEWER,
    "Kandinsky6SRTransformer3DModel": "its self-attention is block-sparse already (NABLA), with tokens in an order of its own",
    "WanAnimate2Transformer3DModel": "its self-attention has a block mask and a cache of reference frames of its own",
    "SanaWMLTX2RefinerTransformer3DModel": "it attends to a cache of earlier frames, and its arguments do not tell the grid",
    "LTX2VideoDiffusionDecoderModel": "it decodes latents into pixels; it is no denoiser of a pipeline",
    "ConsistencyDecoderVAE": "it decodes latents into pixels; it is no denoiser of a pipeline",
    "PriorTransformer": "it makes an embedding of a picture: its sequence is a prompt's",
    "UVit2DModel": "it draws tokens of a codebook, and has no noise level",
    "UniDiffuserModel": "it draws a picture and a text together, at two noise levels",
    "StableCascadeUNet": "its attention is over 24x24 tokens and text, too few to gain from",
    "Kandinsky3UNet": "its attention is over a few hundred tokens, and text beside them",
    "I2VGenXLUNet": 'nobody has tested it yet: describe it with fastdit.install(model, layout="UNet3DConditionModel")',
    "UNet2DModel": "its attention is over a few hundred tokens",
    "UNetControlNetXSModel": "its layers alternate with those of a ControlNet",
    "AceStepTransformer1DModel": _SOUND,
    "AudioLDM2UNet2DConditionModel": _SOUND,
    "LongCatAudioDiTTransformer": _SOUND,
    "MiniMaxMusic3Transformer1DModel": _SOUND,
    "StableAudio3DiTModel": _SOUND,
    "StableAudioDiTModel": _SOUND,
    "T5FilmDecoder": _SOUND,
    "UNet1DModel": "it is over one axis: there is no grid of a picture or video",
    "RFD4ProteinaTransformer": "it makes proteins: there is no grid of a picture or video",
}
"""Denoisers that cannot be accelerated, and why."""


def is_known(model: nn.Module) -> bool:
    return any(cls.__name__ in ADAPTERS for cls in type(model).__mro__)


def is_hopeless(model: nn.Module) -> bool:
    return any(cls.__name__ in HOPELESS for cls in type(model).__mro__)


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
