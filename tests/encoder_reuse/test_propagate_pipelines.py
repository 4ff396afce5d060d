"""Encoder propagation in real pipelines of small random models, in float64: batched decoding, ControlNets, noise, runs."""

import inspect
from dataclasses import replace

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    ControlNetModel,
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    MultiControlNetModel,
    PixArtAlphaPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    StableVideoDiffusionPipeline,
)
from families import BY_NAME, r
from models import state
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import fastdit
from fastdit.core.reference import relative_error
from fastdit.encoder_reuse.propagate import propagation_of


def finish(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.float64)


def vae():
    return AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    ).eval()  # fmt: skip


def stable_diffusion(scheduler=None, control=None):
    """StableDiffusionPipeline, with one or two ControlNets if wanted; prompts come as embeddings."""
    unet = BY_NAME["UNet2DCondition"].model()
    parts = {
        "vae": vae(), "text_encoder": None, "tokenizer": None, "unet": unet,
        "scheduler": scheduler or DDIMScheduler(steps_offset=1, clip_sample=False),
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    if control is None:
        return finish(StableDiffusionPipeline(**parts))
    nets = []
    for seed in range(control):
        torch.manual_seed(seed)
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8,) * 4).eval().requires_grad_(False)
        for layer in [*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out]:
            torch.nn.init.normal_(layer.weight, std=0.2)  # they start at zero, and nothing would be seen
        nets.append(net)
    return finish(
        StableDiffusionControlNetPipeline(controlnet=nets[0] if control == 1 else MultiControlNetModel(nets), **parts)
    )


def draw(pipe, steps=6, seed=0, **more):
    """Latents after a run."""
    with torch.no_grad():
        given = {"prompt_embeds": r(1, 7, 16).double(), "negative_prompt_embeds": r(1, 7, 16, seed=9).double()}
        if isinstance(pipe, StableDiffusionControlNetPipeline):
            picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            given["image"] = [picture, picture.flip(-1)] if isinstance(pipe.controlnet, MultiControlNetModel) else picture
        generator = torch.Generator().manual_seed(seed)
        latents = torch.randn(1, 4, 8, 8, generator=generator, dtype=torch.float64)
        return pipe(
            **given | more, num_inference_steps=steps, latents=latents, height=64, width=64, output_type="latent"
        ).images


def pixart():
    case = BY_NAME["PixArt"]
    return finish(PixArtAlphaPipeline(None, None, vae(), case.model(), DPMSolverMultistepScheduler()))


def draw_pixart(pipe, steps=6):
    text = {
        "prompt_embeds": r(1, 7, 16).double(), "negative_prompt_embeds": r(1, 7, 16, seed=9).double(),
        "prompt_attention_mask": torch.ones(1, 7), "negative_prompt_attention_mask": torch.ones(1, 7),
    }  # fmt: skip
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return pipe(
        prompt=None, negative_prompt=None, **text, num_inference_steps=steps, latents=latents, height=64, width=64,
        output_type="latent", use_resolution_binning=False,
    ).images  # fmt: skip


def dit():
    case = BY_NAME["DiT"]
    return finish(DiTPipeline(replace(case, config=case.config | {"out_channels": 8}).model(), vae(), DDIMScheduler()))


def draw_dit(pipe, steps=6):
    return torch.as_tensor(
        pipe([1], num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np").images
    )


def animatediff():
    """Prompts as embeddings; two frames are enough for the motion modules."""
    unet = BY_NAME["UNetMotion"].model()
    return finish(AnimateDiffPipeline(vae(), None, None, unet, None, DDIMScheduler(steps_offset=1)))


def draw_animatediff(pipe, steps=6):
    latents = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return pipe(
        prompt_embeds=r(1, 7, 16).double(), negative_prompt_embeds=r(1, 7, 16, seed=9).double(), num_frames=3, height=64,
        width=64, num_inference_steps=steps, latents=latents, output_type="latent",
    ).frames  # fmt: skip


def stable_diffusion_xl():
    case = BY_NAME["UNet2DCondition"]
    more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
    unet = replace(case, config=case.config | more).model()
    return finish(
        StableDiffusionXLPipeline(vae(), None, None, None, None, unet, EulerDiscreteScheduler(), add_watermarker=False)
    )


def draw_xl(pipe, steps=6):
    return draw(pipe, steps, pooled_prompt_embeds=r(1, 16).double(), negative_pooled_prompt_embeds=r(1, 16, seed=9).double())


def stable_video():
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=1, num_attention_heads=2, image_size=224,
        patch_size=56,
    )  # fmt: skip
    torch.manual_seed(0)
    coder = AutoencoderKLTemporalDecoder(
        block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4, force_upcast=False
    ).eval()
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0, use_karras_sigmas=True
    )
    encoder = CLIPVisionModelWithProjection(vision).eval()
    unet = BY_NAME["UNetSpatioTemporalCondition"].model()
    return finish(StableVideoDiffusionPipeline(coder, encoder, unet, scheduler, CLIPImageProcessor(size=224, crop_size=224)))


def draw_video(pipe, steps=6):
    latents = torch.randn(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return pipe(
        Image.new("RGB", (64, 64), (200, 30, 90)), height=64, width=64, num_frames=3, num_inference_steps=steps,
        latents=latents, noise_aug_strength=0.0, output_type="latent", generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip


PIPELINES = {
    "StableDiffusion": (stable_diffusion, draw),
    "StableDiffusion, no guidance": (stable_diffusion, lambda pipe, steps=6: draw(pipe, steps, guidance_scale=1.0)),
    "StableDiffusionXL": (stable_diffusion_xl, draw_xl),
    "StableVideo": (stable_video, draw_video),
    "ControlNet": (lambda: stable_diffusion(control=1), draw),
    "two ControlNets": (lambda: stable_diffusion(control=2), draw),
    "AnimateDiff": (animatediff, draw_animatediff),
    "PixArt": (pixart, draw_pixart),
    "DiT": (dit, draw_dit),
}


def denoiser(pipe):
    return getattr(pipe, "unet", None) or pipe.transformer


@pytest.mark.parametrize("family", PIPELINES)
def test_batched_decoding_is_sequential_decoding(family):
    make, run = PIPELINES[family]
    pipe = make()
    before = state(denoiser(pipe))
    stock = run(pipe)
    with fastdit.propagate_encoder(pipe, 1):
        assert torch.equal(run(pipe), stock)
    with fastdit.propagate_encoder(pipe, (0, 1, 4)) as handle:
        sequential = run(pipe)
        assert (handle.counts.calls, handle.counts.encoder, handle.counts.decoder) == (6, 3, 6)
    assert relative_error(sequential, stock) > 1e-4
    with fastdit.propagate_encoder(pipe, (0, 1, 4), batch=None) as handle:
        assert relative_error(run(pipe), sequential) < 1e-6
        assert (handle.counts.calls, handle.counts.encoder, handle.counts.decoder) == (6, 3, 5)  # 2 and 3 together, 5 alone
        if "ControlNet" in family:
            assert handle.counts.control == 3
    assert state(denoiser(pipe)) == before
    assert torch.equal(run(pipe), stock)


def test_batch_is_at_most_what_was_asked():
    pipe = stable_diffusion()
    sizes = []
    pipe.unet.conv_out.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    fastdit.propagate_encoder(pipe, (0, 5), batch=3)
    draw(pipe, 8)
    assert sizes == [2, 6, 2, 2, 4]  # steps 0; 1-3; 4; 5; 6-7, each with both branches of guidance


@pytest.mark.parametrize("nets", [1, 2])
def test_controlnet_runs_at_key_steps_only(nets):
    """Counted inside of it; and the picture is that of residuals held from the key step."""
    pipe = stable_diffusion(control=nets)
    every = [pipe.controlnet] if nets == 1 else list(pipe.controlnet.nets)
    ran, before = [0], state(pipe.controlnet)
    counter = every[0].controlnet_mid_block.register_forward_hook(lambda *_: ran.append(1))
    with fastdit.propagate_encoder(pipe, 3) as handle:
        draw(pipe)
    counter.remove()
    assert (sum(ran), handle.counts.control) == (2, 2)
    assert state(pipe.controlnet) == before


def test_controlnet_that_is_switched_off_midway():
    """control_guidance_end makes the scale 0: the kept residuals are of another scale, so the ControlNet runs again."""
    pipe = stable_diffusion(control=1)
    fastdit.propagate_encoder(pipe, (0,), batch=None)
    ended = draw(pipe, control_guidance_end=0.5)
    handle = propagation_of(pipe.unet)
    assert handle.counts.control == 2
    assert (handle.counts.encoder, handle.counts.decoder) == (1, 3)  # what was decoded ahead was of the other scale
    fastdit.propagate_encoder(pipe, (0,))
    assert relative_error(draw(pipe, control_guidance_end=0.5), ended) < 1e-6
    assert relative_error(draw(pipe), ended) > 1e-3


def test_two_runs_in_a_row_and_one_that_is_interrupted():
    pipe = stable_diffusion()
    with fastdit.propagate_encoder(pipe, (0, 1, 4), batch=None):
        first, other = draw(pipe), draw(pipe, seed=1)

    def stop(pipe, step, time, given):
        if step == 2:
            raise KeyboardInterrupt
        return given

    fastdit.propagate_encoder(pipe, (0, 1, 4), batch=None)
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, seed=1, callback_on_step_end=stop)
    assert torch.equal(draw(pipe), first)
    assert torch.equal(draw(pipe, seed=1), other)


def test_nothing_is_kept_after_a_run():
    pipe = stable_diffusion(control=1)
    handle = fastdit.propagate_encoder(pipe, 3)
    draw(pipe)
    assert not any(branches._found for branches in handle.latest.branches)


def test_another_size_and_guidance_that_ends_midway():
    pipe = stable_diffusion()
    fastdit.propagate_encoder(pipe, (0,), batch=None)

    def end(pipe, step, time, given):
        if step == 2:
            pipe._guidance_scale = 1.0  # from here on one branch only
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[1]
        return given

    found = draw(pipe, callback_on_step_end=end, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])
    handle = propagation_of(pipe.unet)
    assert handle.counts.encoder == 2
    assert bool(found.isfinite().all())
    draw(pipe)
    assert handle.counts.encoder == 1


@pytest.mark.parametrize("solver", [HeunDiscreteScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler])
def test_solvers(solver):
    pipe = stable_diffusion(solver())
    stock = draw(pipe)
    with fastdit.propagate_encoder(pipe, 1):
        assert torch.equal(draw(pipe), stock)
    with fastdit.propagate_encoder(pipe, 2) as handle:
        found = draw(pipe)
        assert handle.counts.encoder == (5 if solver is HeunDiscreteScheduler else 3)
        assert bool(found.isfinite().all())
    with fastdit.propagate_encoder(pipe, 2, batch=None):
        assert relative_error(draw(pipe), found) < 1e-6


@pytest.mark.parametrize("solver", [DDIMScheduler, EulerDiscreteScheduler])
def test_noise_is_injected_in_the_second_half(solver):
    """Into the latents of each later step, as a share of the first ones in units of what the model is given."""
    pipe = stable_diffusion(solver())
    plain = draw(pipe, 8)
    fastdit.propagate_encoder(pipe, 1, noise=0.003)
    assert list(inspect.signature(pipe.scheduler.step).parameters) == list(inspect.signature(solver.step).parameters)[1:]

    def draw_with(noise):
        seen = {}

        def watch(pipe, i, time, given):
            seen[i] = given["latents"]
            return given

        fastdit.propagate_encoder(pipe, 1, noise=noise)
        draw(pipe, 8, callback_on_step_end=watch)
        return seen

    with_noise, without = draw_with(0.5), draw_with(0.0)
    for i in range(3):
        assert torch.equal(with_noise[i], without[i])
    first = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = float(pipe.scheduler.sigmas[4]) if solver is EulerDiscreteScheduler else 0.0
    assert relative_error(with_noise[3] - without[3], 0.5 * (sigma**2 + 1) ** 0.5 * first) < 1e-6
    fastdit.restore(pipe)
    assert "step" not in vars(pipe.scheduler)
    assert torch.equal(draw(pipe, 8), plain)


@pytest.mark.parametrize("first", ["offload", "propagation"])
def test_model_offload(first):
    """accelerate takes its forward off the model after every run and puts it on again: ours must stay."""
    pipe = stable_diffusion(control=1)
    with fastdit.propagate_encoder(pipe, 3):
        expected = draw(pipe)
    if first == "propagation":
        handle = fastdit.propagate_encoder(pipe, 3)
    pipe.enable_model_cpu_offload(device="cpu")
    if first == "offload":
        handle = fastdit.propagate_encoder(pipe, 3)
    for _ in range(2):
        assert torch.equal(draw(pipe), expected)
        assert (handle.counts.encoder, handle.counts.control) == (2, 2)
    fastdit.restore(pipe)
    stock = draw(pipe)
    assert handle.counts.calls == 6
    pipe.remove_all_hooks()
    assert torch.equal(draw(pipe), stock)


def test_noise_follows_a_scheduler_that_is_changed():
    pipe = stable_diffusion()
    fastdit.propagate_encoder(pipe, 1, noise=0.1)
    noisy = draw(pipe)
    old, pipe.scheduler = pipe.scheduler, DDIMScheduler(steps_offset=1, clip_sample=False)
    assert torch.equal(draw(pipe), noisy)
    assert "step" not in vars(old)
    pipe.scheduler = HeunDiscreteScheduler()
    with pytest.raises(ValueError, match="HeunDiscreteScheduler calls the denoiser between steps: noise must be 0"):
        draw(pipe)


def test_pipeline_composes_with_the_attention_processor():
    """Sparse where it runs, the same run after run, and everything given back."""
    pipe = stable_diffusion(control=1).to(torch.float32)
    before = state(pipe.unet), state(pipe.controlnet)
    sparse = fastdit.Config((fastdit.Phase(policy=fastdit.Window(size=(1, 1, 1))),), (1, 4, 4), min_tokens=0, max_density=1)
    pipe.set_attn_processor(fastdit.FastAttnProcessor(sparse))
    fastdit.propagate_encoder(pipe, 3)

    def single(**more):
        picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        return pipe(
            prompt_embeds=r(1, 7, 16), negative_prompt_embeds=r(1, 7, 16, seed=9), image=picture, num_inference_steps=6,
            latents=latents, height=64, width=64, output_type="latent", **more,
        ).images  # fmt: skip

    once = single()
    assert propagation_of(pipe.unet).counts.encoder == 2
    assert 0 < fastdit.report(pipe).density < 1
    assert torch.equal(single(), once)
    fastdit.restore(pipe)
    assert (state(pipe.unet), state(pipe.controlnet)) == before
