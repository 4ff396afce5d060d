"""A tiny denoiser of every family's real class, with random weights, one call of it, and where its tokens are known to sit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

Grid = tuple[int, int, int]
VIDEO: Grid = (3, 8, 8)
IMAGE: Grid = (1, 12, 8)


@dataclasses.dataclass(frozen=True)
class Case:
    """places: for sequences of so many tokens, the grid and the tokens before and behind it; sites: how many are sparse.

    axes: of the latents in argument `latents`, to find where one latent's token lies; "" where the model mixes them first.
    trims: padding is cut, so that `exact` differs from stock by the order of sums.
    """

    cls: str
    config: dict[str, Any]
    call: Callable[[], dict[str, Any]]
    places: dict[int, tuple[Grid, int, int]]
    sites: int
    axes: str = "BCTHW"
    latents: str = "hidden_states"
    trims: bool = False

    def model(self) -> Any:
        torch.manual_seed(0)
        model: Any = getattr(diffusers, self.cls)(**self.config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():  # zero-initialised gates and outputs would hide every mistake
                if not bool(parameter.any()) or parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model.eval().requires_grad_(False)


def r(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def step(value: float = 500.0, batch: int = 2) -> Tensor:
    return torch.full((batch,), value)


def padded(batch: int, length: int, used: int) -> Tensor:
    """A text mask: every prompt uses its first tokens."""
    mask = torch.zeros(batch, length)
    mask[:, :used] = 1
    return mask


def ids(grid: Grid, columns: int = 3) -> Tensor:
    """Coordinates of packed image tokens as Flux's pipelines make them."""
    _, h, w = grid
    found = torch.zeros(h, w, columns)
    found[..., 1] += torch.arange(h)[:, None]
    found[..., 2] += torch.arange(w)
    return found.reshape(h * w, columns)


HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}
V, I = 3 * 8 * 8, 12 * 8  # noqa: E741
LATENT = (16, 16)

wan = HEADS | {
    "in_channels": 4, "out_channels": 4, "text_dim": 16, "freq_dim": 32, "ffn_dim": 64, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip
hunyuan = HEADS | {
    "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1,
    "text_embed_dim": 16, "rope_axes_dim": (8, 12, 12),
}  # fmt: skip
hunyuan1 = hunyuan | {"num_single_layers": 1, "pooled_projection_dim": 8}
flux = HEADS | {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 16,
    "axes_dims_rope": (8, 12, 12),
}
ltx = HEADS | {"in_channels": 4, "out_channels": 4, "cross_attention_dim": 64, "num_layers": 2, "caption_channels": 16}
ltx2 = ltx | {
    "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 16,
    "audio_cross_attention_dim": 32,
}  # fmt: skip
cogvideox = HEADS | {
    "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 16, "num_layers": 2, "sample_width": 16,
    "sample_height": 16, "sample_frames": 9, "max_text_seq_length": 7,
}  # fmt: skip
unet = {
    "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": 16,
}  # fmt: skip

helios = {key: value for key, value in wan.items() if key != "rope_max_seq_len"} | {"rope_dim": (8, 12, 12)}
h3 = HEADS | {
    "hidden_size": 48, "num_layers": 2, "num_refiner_layers": 1, "ffn_dim": 64, "in_channels": 4, "audio_in_channels": 4,
    "text_dim": 16, "freq_dim": 16, "time_embed_hidden_dim": 32, "time_embed_dim": 16, "rope_freq_dim": 4,
}  # fmt: skip
joy = {
    "in_channels": 4, "hidden_size": 64, "num_attention_heads": 2, "text_dim": 16, "num_layers": 2,
    "rope_dim_list": [8, 12, 12],
}  # fmt: skip
fibo2 = {
    "in_channels": 4, "dim": 64, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 16,
    "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 2,
    "gist_min_text_len": 4, "gist_max_text_len": 12, "axes_dims": (8, 12, 12), "axes_lens": (64, 64, 64),
}  # fmt: skip


def wan_call(**more: Any) -> dict[str, Any]:
    return {"hidden_states": r(2, 4, 3, *LATENT), "timestep": step(), "encoder_hidden_states": r(2, 7, 16)} | more


def hunyuan_call(**more: Any) -> dict[str, Any]:
    return {
        "hidden_states": r(2, 4, 3, *LATENT), "timestep": step(), "encoder_hidden_states": r(2, 10, 16),
        "encoder_attention_mask": padded(2, 10, 6),
    } | more  # fmt: skip


def ltx_coords(grid: Grid, frame: int = 0, size: int = 32) -> Tensor:
    """Where tokens of LTX's latents begin, in pixels and seconds, [2, 3, N]; frame: of the clip, where these begin."""
    t, h, w = torch.meshgrid(*(torch.arange(float(side)) for side in grid), indexing="ij")
    begins = torch.stack([(8 * t - 7).clamp(min=0) + frame, size * h, size * w]).flatten(1)
    return (begins / torch.tensor([25.0, 1, 1])[:, None]).expand(2, -1, -1)


def ltx2_coords(grid: Grid, frame: int = 0, size: int = 32) -> Tensor:
    """Of LTX-2, where they end as well, [2, 3, N, 2]; further frames are 8 long each, keyframes too."""
    t, h, w = torch.meshgrid(*(torch.arange(float(side)) for side in grid), indexing="ij")
    times = [8 * t + frame, 8 * t + 8 + frame] if frame else [(8 * t - 7).clamp(min=0), 8 * t + 1]
    sides = [torch.stack([times[i] / 25, size * (h + i), size * (w + i)]).flatten(1) for i in (0, 1)]
    return torch.stack(sides, -1).expand(2, -1, -1, -1)


def ltx_call(*coords: Tensor) -> dict[str, Any]:
    together = torch.cat(coords, 2)
    hidden = r(2, together.shape[2], 4)
    return wan_call(hidden_states=hidden, video_coords=together, encoder_attention_mask=padded(2, 7, 4))


def ltx2_call(*coords: Tensor) -> dict[str, Any]:
    together = torch.cat(coords, 2) if coords else None
    return wan_call(
        hidden_states=r(2, V if together is None else together.shape[2], 4), audio_hidden_states=r(2, 9, 4),
        audio_encoder_hidden_states=r(2, 7, 16), num_frames=3, height=8, width=8, audio_num_frames=9, video_coords=together,
    )  # fmt: skip


def flux_call(columns: int = 3, **more: Any) -> dict[str, Any]:
    return {
        "hidden_states": r(2, I, 4), "encoder_hidden_states": r(2, 7, 16), "timestep": step(0.5),
        "img_ids": ids(IMAGE, columns),
        "txt_ids": torch.zeros(7, columns),
    } | more  # fmt: skip


def image_call(channels: int = 4, text: int = 16, **more: Any) -> dict[str, Any]:
    return {"hidden_states": r(2, channels, 24, 16), "timestep": step(), "encoder_hidden_states": r(2, 7, text)} | more


def sizes() -> dict[str, Tensor]:
    pair = torch.tensor([[24.0, 16.0]] * 2)
    return {"original_size": pair, "target_size": pair, "crop_coords": torch.zeros(2, 2)}


def h3_call(keyframes: int = 0) -> dict[str, Any]:
    """As MiniMaxH3PrepareLayoutStep packs it: text, keyframes, sound in two channels, and the video, whose frames are not
    equally far apart."""
    text, sound, area = 7, 5, 64
    times = [float(text), text + 20.0][:keyframes] + [text + float(t) for t in (0, 1.7, 8.3)]
    at = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1).flatten(0, 1)
    frames = [torch.cat([torch.full((area, 1), t), 4 * at], 1) for t in times]
    words = torch.zeros(text, 3)
    words[:, 0] = torch.arange(text)
    heard = torch.zeros(2 * sound, 3)
    heard[:, 0], heard[sound:, 2] = text + torch.arange(sound).repeat(2), 28.0
    positions = torch.cat([words, *frames[:keyframes], heard, *frames[keyframes:]]).double()
    rows, given = len(positions), text + keyframes * area
    tags = torch.zeros(rows, dtype=torch.long)
    tags[:text], tags[given : given + 2 * sound] = 1, 2
    levels = torch.ones(rows, dtype=torch.long)  # 0: the video's, 1: the sound's, 2: of what is given
    levels[:given], levels[-3 * area :] = 2, 0
    return {
        "hidden_states": r(2, len(times) * area, 16), "audio_hidden_states": r(2, 2 * sound, 4),
        "encoder_hidden_states": r(2, text, 16), "timestep": torch.tensor([0.4, 0.5, 1.0]), "timestep_indices": levels,
        "token_tags": tags, "position_ids": positions,
        **{f"{kind}_indices": (tags == tag).nonzero()[:, 0] for tag, kind in enumerate(("video", "text", "audio"))},
    }  # fmt: skip


def ideogram_call(text: int) -> dict[str, Any]:
    """A prompt as long as its place is; image coordinates begin far from those of text."""
    words = torch.arange(text)[:, None].expand(-1, 3)
    roles = torch.tensor([3] * text + [2] * I).expand(2, -1)
    return {
        "hidden_states": r(2, text + I, 4), "timestep": step(0.5), "encoder_hidden_states": r(2, text + I, 16),
        "position_ids": torch.cat([words, ids(IMAGE).long() + 65536]).expand(2, -1, -1), "indicator": roles,
        "segment_ids": torch.ones_like(roles),
    }  # fmt: skip


def fibo2_call(**more: Any) -> dict[str, Any]:
    return {"hidden_states": r(2, 4, 24, 16), "timestep": step(0.5), "encoder_hidden_states": r(2, 2, 8, 16)} | more


CASES = [
    Case("WanTransformer3DModel", wan, wan_call, {V: (VIDEO, 0, 0)}, 2),
    Case(
        "WanTransformer3DModel", wan | {"image_dim": 8, "added_kv_proj_dim": 64},
        lambda: wan_call(encoder_hidden_states_image=r(2, 257, 8)), {V: (VIDEO, 0, 0)}, 2,
    ),
    Case(
        "WanVACETransformer3DModel", wan | {"vace_layers": [0], "vace_in_channels": 8},
        lambda: wan_call(control_hidden_states=r(2, 8, 3, *LATENT), control_hidden_states_scale=torch.ones(1)),
        {V: (VIDEO, 0, 0)}, 3,
    ),
    Case(
        "WanAnimateTransformer3DModel",
        wan | {
            "in_channels": 12, "latent_channels": 4, "image_dim": 8, "added_kv_proj_dim": 64, "motion_encoder_size": 16,
            "motion_encoder_channel_sizes": {"16": 8, "8": 8, "4": 8}, "motion_style_dim": 8, "motion_dim": 4,
            "motion_encoder_dim": 16, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda: wan_call(
            hidden_states=r(2, 12, 3, *LATENT), encoder_hidden_states_image=r(2, 257, 8),
            pose_hidden_states=r(2, 4, 2, *LATENT), face_pixel_values=r(2, 3, 5, 16, 16),
        ), {V: (VIDEO, 0, 0)}, 2,
    ),
    Case(
        "AnyFlowTransformer3DModel", wan,
        lambda: wan_call(
            hidden_states=r(2, 3, 4, *LATENT), timestep=step().repeat(3, 1).T, r_timestep=step(400.0).repeat(3, 1).T
        ), {V: (VIDEO, 0, 0)}, 2, axes="BTCHW",
    ),
    Case("SkyReelsV2Transformer3DModel", wan, wan_call, {V: (VIDEO, 0, 0)}, 2),
    Case("ChronoEditTransformer3DModel", wan, wan_call, {V: (VIDEO, 0, 0)}, 2),
    Case(
        "HunyuanVideoTransformer3DModel", hunyuan1,
        lambda: hunyuan_call(pooled_projections=r(2, 8), guidance=step(6000.0)), {V + 10: (VIDEO, 0, 10)}, 2, trims=True,
    ),
    Case(
        "HunyuanVideo15Transformer3DModel",
        hunyuan | {"text_embed_2_dim": 12, "image_embed_dim": 8, "in_channels": 4, "target_size": 32},
        lambda: hunyuan_call(
            encoder_hidden_states_2=r(2, 5, 12), encoder_attention_mask_2=padded(2, 5, 2), image_embeds=r(2, 4, 8),
        ), {V + 19: (VIDEO, 0, 19)}, 1, trims=True,
    ),
    Case(
        "HunyuanVideoFramepackTransformer3DModel",
        hunyuan1 | {"has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
        lambda: hunyuan_call(
            pooled_projections=r(2, 8), guidance=step(6000.0), image_embeds=r(2, 3, 8), indices_latents=torch.arange(3) + 7,
            latents_clean=r(2, 4, 1, *LATENT), indices_latents_clean=torch.tensor([0]),
            latents_history_2x=r(2, 4, 2, *LATENT), indices_latents_history_2x=torch.tensor([1, 2]),
            latents_history_4x=r(2, 4, 4, *LATENT), indices_latents_history_4x=torch.tensor([3, 4, 5, 6]),
        ), {V + 64 + 16 + 4 + 13: (VIDEO, 84, 13)}, 2, trims=True,
    ),
    Case(
        "HunyuanImageTransformer2DModel",
        {k: v for k, v in hunyuan1.items() if k not in ("patch_size_t", "pooled_projection_dim")}
        | {"patch_size": (2, 2), "rope_axes_dim": (16, 16)},
        lambda: hunyuan_call(hidden_states=r(2, 4, 24, 16)), {I + 10: (IMAGE, 0, 10)}, 2, axes="BCHW", trims=True,
    ),
    Case(
        "CogVideoXTransformer3DModel", cogvideox, lambda: wan_call(hidden_states=r(2, 3, 4, *LATENT)),
        {V + 7: (VIDEO, 7, 0)}, 2, axes="BTCHW",
    ),
    Case(
        "LTXVideoTransformer3DModel", ltx,
        lambda: wan_call(hidden_states=r(2, V, 4), num_frames=3, height=8, width=8, encoder_attention_mask=padded(2, 7, 4)),
        {V: (VIDEO, 0, 0)}, 2, axes="BNC",
    ),
    Case(
        "LTXVideoTransformer3DModel", ltx,  # as LTXConditionPipeline: two frames of conditions before the video
        lambda: ltx_call(ltx_coords((1, 8, 8), 9), ltx_coords((1, 8, 8), 17), ltx_coords(VIDEO)),
        {V + 128: (VIDEO, 128, 0)}, 2, axes="BNC",
    ),
    Case(
        "LTXVideoTransformer3DModel", ltx,  # as LTXI2VLongMultiPromptPipeline: overlapping frames behind the video
        lambda: ltx_call(ltx_coords(VIDEO), ltx_coords((2, 8, 8))) | {"num_frames": 1, "height": 1, "width": 1},
        {V + 128: (VIDEO, 0, 128)}, 2, axes="BNC",
    ),
    Case("LTX2VideoTransformer3DModel", ltx2, ltx2_call, {V: (VIDEO, 0, 0)}, 2, axes="BNC"),
    Case(
        "LTX2VideoTransformer3DModel", ltx2,  # as LTX2ConditionPipeline: sides, and a keyframe behind the video
        lambda: ltx2_call(ltx2_coords(VIDEO), ltx2_coords((1, 8, 8), 9)), {V + 64: (VIDEO, 0, 64)}, 2, axes="BNC",
    ),
    Case(
        "LTX2VideoTransformer3DModel", ltx2,  # as LTX2DFRPipeline: no sides, a keyframe and a reference of half the size
        lambda: ltx2_call(ltx2_coords(VIDEO), ltx2_coords((1, 8, 8), 16), ltx2_coords((3, 4, 4), size=64))
        | dict.fromkeys(("num_frames", "height", "width")), {V + 112: (VIDEO, 0, 112)}, 2, axes="BNC",
    ),
    Case(
        "MochiTransformer3DModel",
        HEADS | {
            "num_layers": 2, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16, "time_embed_dim": 4,
            "max_sequence_length": 10,
        },
        lambda: hunyuan_call(encoder_attention_mask=padded(2, 10, 6).bool()), {V + 6: (VIDEO, 0, 6)}, 2,
    ),
    Case(
        "AllegroTransformer3DModel",
        HEADS | {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_width": 16, "sample_height": 16,
            "sample_frames": 3, "caption_channels": 16, "attention_head_dim": 24,
            "num_attention_heads": 2, "cross_attention_dim": 48,
        },
        lambda: wan_call(
            encoder_hidden_states=r(2, 1, 7, 16)[:, 0], encoder_attention_mask=padded(2, 7, 4), image_rotary_emb=allegro_rope(),
        ), {V: (VIDEO, 0, 0)}, 2,
    ),
    Case(
        "EasyAnimateTransformer3DModel",
        HEADS | {
            "in_channels": 4, "out_channels": 4, "patch_size": 2, "sample_width": 16, "sample_height": 16, "num_layers": 2,
            "mmdit_layers": 1, "time_embed_dim": 8, "text_embed_dim": 16, "text_embed_dim_t5": 16,
        },
        lambda: wan_call(encoder_hidden_states_t5=r(2, 5, 16)), {V + 12: (VIDEO, 12, 0)}, 2,
    ),
    Case(
        "CosmosTransformer3DModel",
        HEADS | {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "mlp_ratio": 2, "text_embed_dim": 16, "adaln_lora_dim": 4,
            "max_size": (4, 32, 32), "concat_padding_mask": False,
        },
        lambda: wan_call(timestep=step(0.5), fps=24), {V: (VIDEO, 0, 0)}, 2,
    ),
    Case(
        "LatteTransformer3DModel",
        HEADS | {
            "in_channels": 4, "out_channels": 8, "num_layers": 1, "cross_attention_dim": 64, "attention_bias": True,
            "sample_size": 16, "patch_size": 2, "norm_type": "ada_norm_single", "num_embeds_ada_norm": 1000,
            "caption_channels": 16,
            "video_length": 3, "norm_elementwise_affine": False,
        }, wan_call, {64: ((1, 8, 8), 0, 0)}, 1, axes="",
    ),
    Case(
        "Kandinsky5Transformer3DModel",
        {
            "in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 4, "model_dim": 64,
            "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (8, 12, 12),
        },
        lambda: {
            "hidden_states": r(1, 3, *LATENT, 4), "timestep": step(batch=1), "encoder_hidden_states": r(1, 7, 16),
            "pooled_projections": r(1, 8), "visual_rope_pos": [torch.arange(s) for s in VIDEO],
            "text_rope_pos": torch.arange(7),
        }, {V: (VIDEO, 0, 0)}, 2, axes="BTHWC",
    ),
    Case(
        "Kandinsky6Transformer3DModel",
        {
            "in_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "out_visual_dim": 4, "model_dim": 64,
            "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (8, 12, 12), "visual_cond": False,
            "in_audio_dim": 4, "out_audio_dim": 4,
        },
        lambda: {
            "hidden_states": r(2, 3, *LATENT, 4), "timestep": step(), "encoder_hidden_states": r(2, 7, 16),
            "pooled_projections": r(2, 8), "audio_hidden_states": r(2, 9, 4),
        }, {V: (VIDEO, 0, 0)}, 2, axes="BTHWC",
    ),
    Case(
        "FluxTransformer2DModel", flux | {"pooled_projection_dim": 8}, lambda: flux_call(pooled_projections=r(2, 8)),
        {I + 7: (IMAGE, 7, 0)}, 2, axes="BNC",
    ),
    Case(
        "LongCatImageTransformer2DModel", flux | {"pooled_projection_dim": 16}, flux_call, {I + 7: (IMAGE, 7, 0)}, 2,
        axes="BNC",
    ),
    Case("OvisImageTransformer2DModel", flux | {"out_channels": 4}, flux_call, {I + 7: (IMAGE, 7, 0)}, 2, axes="BNC"),
    Case(
        "ChromaTransformer2DModel",
        flux | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        lambda: flux_call(attention_mask=torch.cat([padded(2, 7, 4), torch.ones(2, I)], 1).bool()), {I + 7: (IMAGE, 7, 0)}, 2,
        axes="BNC", trims=True,
    ),
    Case(
        "Flux2Transformer2DModel",
        flux | {"axes_dims_rope": (8, 8, 8, 8), "timestep_guidance_channels": 16},
        lambda: flux_call(4, guidance=step(4.0)), {I + 7: (IMAGE, 7, 0)}, 2, axes="BNC",
    ),
    Case(
        "Flux3Transformer2DModel", flux | {"cond_in_channels": 4, "timestep_channels": 16, "axes_dims_rope": (8, 8, 8, 8)},
        lambda: flux_call(4), {I + 7: (IMAGE, 7, 0), I: (IMAGE, 0, 0)}, 2, axes="BNC",
    ),
    Case("BriaTransformer2DModel", flux, lambda: flux_call(timestep=step()), {I + 7: (IMAGE, 7, 0)}, 2, axes="BNC"),
    Case(
        "SD3Transformer2DModel",
        HEADS | {
            "sample_size": 24, "in_channels": 4, "out_channels": 4, "num_layers": 2, "joint_attention_dim": 16,
            "caption_projection_dim": 64, "pooled_projection_dim": 8, "pos_embed_max_size": 24, "dual_attention_layers": (0,),
        }, lambda: image_call(pooled_projections=r(2, 8)), {I + 7: (IMAGE, 0, 7), I: (IMAGE, 0, 0)}, 3, axes="BCHW",
    ),
    Case(
        "PixArtTransformer2DModel",
        HEADS | {"num_layers": 2, "cross_attention_dim": 64, "sample_size": 24, "caption_channels": 16},
        lambda: image_call(
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, encoder_attention_mask=padded(2, 7, 4),
        ), {I: (IMAGE, 0, 0)}, 2, axes="BCHW",
    ),
    Case(
        "DiTTransformer2DModel", HEADS | {"num_layers": 2, "sample_size": 24, "norm_num_groups": 4},
        lambda: {
            "hidden_states": r(2, 4, 24, 24), "timestep": torch.tensor([500, 500]), "class_labels": torch.tensor([1, 2]),
        }, {144: ((1, 12, 12), 0, 0)}, 2, axes="BCHW",
    ),
    Case(
        "HunyuanDiT2DModel",
        HEADS | {
            "in_channels": 4, "patch_size": 2, "sample_size": 24, "hidden_size": 64, "num_layers": 2, "cross_attention_dim": 16,
            "cross_attention_dim_t5": 16, "pooled_projection_dim": 8, "text_len": 7, "text_len_t5": 5,
        },
        lambda: image_call(
            text_embedding_mask=padded(2, 7, 7), encoder_hidden_states_t5=r(2, 5, 16), text_embedding_mask_t5=padded(2, 5, 5),
            image_meta_size=torch.ones(2, 6), style=torch.zeros(2, dtype=torch.long), image_rotary_emb=rope(I, 32),
            hidden_states=r(2, 4, 24, 24),
        ) | {"image_rotary_emb": rope(144, 32)}, {144: ((1, 12, 12), 0, 0)}, 2, axes="BCHW",
    ),
    Case(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 24, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 2, "num_kv_heads": 2,
            "multiple_of": 8,
            "cross_attention_dim": 16,
        },
        lambda: {
            "hidden_states": r(2, 4, 24, 16), "timestep": step(0.5), "encoder_hidden_states": r(2, 7, 16),
            "encoder_mask": padded(2, 7, 7).bool(), "image_rotary_emb": lumina_rope(), "cross_attention_kwargs": {},
        }, {I: (IMAGE, 0, 0)}, 2, axes="BCHW",
    ),
    Case(
        "CogView4Transformer2DModel",
        HEADS | {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4,
            "pos_embed_max_size": 24, "sample_size": 24, "rope_axes_dim": (24, 24),
        }, lambda: image_call() | sizes(), {I + 7: (IMAGE, 7, 0)}, 2, axes="BCHW",
    ),
    Case(
        "CogView3PlusTransformer2DModel",
        HEADS | {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 16, "time_embed_dim": 8, "condition_dim": 4,
            "pos_embed_max_size": 24, "sample_size": 24,
        }, lambda: image_call() | sizes(), {I + 7: (IMAGE, 7, 0)}, 2, axes="BCHW",
    ),
    Case(
        "AuraFlowTransformer2DModel",
        HEADS | {
            "sample_size": 24, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "joint_attention_dim": 16,
            "caption_projection_dim": 64, "pos_embed_max_size": 576,
        }, lambda: image_call(timestep=step(0.5)), {I + 15: (IMAGE, 15, 0)}, 2, axes="BCHW",
    ),
    Case(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 24, "in_channels": 4, "hidden_size": 64, "num_layers": 2, "num_refiner_layers": 1,
            "num_attention_heads": 2, "num_kv_heads": 2, "multiple_of": 8, "axes_dim_rope": (8, 12, 12),
            "axes_lens": (64, 64, 64), "cap_feat_dim": 16,
        },
        lambda: image_call(timestep=step(0.5), encoder_attention_mask=padded(2, 7, 7).bool()),
        {I + 7: (IMAGE, 7, 0), I: (IMAGE, 0, 0)}, 3, axes="BCHW",
    ),
    Case(
        "HiDreamImageTransformer2DModel",
        HEADS | {
            "patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "caption_channels": [16, 16],
            "text_emb_dim": 8, "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (8, 12, 12),
            "max_resolution": (24, 16), "llama_layers": (0, 1), "force_inference_output": True,
        },
        lambda: {
            "hidden_states": r(2, 4, 24, 16), "timesteps": step(), "encoder_hidden_states_t5": r(2, 5, 16),
            "encoder_hidden_states_llama3": r(2, 2, 7, 16).transpose(0, 1), "pooled_embeds": r(2, 8),
        }, {I + 19: (IMAGE, 0, 19)}, 2, axes="BCHW",
    ),
    Case(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4, "dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [8, 12, 12], "axes_lens": [256, 64, 64],
        },
        lambda: {"x": [r(4, 1, 24, 16)], "t": step(0.5, 1), "cap_feats": [r(32, 16)]},
        {I + 32: (IMAGE, 0, 32), I: (IMAGE, 0, 0)}, 2, axes="CTHW", latents="x",
    ),
    Case(
        "QwenImageTransformer2DModel",
        HEADS | {
            "in_channels": 4, "out_channels": 1, "num_layers": 2, "joint_attention_dim": 16, "axes_dims_rope": (8, 12, 12),
        },
        lambda: {
            "hidden_states": r(2, I, 4), "encoder_hidden_states": r(2, 10, 16), "timestep": step(0.5),
            "encoder_hidden_states_mask": padded(2, 10, 6).bool(), "img_shapes": [[IMAGE]] * 2,
        }, {I + 10: (IMAGE, 10, 0)}, 2, axes="BNC", trims=True,
    ),
    Case(
        "UNet2DConditionModel",
        unet | {
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 2,
        },
        lambda: {"sample": r(2, 4, 16, 16), "timestep": torch.tensor(500), "encoder_hidden_states": r(2, 7, 16)},
        {256: ((1, 16, 16), 0, 0), 64: ((1, 8, 8), 0, 0)}, 7, axes="",
    ),
    Case(
        "UNetMotionModel",
        unet | {
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "num_attention_heads": 2,
            "motion_num_attention_heads": 2, "use_motion_mid_block": False,
        },
        lambda: {"sample": r(1, 4, 3, 16, 16), "timestep": torch.tensor(500), "encoder_hidden_states": r(3, 7, 16)},
        {256: ((1, 16, 16), 0, 0), 64: ((1, 8, 8), 0, 0)}, 4, axes="",
    ),
    Case(
        "UNet3DConditionModel",
        unet | {
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            "attention_head_dim": 8,
        },
        lambda: {"sample": r(1, 4, 3, 16, 16), "timestep": torch.tensor(500), "encoder_hidden_states": r(1, 7, 16)},
        {256: ((1, 16, 16), 0, 0), 64: ((1, 8, 8), 0, 0)}, 4, axes="",
    ),
    Case(
        "UNetSpatioTemporalConditionModel",
        {
            "sample_size": 16, "in_channels": 8, "block_out_channels": (32, 64), "layers_per_block": 1,
            "cross_attention_dim": 16,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "num_attention_heads": (2, 2),
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 24, "num_frames": 3,
        },
        lambda: {
            "sample": r(1, 3, 8, 16, 16), "timestep": torch.tensor(0.2), "encoder_hidden_states": r(1, 1, 16),
            "added_time_ids": torch.ones(1, 3),
        }, {256: ((1, 16, 16), 0, 0), 64: ((1, 8, 8), 0, 0)}, 4, axes="",
    ),
    Case("HeliosTransformer3DModel", helios, wan_call, {V: (VIDEO, 0, 0)}, 2),
    Case(
        "HeliosTransformer3DModel", helios,  # with history: 3 + 1 + 1 frames of 64, 16 and 4 tokens
        lambda: wan_call(
            indices_hidden_states=(torch.arange(3) + 12).expand(2, -1), latents_history_short=r(2, 4, 3, *LATENT),
            indices_latents_history_short=(torch.arange(3) + 9).expand(2, -1), latents_history_mid=r(2, 4, 2, *LATENT),
            indices_latents_history_mid=(torch.arange(2) + 7).expand(2, -1), latents_history_long=r(2, 4, 4, *LATENT),
            indices_latents_history_long=(torch.arange(4) + 3).expand(2, -1),
        ), {V + 212: (VIDEO, 212, 0)}, 2,
    ),
    Case(
        "MotifVideoTransformer3DModel",
        HEADS | {
            "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 2, "num_decoder_layers": 1,
            "text_embed_dim": 16, "image_embed_dim": 8, "rope_axes_dim": (8, 12, 12), "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        }, lambda: hunyuan_call(image_embeds=r(2, 3, 8)), {V + 13: (VIDEO, 0, 13), 2 * V: (VIDEO, 0, V)}, 3, trims=True,
    ),
    Case("MiniMaxH3Transformer3DModel", h3, h3_call, {V + 7 + 10: (VIDEO, 17, 0)}, 2, axes="BNC"),
    Case(
        "MiniMaxH3Transformer3DModel", h3, lambda: h3_call(2), {V + 7 + 128 + 10: (VIDEO, 145, 0)}, 2, axes="",  # two keyframes
    ),
    Case(
        "BriaFiboTransformer2DModel",
        {key: value for key, value in flux.items() if key != "axes_dims_rope"}
        | {"axes_dims_rope": [8, 12, 12], "text_encoder_dim": 16},
        lambda: flux_call(timestep=step(), text_encoder_layers=[r(2, 7, 16, seed=1), r(2, 7, 16, seed=2)]),
        {I + 7: (IMAGE, 7, 0)}, 2, axes="BNC",
    ),
    Case(
        "Krea2Transformer2DModel",
        HEADS | {
            "in_channels": 4, "num_layers": 2, "num_key_value_heads": 1, "intermediate_size": 64, "timestep_embed_dim": 16,
            "text_hidden_dim": 16, "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
            "text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
            "axes_dims_rope": (8, 12, 12),
        },
        lambda: {
            "hidden_states": r(2, I, 4), "encoder_hidden_states": r(2, 10, 2, 16), "timestep": step(0.5),
            "position_ids": torch.cat([torch.zeros(10, 3), ids(IMAGE)]), "encoder_attention_mask": padded(2, 10, 6).bool(),
        }, {I + 10: (IMAGE, 10, 0)}, 2, axes="BNC", trims=True,
    ),
    Case(
        "Ideogram4Transformer2DModel",
        HEADS | {
            "in_channels": 4, "num_layers": 2, "intermediate_size": 64, "adaln_dim": 16, "llm_features_dim": 16,
            "mrope_section": (6, 5, 5),
        }, lambda: ideogram_call(7), {I + 7: (IMAGE, 7, 0)}, 2, axes="BNC",
    ),
    Case(
        "JoyImageEditTransformer3DModel", joy, lambda: wan_call(hidden_states=r(2, 4, 1, 24, 16)), {I + 7: (IMAGE, 0, 7)}, 2,
    ),
    Case(
        "JoyImageEditTransformer3DModel", joy,  # a picture to edit, and the one that is drawn
        lambda: wan_call(hidden_states=r(2, 2, 4, 1, 24, 16)), {2 * I + 7: (IMAGE, 0, I + 7)}, 2, axes="",
    ),
    Case(
        "JoyImageEditPlusTransformer3DModel", joy,
        lambda: wan_call(
            hidden_states=r(2, I + 32, 4, 1, 2, 2), shape_list=[[IMAGE, (1, 8, 4)]] * 2,
            encoder_hidden_states_mask=padded(2, 7, 4),
        ), {I + 39: (IMAGE, 0, 39)}, 2, axes="BNC", trims=True,
    ),
    Case(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 64, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 64, "in_channels": 4,
            "out_channels": 4, "text_in_dim": 16, "rope_axes_dim": (8, 12, 12),
        },
        lambda: {
            "hidden_states": r(2, 4, 12, 8), "timestep": step(), "text_bth": r(2, 10, 16), "text_lens": torch.tensor([6, 6]),
        }, {I + 10: (IMAGE, 0, 10)}, 2, axes="BCHW", trims=True,
    ),
    Case(
        "GlmImageTransformer2DModel",
        HEADS | {
            "in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 16, "time_embed_dim": 16,
            "condition_dim": 4, "prior_vq_quantizer_codebook_size": 8,
        },
        lambda: image_call(
            prior_token_id=torch.arange(I).expand(2, -1) % 8, prior_token_drop=torch.zeros(2, I, dtype=torch.bool),
            target_size=torch.tensor([[24.0, 16.0]] * 2), crop_coords=torch.zeros(2, 2),
        ), {I + 7: (IMAGE, 7, 0)}, 2, axes="BCHW",
    ),
    Case("BriaFibo2Transformer2DModel", fibo2, fibo2_call, {I + 6: (IMAGE, 6, 0), I: (IMAGE, 0, 0)}, 3, axes="BCHW"),
    Case(
        "BriaFibo2Transformer2DModel", fibo2,  # a picture to edit
        lambda: fibo2_call(context_latents=[r(2, 4, 16, 8)]), {I + 38: (IMAGE, 6, 32), I + 32: (IMAGE, 0, 32)}, 3, axes="BCHW",
    ),
]  # fmt: skip


CASES = [case for case in CASES if hasattr(diffusers, case.cls)]  # older releases lack some


def rope(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(tokens)[:, None] * torch.logspace(0, -2, dim)
    return angles.cos(), angles.sin()


def allegro_rope() -> Any:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    freqs_t, freqs_h, freqs_w, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(
        embed_dim=24, crops_coords=((0, 0), (8, 8)), grid_size=(8, 8), temporal_size=3
    )
    places = torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long())
    return (freqs_t, freqs_h, freqs_w), places.mT.unsqueeze(1)


def lumina_rope() -> Tensor:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return get_2d_rotary_pos_embed_lumina(32, 24, 24)


def run(model: Any, case: Case, **changed: Any) -> Tensor:
    """The model's answer to its case's call, with arguments changed."""
    out = model(**case.call() | changed, return_dict=False)[0]
    return torch.stack(list(out)) if isinstance(out, (list, tuple)) else out


def name(case: Case) -> str:
    """Of a family, in ids of tests."""
    extra = "-image" if "image_dim" in case.config else ""
    return case.cls.removesuffix("Model").removesuffix("Transformer3D").removesuffix("Transformer2D") + extra


BY_NAME = {name(case): case for case in CASES}
each_family = pytest.mark.parametrize("case", CASES, ids=name)
