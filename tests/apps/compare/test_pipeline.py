"""`fastdit.compare`: pipelines of pictures and videos, numbers that can be had by hand, and what is left behind."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, StableDiffusionPipeline, guiders
from families import BY_NAME, r
from PIL import Image
from util import modular, tiny_flux_pipeline

import fastdit
from fastdit import Config, Dense, Phase, Report, Window
from fastdit.apps.compare import measure
from fastdit.apps.compare.metrics import psnr, ssim
from fastdit.apps.compare.plot import error_against_speed, ticks
from fastdit.apps.compare.result import ComparisonResult
from fastdit.apps.compare.timed import Comparison, Timed, Variant
from fastdit.apps.render.draw import Clip, clips_of
from fastdit.attach.processor import installed
from fastdit.core.reference import relative_error

HALF = Config((Phase((1.0, 0.85), Dense()), Phase((0.85, 0.0), Window(density=0.3))), tile=(1, 2, 2), min_tokens=0)
NARROW = Config((Phase(policy=Window(size=(1, 1, 1))),), tile=(1, 2, 2), min_tokens=0, max_density=1)
SIZE = {"num_frames": 9, "height": 64, "width": 64}
CALL = SIZE | {"prompt": "a red circle", "negative_prompt": "blue", "num_inference_steps": 4}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The label of every run, as they come."""
    labels: list[str] = []
    real = measure.draw

    def draw(pipe: Any, call: Any, label: str, *rest: Any) -> Any:
        labels.append(label)
        return real(pipe, call, label, *rest)

    monkeypatch.setattr(measure, "draw", draw)
    return labels


def frames(pipe: Any, call: dict[str, Any], seed: int = 0) -> torch.Tensor:
    made = pipe(**call | {"output_type": "np"}, generator=torch.Generator().manual_seed(seed))
    return torch.as_tensor(clips_of(made.frames if hasattr(made, "frames") else made.images)).flatten(0, 1)


def test_numbers_are_those_of_the_users_own_calls(pipe: Any, drawn: list[str], tmp_path: Path) -> None:
    found = fastdit.compare(pipe, CALL, {"half": HALF, "balanced": "balanced"}, seed=3, out=tmp_path)
    assert drawn == ["dense 1/2", "half 1/2", "balanced 1/2", "dense 2/2", "half 2/2"]
    dense, half, balanced = found.rows
    assert (dense["runs"], half["runs"], balanced["runs"]) == (2, 2, 1)
    stock = frames(pipe, CALL, 3)
    with fastdit.accelerate(pipe, HALF):
        fast = frames(pipe, CALL, 3)
        density = fastdit.report(pipe).density
    assert half["psnr_db"] == pytest.approx(psnr(fast, stock))
    assert half["ssim"] == pytest.approx(ssim(fast, stock))
    assert half["flicker"] == pytest.approx(float(fast.diff(dim=0).abs().mean() - stock.diff(dim=0).abs().mean()), abs=1e-7)
    assert half["density"] == pytest.approx(density)
    assert [row["steps"] for row in half["velocity"]] == [2, 2]  # σ: 1, .9, .75, .5
    assert half["velocity"][0]["error"] == 0 < half["velocity"][1]["error"] == half["velocity_error"] < 1
    assert half["ratio"] == pytest.approx(dense["seconds"] / half["seconds"])
    assert half["seconds"] <= half["median_s"] <= half["seconds"] * (1 + half["spread"])
    assert half["whole_s"] > half["seconds"]
    assert half["peak_bytes"] > 2**20
    assert balanced["stayed_dense"] == "48 tokens, this CPU needs 2,048"
    assert balanced["identical"]
    assert found.verdict.startswith("`half`: ")
    assert found.verdict.endswith("; `balanced` stayed dense: 48 tokens, this CPU needs 2,048")
    assert str(found).splitlines()[0] == found.verdict
    assert sorted(path.name for path in tmp_path.iterdir()) == ["compare-plot.png", "compare-sheet.png", "compare.json"]
    assert json.loads(found.files["json"].read_text()) == json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert found.to_dict()["each"][0]["call"]["num_frames"] == 9
    assert Image.open(found.files["sheet"]).height == 3 * (16 + 128 + 4) + 4
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks


def test_a_generator_is_copied_and_left_as_it_is(pipe: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    state, own = generator.get_state(), torch.get_rng_state()
    found = fastdit.compare(pipe, CALL | {"generator": generator}, {"half": HALF}, repeats=1)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), own)
    assert np.array_equal(found.comparisons[0].dense.clip.frames, frames(pipe, CALL, 3))


def test_pictures_of_several_prompts() -> None:
    pipe, config = tiny_flux_pipeline(), replace(HALF, tile=(1, 2, 2), max_density=1)
    call = {"prompt": ["a red circle", "a blue square"], "height": 128, "width": 128, "num_inference_steps": 3}
    found = fastdit.compare(pipe, call, config, repeats=1)
    assert found.comparisons[0].dense.clip.clips.shape == (2, 1, 128, 128, 3)
    row = found.rows[1]
    stock = frames(pipe, call)
    with fastdit.accelerate(pipe, config):
        assert row["psnr_db"] == pytest.approx(psnr(frames(pipe, call), stock))
    assert row["flicker"] is None
    assert (row["name"], row["runs"], row["spread"]) == ("custom", 1, None)
    assert found.comparisons[0].tokens == 64 + 512


def test_latents_are_not_decoded(pipe: Any, tmp_path: Path) -> None:
    call = CALL | {"output_type": "latent", "return_dict": False}
    with torch.no_grad():
        (stock,) = pipe(**call, generator=torch.Generator().manual_seed(0))
        with fastdit.accelerate(pipe, HALF):
            (fast,) = pipe(**call, generator=torch.Generator().manual_seed(0))
    pipe.vae.decode = None  # it would fail
    found = fastdit.compare(pipe, call, [HALF], repeats=1, out=tmp_path)
    row = found.rows[1]
    assert row["latent_error"] == pytest.approx(relative_error(fast, stock))
    assert (row["psnr_db"], row["ssim"], row["flicker"]) == (None, None, None)
    assert sorted(found.files) == ["json", "plot"]
    assert "SSIM" not in found.verdict


def test_a_modular_pipeline() -> None:
    pipe = modular(guiders.ClassifierFreeGuidance(guidance_scale=4.0))
    found = fastdit.compare(pipe, CALL | {"output": "videos"}, [NARROW], repeats=1)
    row = found.rows[1]
    assert found.comparisons[0].dense.clip.clips.shape == (1, 9, 64, 64, 3)
    assert row["stayed_dense"] is None
    assert 0 < row["velocity_error"] < 1
    assert row["latent_error"] is None  # it shows none


def coder() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
    ).eval()  # fmt: skip


def test_a_unet_whose_noise_level_is_the_schedulers() -> None:
    pipe = StableDiffusionPipeline(
        coder(), None, None, BY_NAME["UNet2DCondition"].model(), DDIMScheduler(steps_offset=1, clip_sample=False), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt_embeds": r(1, 7, 16), "negative_prompt_embeds": r(1, 7, 16, seed=9), "height": 64, "width": 64}
    config = Config((Phase((1.0, 0.6), Dense()), *NARROW.phases), NARROW.tile, min_tokens=0, max_density=1)
    found = fastdit.compare(pipe, call | {"num_inference_steps": 4}, {"late": config}, repeats=1)
    row = found.rows[1]
    assert [phase["steps"] for phase in row["velocity"]] == [1, 3]  # timesteps 751, 501, 251, 1
    assert row["velocity"][0]["error"] == 0 < row["velocity"][1]["error"]


def test_a_pipeline_that_shows_no_steps() -> None:
    case = BY_NAME["DiT"]
    pipe = DiTPipeline(replace(case, config=case.config | {"out_channels": 8}).model(), coder(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    found = fastdit.compare(pipe, {"class_labels": [1], "num_inference_steps": 3}, [NARROW], repeats=2)
    assert found.rows[1]["runs"] == 2
    assert found.rows[1]["psnr_db"] is not None
    assert found.rows[1]["velocity_error"] > 0


def test_what_was_accelerated_is_accelerated_again(pipe: Any) -> None:
    handle = fastdit.accelerate(pipe, NARROW)
    found = fastdit.compare(pipe, CALL, [HALF], repeats=1)
    assert found.rows[0]["name"] == "dense"
    assert fastdit.report(pipe).config == NARROW
    fastdit.restore(pipe)
    del handle
    kind = type(pipe.transformer.blocks[0].attn1.processor)
    fastdit.compare(pipe, CALL, [HALF], repeats=1)
    assert type(pipe.transformer.blocks[0].attn1.processor) is kind


def test_a_described_model_stays_described(pipe: Any) -> None:
    def layout(call: dict[str, Any]) -> fastdit.Facts:
        t, h, w = call["hidden_states"].shape[2:]
        return fastdit.Facts((t, h // 2, w // 2), call["timestep"] / 1000)

    known = fastdit.compare(pipe, CALL, [HALF], repeats=1).rows[1]
    kind = type(pipe.transformer)
    pipe.transformer.__class__ = type("Mine", kind.__bases__, dict(vars(kind)))  # of no known class
    with pytest.raises(ValueError, match="does not know where Mine keeps its tokens"):
        fastdit.compare(pipe, CALL, [HALF])
    fastdit.install(pipe.transformer, layout, NARROW)
    adapter = installed(pipe.transformer).adapter
    found = fastdit.compare(pipe, [CALL, CALL], [HALF], repeats=1)
    assert installed(pipe.transformer).adapter is adapter
    assert found.rows[1]["psnr_db"] == pytest.approx(known["psnr_db"])


def test_a_compiled_denoiser(pipe: Any) -> None:
    """Each run of a configuration is warmed up, since attaching it compiles again."""
    plain = fastdit.compare(pipe, CALL, [HALF], repeats=1).rows[1]
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    found = fastdit.compare(pipe, CALL, [HALF], repeats=2).rows[1]
    assert found["velocity_error"] == pytest.approx(plain["velocity_error"], rel=1e-3)
    assert found["psnr_db"] == pytest.approx(plain["psnr_db"], abs=0.1)


def test_interrupted_keeps_what_was_measured(pipe: Any, tmp_path: Path) -> None:
    """By the user's own callback, in the second configuration."""
    seen = 0

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal seen
        seen += 1
        if seen > 10:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        fastdit.compare(pipe, CALL | {"callback_on_step_end": stop}, {"half": HALF, "narrow": NARROW}, out=tmp_path)
    assert seen == 11  # four steps of dense, four of half
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert [(row["name"], row["runs"]) for row in rows] == [("dense", 1), ("half", 1)]
    with pytest.raises(ValueError, match="is not accelerated"):
        fastdit.report(pipe)


def test_presets_by_name_by_file_and_by_value(pipe: Any, tmp_path: Path) -> None:
    profile = tmp_path / "mine.json"
    profile.write_text(json.dumps({"config": HALF.to_dict(), "measured": 1}))
    found = fastdit.compare(pipe, [CALL, CALL | {"prompt": "a blue square"}], ["exact", profile, NARROW, HALF], repeats=1)
    assert list(found.configs) == ["exact", "mine", "custom", "custom 2"]
    assert list(found.configs.values()) == [Config(), HALF, NARROW, HALF]
    assert [row["calls"] for row in found.rows] == [2] * 5
    mine, again = found.rows[2], found.rows[4]
    assert mine["psnr_db"] == again["psnr_db"] > found.rows[3]["psnr_db"]
    first, second = (variant["rows"][2]["psnr_db"] for variant in found.to_dict()["each"])
    assert mine["psnr_db"] == pytest.approx((first + second) / 2)
    assert first != second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"call": "a red ball"}, "call must be a dictionary of the pipeline's arguments"),
        ({"call": CALL | {"frames": 9}}, "WanPipeline takes no frames: it takes prompt"),
        ({"presets": "quick"}, "unknown preset 'quick'"),
        ({"presets": "quick.json"}, "cannot read quick.json"),
        ({"presets": None}, "a preset's name, a JSON file or a fastdit.Config"),
        ({"presets": []}, "at least one"),
        ({"presets": ["fast", "fast"]}, "'fast' is named twice"),
        ({"presets": {"dense": "fast"}}, "none of that name"),
        ({"repeats": 0}, "repeats must be a whole number from 1 up"),
        ({"pipe": torch.nn.Linear(1, 1)}, "this needs the pipeline"),
        ({"pipe": object()}, "object has no denoiser"),
        ({"out": __file__}, "cannot write into"),
    ],
)
def test_mistakes_are_named_before_anything_is_drawn(pipe: Any, drawn: list[str], change: dict[str, Any], message: str) -> None:
    given = {"pipe": pipe, "call": CALL, "presets": "fast", "out": None} | change
    with pytest.raises(ValueError, match=message):
        fastdit.compare(given.pop("pipe"), given.pop("call"), **given)
    assert drawn == []


def test_a_wrong_result_is_a_runtime_error(pipe: Any) -> None:
    pipe.vae.post_quant_conv.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the dense run decoded to NaN"):
        fastdit.compare(pipe, CALL, [HALF])


def timed(kind: Any, *seconds: float, **more: Any) -> Any:
    stages = [{"text": 1.0 + i, "denoise": each, "decode": 2.0} for i, each in enumerate(seconds)]
    return kind(Clip(None, None, stages[0]), stages, 2**30, **more)


def test_the_verdict_and_the_sums() -> None:
    """Of numbers that are given: two calls of one configuration."""
    found = ComparisonResult({"fast": HALF}, 2, {"pipeline": "WanPipeline"})
    for scale, error in ((1.0, 0.04), (2.0, 0.06)):
        report = Report(HALF, 0.5, (), (), 0, ())
        fast = timed(Variant, 1.25 * scale, 1.5 * scale, report=report, psnr=30.0, ssim=0.99 - 0.002 * scale)
        fast.velocity = [{"sigma": [1.0, 0.0], "policy": "window", "error": error, "steps": 3}]
        dense = timed(Timed, 2.2 * scale, 2.0 * scale)
        found.comparisons.append(Comparison(dense, "flash", 9216, {"fast": fast}, [0.1, 0.05]))
    assert found.verdict == "`fast`: 1.6 × faster at velocity error .05, SSIM .987"
    row = found.rows[1]
    assert (row["seconds"], row["median_s"], row["spread"], row["ratio"]) == pytest.approx((3.75, 4.125, 0.2, 1.6))
    assert row["whole_s"] == pytest.approx(3.75 + 2 * (1.0 + 2.0))  # the least of text and of decoding
    assert row["velocity"] == [{"sigma": [1.0, 0.0], "policy": "window", "error": 0.05, "steps": 6}]
    assert found.busy is None
    found.comparisons[0].dense.stages[0]["denoise"] = 2.6  # beside 2.0: the runs differ by .3
    assert found.verdict == "`fast`: roughly 1.6 × faster at velocity error .05, SSIM .987"
    found.comparisons[1].others[0] = 0.4
    assert found.busy == "busy machine: other processes took up to 40% of its processors' time"
    assert found.busy in str(found)
    assert found.sheet() is None


def test_the_plot_has_a_point_where_the_numbers_are() -> None:
    assert ticks(2.3) == pytest.approx([0.5 * i for i in range(6)])
    assert ticks(0.01) == pytest.approx([0.001 * i for i in range(11)])
    picture = np.asarray(error_against_speed([("fast", 2.0, 0.1)], "x")).astype(int)
    dark = (np.abs(picture - picture[:1, :1]).sum(-1) > 100) & (picture.std(-1) > 20)  # coloured, no text and no line
    y, x = np.nonzero(dark[:, 400:])
    assert (x.mean() + 400, y.mean()) == pytest.approx((510, 56), abs=2)  # the upper right corner of the axes


def test_clips_of_every_form() -> None:
    picture = Image.new("RGB", (12, 8), (255, 0, 51))
    assert clips_of([picture, picture]).shape == (2, 1, 8, 12, 3)
    assert clips_of([[picture] * 3]).shape == (1, 3, 8, 12, 3)
    assert clips_of([picture])[0, 0, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])
    assert clips_of(np.ones((2, 8, 12, 1), np.float32)).shape == (2, 1, 8, 12, 3)
    assert not math.isnan(clips_of(np.ones((1, 2, 8, 12, 4), np.float32)).sum())
