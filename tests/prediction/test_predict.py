"""What is predicted before a run is what the run then does: tokens, noise levels, density, statistics, sites left dense."""

import inspect
from collections import Counter

import diffusers
import pytest
import torch
from families import BY_NAME, padded, r
from util import tiny_flux_pipeline, tiny_wan_pipeline

import fastdit
from fastdit import Config, Dense, Phase, Reuse, Window
from fastdit.approx import placement
from fastdit.planning.forward_plan import ForwardPlan

STEPS = 7
SQUARE = {"height": 128, "width": 128}
TEXT = {"prompt_embeds": r(1, 7, 16), "negative_prompt_embeds": r(1, 7, 16, seed=1)}
CONFIG = Config(
    (Phase((1.0, 0.9), Dense()), Phase((0.9, 0.0), Window(size=(1, 1, 1)), reuse=Reuse("residual", refresh=3))),
    (1, 4, 4), min_tokens=0,
)  # fmt: skip


def make(pipeline, scheduler, **parts):
    """The pipeline with what is not given left out."""
    cls = getattr(diffusers, pipeline)
    needed = [p.name for p in list(inspect.signature(cls.__init__).parameters.values())[1:] if p.default is p.empty]
    pipe = cls(**dict.fromkeys(needed) | parts | {"scheduler": scheduler})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow(**more):
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **more)


def unipc():
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def model(family, **more):
    case = BY_NAME[family]
    return type(case)(case.cls, case.config | more, case.call, case.places, case.sites).model()


def masks(length, used):
    return {"prompt_attention_mask": padded(1, length, used), "negative_prompt_attention_mask": padded(1, length, used)}


PIPELINES = {
    # pipeline, arguments of a call, and the prompt's tokens, where they count
    "Wan": lambda: (make("WanPipeline", unipc(), transformer=model("Wan")), TEXT | SQUARE | {"num_frames": 9}, None),
    "Wan 2.2": lambda: (
        make("WanPipeline", unipc(), transformer=model("Wan"), transformer_2=model("Wan"), boundary_ratio=0.8),
        TEXT | SQUARE | {"num_frames": 9}, None,
    ),
    "HunyuanVideo": lambda: (
        make("HunyuanVideoPipeline", flow(), transformer=model("HunyuanVideo")),
        SQUARE | {"prompt_embeds": r(1, 10, 16), "prompt_attention_mask": padded(1, 10, 6), "pooled_prompt_embeds": r(1, 8),
                  "num_frames": 9}, 6,
    ),
    "CogVideoX": lambda: (
        make("CogVideoXPipeline", diffusers.CogVideoXDDIMScheduler(), transformer=model("CogVideoX")),
        TEXT | SQUARE | {"num_frames": 9}, 7,
    ),
    "LTX": lambda: (
        make("LTXPipeline", flow(use_dynamic_shifting=True), transformer=model("LTXVideo")),
        TEXT | masks(7, 4) | {"height": 256, "width": 192, "num_frames": 17}, None,
    ),
    "Flux": lambda: (
        make("FluxPipeline", flow(), transformer=model("Flux", in_channels=16)),
        {"height": 192, "width": 128, "prompt_embeds": r(1, 7, 16), "pooled_prompt_embeds": r(1, 8)}, 7,
    ),
    "QwenImage": lambda: (
        make("QwenImagePipeline", flow(), transformer=model("QwenImage", in_channels=16, out_channels=4)),
        {"height": 192, "width": 128, "prompt_embeds": r(1, 10, 16), "prompt_embeds_mask": padded(1, 10, 6).bool(),
         "negative_prompt_embeds": r(1, 10, 16), "negative_prompt_embeds_mask": padded(1, 10, 6).bool()}, 6,
    ),
    "Mochi": lambda: (
        make("MochiPipeline", flow(invert_sigmas=True), transformer=model("Mochi")),
        {"prompt_embeds": r(1, 10, 16), "negative_prompt_embeds": r(1, 10, 16, seed=1), **SQUARE, "num_frames": 13,
         **{key: mask.bool() for key, mask in masks(10, 6).items()}}, 6,
    ),
}  # fmt: skip


@pytest.fixture
def spans(monkeypatch):
    """Where the tokens of every planned call sat."""
    seen, original = [], ForwardPlan.call

    def spy(self, layer, q, keys, kept=None, masks=None):
        seen.append(self.sequence.span(keys, kept))
        return original(self, layer, q, keys, kept, masks)

    monkeypatch.setattr(ForwardPlan, "call", spy)
    return seen


def draw(pipe, arguments, steps=STEPS):
    seed = torch.Generator().manual_seed(0)
    pipe(**arguments, num_inference_steps=steps, output_type="latent", generator=seed, return_dict=False)


def sizes(arguments):
    return {name: arguments[name] for name in ("height", "width", "num_frames") if name in arguments}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_real_run_does_what_was_predicted(name, spans):
    pipe, arguments, text = PIPELINES[name]()
    said = fastdit.predict(pipe, **sizes(arguments), steps=STEPS, preset_or_config=CONFIG, text_tokens=text)
    found = said.forecasts[0]
    fastdit.accelerate(pipe, CONFIG)
    draw(pipe, arguments)
    report = fastdit.report(pipe)
    assert {(span.grid, span.tokens) for span in spans} == {(said.grid, said.tokens)}
    assert said.text == (text or 0)
    if name == "Mochi":  # its pipeline has a schedule of its own
        assert (said.levels, found.density, found.ratio) == (None, None, None)
    else:
        levels = [round(level, 5) for level in dict.fromkeys(said.levels)]
        assert levels == sorted({round(ran.sigma, 5) for _, ran in report.calls}, reverse=True)
        assert 0.2 < found.density < 0.95
        assert found.density == pytest.approx(report.density, abs=1e-6)
        assert found.gpu_bytes == 0
        assert found.host_bytes == report.memory > 0
        assert len(said.levels) == STEPS


def test_statistics_are_those_that_two_branches_hold():
    """3×8×8 tokens, two layers of two heads of 32, cond and uncond, two bytes."""
    pipe, arguments, _ = PIPELINES["Wan"]()
    said = fastdit.predict(pipe, **sizes(arguments), steps=STEPS, preset_or_config=CONFIG)
    assert said.branches == 2
    assert said.forecasts[0].host_bytes == 2 * 2 * 192 * 64 * 2
    assert said.forecasts[0].forms == (("bfloat16", 4),)
    once = fastdit.predict(pipe, **sizes(arguments), steps=STEPS, preset_or_config=CONFIG, guidance=1.0)
    assert once.branches == 1
    assert once.forecasts[0].host_bytes == 2 * 192 * 64 * 2


@pytest.mark.parametrize("kind", ["retention", "ratio", "broadcast"])
@pytest.mark.parametrize("store", ["auto", "int4"])
def test_every_kind_and_form_by_the_byte(kind, store):
    pipe, arguments, _ = PIPELINES["Wan"]()
    config = Config((Phase(policy=Window(size=(1, 1, 1)), reuse=Reuse(kind, 3, store=store)),), (1, 4, 4), min_tokens=0)
    found = fastdit.predict(pipe, **sizes(arguments), steps=STEPS, preset_or_config=config).forecasts[0]
    fastdit.accelerate(pipe, config)
    draw(pipe, arguments)
    report = fastdit.report(pipe)
    assert (found.host_bytes, found.density) == (report.memory, pytest.approx(report.density))


@pytest.mark.parametrize("share", [0.55, 0.3, 0.12])
def test_short_of_memory_it_predicts_what_fits(monkeypatch, share):
    """The forms depend on measured errors, so bytes are near; never more than there is room for."""
    pipe, arguments, _ = PIPELINES["Wan"]()
    full = 2 * 2 * 192 * 64 * 2
    limit = int(share * full)
    handle = fastdit.accelerate(pipe, CONFIG)
    for module in ("fastdit.approx.placement", "fastdit.prediction.walk"):
        monkeypatch.setattr(f"{module}.free_bytes", lambda device: 2 * limit - handle.bytes(device))
    found = fastdit.predict(pipe, **sizes(arguments), steps=STEPS, preset_or_config=CONFIG).forecasts[0]
    draw(pipe, arguments)
    held = fastdit.report(pipe).memory
    assert found.about
    assert set(dict(found.forms)) <= set(placement.FORMS)
    assert 0.6 * limit < found.host_bytes <= limit
    assert held > 0
    assert found.density == pytest.approx(fastdit.report(pipe).density)


def test_no_room_at_all_is_dense(monkeypatch):
    pipe, arguments, _ = PIPELINES["Wan"]()
    monkeypatch.setattr("fastdit.prediction.walk.free_bytes", lambda device: 100)
    found = fastdit.predict(pipe, **sizes(arguments), steps=STEPS, preset_or_config=CONFIG).forecasts[0]
    assert (found.density, found.host_bytes) == (1.0, 0)
    assert any("no room" in reason for reason, _ in found.dense)
    assert found.ratio == 1.0


def test_the_embedded_model():
    """The grid of its usual clip, and every preset; 9,216 tokens as the benchmark's rows say."""
    from fastdit.pipelines import embedded

    pipe = embedded.load()
    said = fastdit.predict(pipe, 256, 256, 33, steps=embedded.STEPS, guidance=1.0)
    assert [each.name for each in said.forecasts] == list(fastdit.PRESETS)
    assert (said.grid, said.tokens, said.text, said.branches) == ((9, 32, 32), 9216, 0, 1)
    assert said["exact"].ratio == 1.0
    assert said["exact"].dense == (("the configuration is dense", 8),)
    assert said["balanced"].host_bytes == 8 * 4 * 9216 * 64 * 2
    assert said["balanced"].density < 0.7
    assert said["balanced"].ratio > 1.2
    assert said["balanced"].sure == "estimated"
    small = fastdit.predict(pipe, 64, 64, 17, steps=8)
    assert small["fast"].dense == (("320 tokens, this CPU needs 2,048", 8),)
    assert (small["fast"].ratio, small["fast"].host_bytes) == (1.0, 0)


def test_text_is_the_longest_the_pipeline_reads():
    pipe = tiny_flux_pipeline()
    assert fastdit.predict(pipe, 64, 64, steps=4).tokens == 4 * 4 + 512
    hunyuan, arguments, _ = PIPELINES["HunyuanVideo"]()
    said = fastdit.predict(hunyuan, **sizes(arguments), steps=4)
    assert (said.text, said.exact) == (256, False)
    assert "at most 256 of text" in str(said)


def test_weights_on_meta_and_the_pipeline_is_left_alone():
    pipe = tiny_wan_pipeline()
    before = fastdit.predict(pipe, 64, 64, 9, steps=5, preset_or_config="fast", gpu="RTX 4090")
    state = dict(vars(pipe.scheduler))
    pipe.transformer.to("meta")
    pipe.transformer.forward = None  # nobody calls it
    said = fastdit.predict(pipe, 64, 64, 9, steps=5, preset_or_config="fast", gpu="RTX 4090")
    assert said == before
    assert {key: value for key, value in vars(pipe.scheduler).items() if value is not state[key]} == {}
    with pytest.raises(ValueError, match="not accelerated"):
        fastdit.report(pipe)


def test_gpus():
    pipe = tiny_wan_pipeline(num_layers=4)
    at = {
        gpu: fastdit.predict(pipe, 512, 512, 33, 20, "balanced", gpu=gpu) for gpu in ("H100", "NVIDIA H200", "rtx 4090", "cpu")
    }
    assert [each["balanced"].sure for each in at.values()] == ["measured", "measured", "estimated", "estimated"]
    assert at["H100"]["balanced"].gpu_bytes == 4 * 2 * 2 * 9216 * 64 * 2
    assert at["H100"]["balanced"].host_bytes == 0
    assert at["rtx 4090"].step_seconds is None  # not measured: only a ratio
    with pytest.raises(ValueError, match=r"unknown gpu 'RTX 1': choose one of cpu, RTX 3090.*H200"):
        fastdit.predict(pipe, 512, 512, 33, 20, gpu="RTX 1")
    with pytest.raises(ValueError, match="unknown gpu"):
        fastdit.predict(pipe, 512, 512, 33, 20, gpu="GeForce RTX 4080 SUPER")
    fps = fastdit.predict(pipe, 512, 512, 33, 20, "fps", gpu="A100")["fps"]
    assert fps.dense == (("A100 has no FP8", 4),)


def test_what_is_unknown_is_said():
    pipe = tiny_wan_pipeline()
    dynamic = Config((Phase(policy=fastdit.policies.policy_from_dict({"name": "top_mass", "density": 0.25})),), min_tokens=0)
    found = fastdit.predict(pipe, 64, 64, 9, 5, dynamic).forecasts[0]
    assert (found.density, found.ratio, found.sure) == (None, None, "unknown")
    assert "decides while it draws" in found.why
    pipe.scheduler = None
    said = fastdit.predict(pipe, 64, 64, 9, 5)
    assert said.levels is None
    assert {each.speed for each in said.forecasts} == {"unknown"}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"height": 100}, "height must be a multiple of 16 for this model, got 100: nearest is 96"),
        ({"width": 0}, "width must be a multiple of 16 for this model, got 0: nearest is 16"),
        ({"num_frames": 10}, "num_frames must be 4k \\+ 1 for this model, got 10: nearest is 9"),
        ({"steps": 0}, "steps must be a whole number from 1 up, got 0"),
        ({"preset_or_config": "quick"}, "unknown preset 'quick'"),
        ({"memory": 0}, "memory must be above 0 GB"),
    ],
)
def test_mistakes_name_the_remedy(more, says):
    with pytest.raises(ValueError, match=says):
        fastdit.predict(tiny_wan_pipeline(), **{"height": 64, "width": 64, "num_frames": 9, "steps": 5} | more)


def test_a_unet_is_refused():
    pipe = make(
        "StableDiffusionPipeline", diffusers.DDIMScheduler(), unet=model("UNet2DCondition"), requires_safety_checker=False
    )
    with pytest.raises(ValueError, match="does not know the tokens of a UNet2DConditionModel without calling it"):
        fastdit.predict(pipe, 128, 128)


def test_as_text_and_as_a_dictionary():
    import json

    said = fastdit.predict(tiny_wan_pipeline(), 512, 512, 33, 20, gpu="H200")
    lines = str(said).splitlines()
    assert lines[0].startswith("WanPipeline on H200: 9×32×32 = 9,216 tokens, 20 steps, 2 calls each, about ")
    assert [line.split()[0] for line in lines[2:]] == ["preset", *fastdit.PRESETS]
    line = said.line("balanced")
    assert "\n" not in line
    assert line.startswith("9,216 tokens, balanced: density 0.")
    assert "measured" in line
    assert json.loads(json.dumps(said.to_dict()))["forecasts"][1]["name"] == "balanced"
    assert Counter(each["sure"] for each in said.to_dict()["forecasts"]) == {"measured": 4}
