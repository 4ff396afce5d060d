"""What `render` and `doctor` say of a clip before it is drawn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from util import call

from fastdit.apps.cli import doctor
from fastdit.apps.errors import UserError
from fastdit.apps.render import forecast
from fastdit.apps.render.settings import Settings
from fastdit.pipelines import embedded
from fastdit.prediction import shape


def test_a_dry_run_tells_what_each_preset_will_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "render", "a red ball", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "9×32×32 = 9,216 tokens, 8 steps, 1 call each" in next(line for line in lines if line.startswith("WanPipeline on "))
    rows = {line.split()[0]: line.split() for line in lines[-4:]}
    assert rows.keys() == {"exact", "balanced", "fast", "fps"}
    # The first step is dense, two of the other seven are refreshes, and windows keep an eighth.
    assert rows["balanced"][1] == f"{(3 + 5 * 0.125) / 8:.3f}"
    assert rows["exact"][1] == "1.000"


def test_clips_that_stay_dense_say_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "render", "a red ball", "--frames", 9, "--height", 64, "--width", 64, "--dry-run") == 0
    assert re.search(r"8 sites: 192 tokens, this .PU needs .,...; all attention stays dense", capsys.readouterr().out)


def test_a_model_elsewhere_is_named_and_the_jobs_are_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "render", "a red ball", "-m", "some/where", "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.startswith("0000-a-red-ball-s0")
    assert "nothing predicted for some/where: it is not a folder here" in out


def test_the_line_comes_once_for_clips_of_a_size(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = ["--frames", 5, "--height", 32, "--width", 32, "--steps", 2, "--repeat", 2, "--out", tmp_path]
    assert call(monkeypatch, "render", "a red ball", *small) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastdit: 32 tokens, balanced: ")]
    assert len(said) == 1


def test_a_prediction_that_fails_costs_no_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyError("sigma_max")

    monkeypatch.setattr(shape, "noise_levels", fails)
    assert forecast.line(embedded.load(), Settings(prompt="a")) == "fastdit: nothing predicted: KeyError: 'sigma_max'"


def test_doctor_predicts_sizes_of_the_embedded_model() -> None:
    found = doctor.predicted([(33, 256, 256), (9, 64, 64)])
    assert [finding.what for finding in found] == ["predicted, 33x256x256"] * 2 + ["predicted, 9x64x64"] * 2
    assert found[0].found.startswith("9,216 tokens, balanced: density 0.45, ")
    with pytest.raises(UserError, match="--sizes 9x60x64: height must be a multiple of 8 .* nearest is 64"):
        doctor.predicted([(9, 60, 64)])
