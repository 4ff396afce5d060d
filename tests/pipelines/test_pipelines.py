"""Real pipelines around tiny denoisers: `set_attn_processor`, the noise levels they make, offloading, LoRA files.

Prompts come as embeddings and results as latents: text encoders and autoencoders, which fastdit never sees, are left out.
"""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from chequer import SPARSE
from families import BY_NAME, padded, r

import fastdit
from fastdit import FastAttnProcessor
from fastdit.core.reference import relative_error
from fastdit.pipelines.videos import Cosmos
from fastdit.runs.clock import Clock

STEPS = 4
WEIGHTS = "pytorch_lora_weights.safetensors"


def make(pipeline: str, scheduler: Any, **parts: Any) -> Any:
    """The pipeline with what is not given left out."""
    cls = getattr(diffusers, pipeline)
    needed = [p.name for p in list(inspect.signature(cls.__init__).parameters.values())[1:] if p.default is p.empty]
    pipe = cls(**dict.fromkeys(needed) | parts | {"scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow(**more: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **more)


def unipc() -> Any:
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def ddim(cls: str = "DDIMScheduler") -> Any:
    return getattr(diffusers, cls)(steps_offset=1, clip_sample=False)


def model(family: str, **more: Any) -> Any:
    """The denoiser of `families`; more: of its configuration."""
    case = BY_NAME[family]
    return type(case)(case.cls, case.config | more, case.call, case.places, case.sites).model()


PICTURE = {"height": 192, "width": 128}
SQUARE = {"height": 128, "width": 128}
TEXT = {"prompt_embeds": r(1, 7, 16), "negative_prompt_embeds": r(1, 7, 16, seed=1)}
LONG = {"prompt_embeds": r(1, 10, 16), "negative_prompt_embeds": r(1, 10, 16, seed=1)}


def masks(length: int, used: int) -> dict[str, Any]:
    return {"prompt_attention_mask": padded(1, length, used), "negative_prompt_attention_mask": padded(1, length, used)}


PIPELINES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "StableDiffusion": lambda: (
        make("StableDiffusionPipeline", ddim(), unet=model("UNet2DCondition"), requires_safety_checker=False), TEXT | SQUARE,
    ),
    "AnimateDiff": lambda: (make("AnimateDiffPipeline", ddim(), unet=model("UNetMotion")), TEXT | SQUARE | {"num_frames": 3}),
    "StableDiffusion3": lambda: (
        make("StableDiffusion3Pipeline", flow(), transformer=model("SD3")),
        TEXT | PICTURE | {"pooled_prompt_embeds": r(1, 8), "negative_pooled_prompt_embeds": r(1, 8)},
    ),
    "Flux": lambda: (
        make("FluxPipeline", flow(), transformer=model("Flux", in_channels=16)),
        PICTURE | {"prompt_embeds": r(1, 7, 16), "pooled_prompt_embeds": r(1, 8)},
    ),
    "PixArtSigma": lambda: (
        make("PixArtSigmaPipeline", diffusers.DPMSolverMultistepScheduler(), transformer=model("PixArt")),
        TEXT | PICTURE | masks(7, 4) | {"negative_prompt": None, "use_resolution_binning": False},
    ),
    "QwenImage": lambda: (
        make("QwenImagePipeline", flow(), transformer=model("QwenImage", in_channels=16, out_channels=4)),
        LONG | PICTURE | {
            "prompt_embeds_mask": padded(1, 10, 6).bool(), "negative_prompt_embeds_mask": padded(1, 10, 6).bool(),
            "true_cfg_scale": 3.0,
        },
    ),
    "AuraFlow": lambda: (make("AuraFlowPipeline", flow(), transformer=model("AuraFlow")), TEXT | PICTURE | masks(7, 7)),
    "Lumina2": lambda: (
        make("Lumina2Pipeline", flow(), transformer=model("Lumina2")),
        TEXT | PICTURE | {key: mask.bool() for key, mask in masks(7, 4).items()},
    ),
    "CogView4": lambda: (make("CogView4Pipeline", flow(), transformer=model("CogView4")), TEXT | PICTURE),
    "Wan": lambda: (
        make("WanPipeline", unipc(), transformer=model("Wan"), transformer_2=model("Wan"), boundary_ratio=0.8),
        TEXT | SQUARE | {"num_frames": 9},
    ),
    "SkyReelsV2": lambda: (
        make("SkyReelsV2Pipeline", unipc(), transformer=model("SkyReelsV2")), TEXT | SQUARE | {"num_frames": 9},
    ),
    "HunyuanVideo": lambda: (
        make("HunyuanVideoPipeline", flow(), transformer=model("HunyuanVideo")),
        SQUARE | {
            "prompt_embeds": r(1, 10, 16), "prompt_attention_mask": padded(1, 10, 6), "pooled_prompt_embeds": r(1, 8),
            "num_frames": 9,
        },
    ),
    "CogVideoX": lambda: (
        make("CogVideoXPipeline", ddim("CogVideoXDDIMScheduler"), transformer=model("CogVideoX")),
        TEXT | SQUARE | {"num_frames": 9},
    ),
    "LTX": lambda: (
        make("LTXPipeline", flow(), transformer=model("LTXVideo")),
        TEXT | masks(7, 4) | {"height": 256, "width": 256, "num_frames": 17},
    ),
    "Mochi": lambda: (
        make("MochiPipeline", flow(invert_sigmas=True), transformer=model("Mochi")),
        LONG | SQUARE | {key: mask.bool() for key, mask in masks(10, 6).items()} | {"num_frames": 13},
    ),
    "Allegro": lambda: (
        make("AllegroPipeline", diffusers.EulerAncestralDiscreteScheduler(), transformer=model("Allegro")),
        TEXT | SQUARE | masks(7, 4) | {"negative_prompt": None, "num_frames": 12},
    ),
    "Kandinsky5": lambda: (
        make("Kandinsky5T2VPipeline", flow(), transformer=model("Kandinsky5")),
        SQUARE | {
            "prompt_embeds_qwen": r(1, 7, 16), "prompt_embeds_clip": r(1, 8), "prompt_cu_seqlens": torch.tensor([0, 7]),
            "guidance_scale": 1.0, "num_frames": 9,
        },
    ),
}  # fmt: skip
CUT = ("QwenImage", "HunyuanVideo", "Lumina2")
"""Pipelines whose padded text is cut: sums in another order."""
every = pytest.mark.parametrize("pipeline", PIPELINES)


def draw(pipe, arguments):
    seed = torch.Generator().manual_seed(0)
    return pipe(**arguments, num_inference_steps=STEPS, output_type="latent", generator=seed, return_dict=False)[0]


@every
def test_one_line_on_a_real_pipeline(pipeline):
    """`exact` draws what stock draws; a sparse preset runs sparse in every layer and step; restored, it draws that again."""
    pipe, arguments = PIPELINES[pipeline]()
    stock = draw(pipe, arguments)
    assert bool(stock.isfinite().all())
    pipe.set_attn_processor(FastAttnProcessor("exact"))
    exact = draw(pipe, arguments)
    assert relative_error(exact, stock) < 1e-5 if pipeline in CUT else torch.equal(exact, stock)

    pipe.set_attn_processor(FastAttnProcessor(SPARSE))
    sparse = draw(pipe, arguments)
    report = fastdit.report(pipe)
    assert {site.ran for site in report.sites} == {"sparse"}, {site.name: site.reason for site in report.sites}
    assert report.density < 0.7
    assert relative_error(sparse, stock) > 1e-5
    levels = sorted({round(ran.sigma, 4) for _, ran in report.calls}, reverse=True)
    assert len(levels) == STEPS
    assert 1 >= levels[0] > 0.7
    assert 0 <= levels[-1] < 0.9
    assert {ran.step: round(ran.sigma, 4) for _, ran in report.calls} == dict(enumerate(levels))
    fastdit.restore(pipe)
    assert torch.equal(draw(pipe, arguments), stock)


def test_two_denoisers_share_the_steps_of_a_run():
    pipe, arguments = PIPELINES["Wan"]()
    fastdit.accelerate(pipe, SPARSE)
    draw(pipe, arguments)
    steps = [{ran.step for site, ran in fastdit.report(pipe).calls if site // 2 == half} for half in range(2)]
    assert steps[0]
    assert steps[1]
    assert sorted([*steps[0], *steps[1]]) == list(range(STEPS))


@pytest.mark.parametrize("order", ["offloaded first", "fastdit first"])
@pytest.mark.parametrize("how", ["model", "group"])
@pytest.mark.parametrize("pipeline", ["StableDiffusion", "Wan", "Flux"])
def test_offloaded_pipelines(pipeline, how, order):
    """`enable_model_cpu_offload` and `enable_group_offload` of the pipeline itself, to the only device there is here."""
    if how == "group" and diffusers.__version__.startswith("0.37"):
        pytest.skip("diffusers 0.37 offloads groups only where there is an accelerator")
    pipe, arguments = PIPELINES[pipeline]()
    fastdit.accelerate(pipe, SPARSE)
    expected = draw(pipe, arguments)
    fastdit.restore(pipe)

    def offload():
        if how == "model":
            pipe.enable_model_cpu_offload(device="cpu")
        else:
            pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")

    if order == "offloaded first":
        offload()
    fastdit.accelerate(pipe, SPARSE)
    if order == "fastdit first":
        offload()
    assert torch.equal(draw(pipe, arguments), expected)
    assert fastdit.report(pipe).density < 1
    pipe.maybe_free_model_hooks()
    assert torch.equal(draw(pipe, arguments), expected)


@pytest.mark.parametrize("pipeline", ["Wan", "Flux", "StableDiffusion"])
def test_lora_files(pipeline, tmp_path):
    """Weights saved from an accelerated pipeline load into one, and say the same there as in stock diffusers."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe, arguments = PIPELINES[pipeline]()
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    trained = getattr(pipe, part)
    fastdit.accelerate(pipe, "exact")
    torch.manual_seed(3)
    trained.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.save_lora_weights(tmp_path, **{f"{part}_lora_layers": get_peft_model_state_dict(trained)})
    with_lora = draw(pipe, arguments)

    stock, _ = PIPELINES[pipeline]()
    plain = draw(stock, arguments)
    stock.load_lora_weights(tmp_path, weight_name=WEIGHTS)
    expected = draw(stock, arguments)
    assert relative_error(plain, expected) > 1e-4
    assert relative_error(with_lora, expected) < 1e-5

    fresh, _ = PIPELINES[pipeline]()
    fastdit.accelerate(fresh, "exact")
    fresh.load_lora_weights(tmp_path, weight_name=WEIGHTS)
    assert relative_error(draw(fresh, arguments), expected) < 1e-5
    fresh.unload_lora_weights()
    assert relative_error(draw(fresh, arguments), plain) < 1e-6


def cosmos_level(timestep: torch.Tensor, **config: Any) -> float:
    call = {"hidden_states": torch.zeros(1, 4, 3, 8, 8), "timestep": timestep}
    return Cosmos().read(model("Cosmos", **config), call).sigma.amax().item()


@pytest.mark.parametrize("steps", [10, 36, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_step_of_cosmos_1_has_a_level_of_its_own(steps: int, dtype: torch.dtype) -> None:
    """ln σ / 4 runs from 1.1 to -1.55, and the pipeline hands it on in the denoiser's dtype."""
    scheduler = diffusers.EDMEulerScheduler(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(steps)
    levels = [cosmos_level(t.expand(1).to(dtype)) for t in scheduler.timesteps]
    assert all(0 < after < before < 1 for before, after in itertools.pairwise(levels))
    assert levels == pytest.approx([float(s / (1 + s)) for s in scheduler.sigmas[:steps]], abs=0.008)
    clock = Clock()
    for level in levels:
        clock.observe(level)
    assert (clock.run, clock.step) == (1, steps - 1)


def test_the_level_of_cosmos_2_is_that_of_the_frames_that_are_made() -> None:
    """Cosmos 2.5 gives the frames it is given a level of .1 to the end."""
    levels = [0.9, 0.3, 0.08, 0.02]
    frames = [torch.tensor([0.1, level, level]).view(1, 1, 3, 1, 1) for level in levels]
    assert [cosmos_level(each, extra_pos_embed_type=None) for each in frames] == pytest.approx(levels)
    assert cosmos_level(torch.tensor([0.7]), extra_pos_embed_type=None) == pytest.approx(0.7)
