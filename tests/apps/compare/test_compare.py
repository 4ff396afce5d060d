"""`--compare` and what it rests on: honest refusals first, then numbers that mean what they say."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from util import decode, fastdit

import fastdit as package
from fastdit import Config, Dense, Phase, Window
from fastdit.apps.compare.measure import measure
from fastdit.apps.compare.recorded import FirstCalls, velocity_error
from fastdit.apps.compare.runs import both, describe
from fastdit.apps.errors import UserError
from fastdit.apps.render.generate import generate
from fastdit.apps.render.jobs import Job
from fastdit.apps.render.load import denoisers
from fastdit.apps.render.renderer import Renderer
from fastdit.apps.render.settings import Settings

SPARSE = Config(phases=(Phase((1.0, 0.85), Dense()), Phase((0.85, 0.0), Window(density=0.3))), tile=(1, 2, 2), min_tokens=0)
SIGMAS = [1.0, 0.9, 0.75, 0.5, 0.01]  # of 5 steps at shift 3


def small(**more: Any) -> Settings:
    return Settings(**{"prompt": "a red circle", "frames": 9, "height": 64, "width": 64, "steps": 5, "seed": 3} | more)


@pytest.fixture
def sparse_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the preset `fast` be sparse for a clip of 48 tokens."""
    monkeypatch.setitem(package.PRESETS, "fast", SPARSE)


def test_exact_equals_dense(pipe: Any) -> None:
    found = measure(pipe, small(), {"exact": package.preset("exact")}, show=False)
    exact = found.variants["exact"]
    assert math.isinf(exact.psnr)
    assert [row["error"] for row in exact.velocity] == [0.0]
    assert exact.dense_because is not None
    assert exact.to_dict(found.dense_seconds)["psnr_db"] is None
    assert found.tokens == 3 * 4 * 4
    assert "scaled_dot_product_attention" in found.kernel
    assert not any(model._forward_hooks or model._forward_pre_hooks for model in denoisers(pipe))
    said = describe(small(), found, "exact", 2)
    assert "no sparse attention ran: " in said
    assert "identical" in said


def test_sparse_differs_by_what_it_says(pipe: Any) -> None:
    found = measure(pipe, small(), {"fast": SPARSE, "exact": Config()}, show=False)
    fast = found.variants["fast"]
    assert fast.dense_because is None
    assert 0 < fast.report.density < 1
    assert math.isfinite(fast.psnr)
    assert fast.ssim < 1
    dense_phase, sparse_phase = fast.velocity
    assert dense_phase["error"] == 0.0
    assert 0 < sparse_phase["error"] < 1
    assert (dense_phase["steps"], sparse_phase["steps"]) == (2, 3)
    assert math.isinf(found.variants["exact"].psnr)
    said = describe(small(), found, "fast", 2)
    ratio = found.dense_seconds / fast.seconds
    assert f"{ratio:.2f} x" in said
    assert ("slower than dense" in said) == (ratio < 1)


def test_velocity_error_is_of_the_recorded_calls(pipe: Any) -> None:
    """By hand: the dense run's own inputs through the accelerated denoiser."""
    calls: list[Any] = []
    with FirstCalls(pipe, calls):
        generate(pipe, small(), show=False)
    assert [round(call.sigma, 2) for call in calls] == SIGMAS
    with torch.no_grad(), package.accelerate(pipe, SPARSE):
        (_, row) = velocity_error(SPARSE, calls)
        errors = []
        for call in calls[2:]:
            out = pipe.transformer(**call.inputs()[1])[0]
            errors.append(((out - call.velocity).norm() / call.velocity.norm()).item())
    assert row["error"] == pytest.approx(sum(errors) / 3, rel=1e-5)


def test_dense_runs_that_differ_are_refused(pipe: Any) -> None:
    noise = torch.Generator().manual_seed(0)
    pipe.transformer.register_forward_hook(
        lambda model, args, out: (out[0] + 1e-3 * torch.randn(out[0].shape, generator=noise),)
    )
    with pytest.raises(UserError, match="two dense runs of seed 3 differ"):
        measure(pipe, small(), {"exact": Config()}, show=False)


@pytest.mark.parametrize("which", ["dense", "fast"])
def test_not_finite_is_refused(pipe: Any, which: str) -> None:
    def spoil(model: Any, args: Any, out: Any) -> Any:
        ours = "Bound" in type(model.blocks[0].attn1.processor).__mro__[1].__name__
        return (out[0] * float("inf"),) if ours == (which == "fast") else out

    pipe.transformer.register_forward_hook(spoil)
    before = pipe.transformer.blocks[0].attn1.processor
    with pytest.raises(UserError, match=f"{which} 1/2: step 1 of 5 gave NaN or infinity"):
        measure(pipe, small(), {"fast": SPARSE}, show=False)
    assert pipe.transformer.blocks[0].attn1.processor is before


def test_frames_that_are_not_finite_are_refused(pipe: Any) -> None:
    pipe.vae.post_quant_conv.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="the dense run decoded to NaN or infinity"):
        measure(pipe, small(steps=1), {"exact": Config()}, show=False)


def test_files(sparse_fast: None, pipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fastdit.apps.render.renderer.load", lambda settings: pipe)
    result = both(Renderer(show=False), Job(0, vars(small(preset="fast")), repeats=2))
    assert list(result.files) == ["-sheet.png", "-dense.mp4", ".mp4"]
    facts = result.record
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["ratio"] == pytest.approx(facts["dense_s"] / facts["fast_s"])
    assert f"PSNR {facts['psnr_db']:.1f} dB" in result.text
    assert result.report.density == facts["density"] < 1
    assert facts["stayed_dense"] is None
    sheet = Image.open(io.BytesIO(result.files["-sheet.png"]))
    assert json.loads(sheet.text["fastdit"])["preset"] == "fast"
    for suffix in ("-dense.mp4", ".mp4"):
        (tmp_path / suffix[1:]).write_bytes(result.files[suffix])
    dense, fast = decode(tmp_path / "dense.mp4"), decode(tmp_path / "mp4")
    assert dense.shape == fast.shape == (9, 64, 64, 3)
    assert not np.array_equal(dense, fast)
    assert facts["frames_sha256"] != facts["dense_sha256"]


def test_short_clip_says_that_it_stayed_dense(saved_pipe: Path, tmp_path: Path) -> None:
    arguments = ["--frames", 5, "--height", 32, "--width", 32, "--steps", 2, "-m", saved_pipe, "--out", tmp_path]
    run = fastdit("render", "a red circle", "--compare", *arguments)
    assert run.returncode == 0, run.stderr
    assert re.search(r"no sparse attention ran: 8 tokens, this CPU needs [\d,]+", run.stdout), run.stdout
    assert "identical" in run.stdout
    assert len(list(tmp_path.iterdir())) == 5  # both clips, sheet, JSON, manifest
