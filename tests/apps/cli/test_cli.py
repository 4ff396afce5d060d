"""The command as a stranger types it: help, version, presets, and every mistake answered in one line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from util import call, environment, fastdit

import fastdit as package

HEAVY = ("torch", "diffusers", "transformers", "numpy", "PIL", "gradio", "ray")

GOOD = ["--frames", "5", "--height", "32", "--width", "32", "--steps", "2"]


def one_line(text: str) -> str:
    lines = [line for line in text.splitlines() if not line.startswith("\rdenoising")]
    assert len(lines) == 1, text
    assert lines[0].startswith("fastdit: ")
    return lines[0]


def test_module_and_version() -> None:
    run = fastdit("--version")
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, f"fastdit {package.__version__}", "")


def test_help_names_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("render", "bench", "show"))
    assert call(monkeypatch, "render", "-h") == 0
    assert "--compare" in capsys.readouterr().out


def test_presets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "show", "presets") == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if not line.startswith(" ")] == list(package.PRESETS)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["render", "--help"], 0),
        (["--version"], 0),
        (["show", "presets"], 0),
        (["rendr"], 2),
        (["render", "a", "--steps", "0"], 2),
    ],
)
def test_nothing_heavy_is_imported_for_a_short_answer(arguments: list[str], code: int) -> None:
    script = (
        "import sys\n"
        "from fastdit.apps.cli import main as cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: code = end.code\n"
        f"print(code, [m for m in {HEAVY} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment())
    assert run.stdout.splitlines()[-1] == f"{code} []", run.stderr


@pytest.mark.parametrize("arguments", [[], ["show"]])
def test_without_a_command_there_is_help(arguments, monkeypatch, capsys):
    assert call(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert "\nCommands:\n" in said.out + said.err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["a", "--preset", "warp"], 2, "unknown preset 'warp': choose one of exact, balanced, fast"),
        ([""], 2, "the prompt is empty"),
        ([" \t\n"], 2, "the prompt is empty"),
        (["a", "--steps", 0], 2, "--steps must be at least 1, got 0"),
        (["a", "--seed", -1], 2, "--seed must be from 0 to 2^63 - 1, got -1"),
        (["a", "--seed", 2**63], 2, "--seed must be from 0"),
        (["a", "--fps", 0], 2, "--fps must be from 1 to 240, got 0"),
        (["a", "--guidance", "nan"], 2, "--guidance must be a number"),
        (["a", "--steps", "many"], 2, "Invalid value for '--steps'"),
        (["a", "--sparkle"], 2, "No such option: --sparkle"),
        ([], 2, "say what to draw: a prompt, or --prompts FILE"),
        (["a", "--prompts", "b.txt"], 2, "a prompt, or --prompts FILE, not both"),
        (["a", "--device", "abacus"], 2, "--device must be auto, cpu or cuda"),
        (["a", "--dtype", "int3"], 2, "--dtype auto, float32"),
        (["a", "--config", "x.toml", "--preset", "fast"], 2, "give --config or --preset, not both"),
        (["a", "--compare", "--repeats", 0], 2, "--repeats must be at least 1"),
        (
            ["a", "--height", 40, "--width", 32],
            2,
            "--height must be a multiple of 16, at least 16, for this model, got 40",
        ),
        (["a", "--height", 32, "--width", 47], 2, "got 47: nearest is 48"),
        (["a", "--height", 0, "--width", 32], 2, "got 0: nearest is 16"),
        (["a", "--frames", 16], 2, "--frames must be 4k + 1 for this model, got 16: nearest is 17"),
        (["a", "--frames", 0], 2, "got 0: nearest is 1"),
    ],
)
def test_wrong_usage(
    arguments: list[object],
    code: int,
    said: str,
    saved_pipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert call(monkeypatch, "render", *arguments, "--out", out, "-m", saved_pipe) == code
    assert said in one_line(capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.parametrize("out", ["file/below", "/proc/fastdit", "file"])
def test_unwritable_folder(
    out: str, saved_pipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("I was here")
    assert call(monkeypatch, "render", "a", *GOOD, "--out", tmp_path / out, "-m", saved_pipe) == 1
    assert "choose another folder with --out" in one_line(capsys.readouterr().err)
    assert (tmp_path / "file").read_text() == "I was here"


@pytest.mark.parametrize(
    ("lose", "said"),
    [
        (None, "no model folder"),
        ("model_index.json", "has no readable model_index.json"),
        ("transformer", "lacks its part transformer/"),
        ("vae/diffusion_pytorch_model.safetensors", "no weights in"),
        ("scheduler/scheduler_config.json", "cannot load the model"),
    ],
)
def test_broken_models(
    lose: str | None,
    said: str,
    saved_pipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "some" / "model"
    if lose is not None:
        shutil.copytree(saved_pipe, model)
        gone = model / lose
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert call(monkeypatch, "render", "a", *GOOD, "--out", tmp_path / "out", "-m", model) == 1
    line = one_line(capsys.readouterr().err)
    assert said in line
    assert str(model) in line
    assert not (tmp_path / "out").exists()


def test_cut_off_weights(
    saved_pipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(saved_pipe, tmp_path / "model")
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert call(monkeypatch, "render", "a", *GOOD, "--out", tmp_path / "out", "-m", model) == 1
    assert "download or save it again" in one_line(capsys.readouterr().err)


def test_not_text_to_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert call(monkeypatch, "render", "a", *GOOD, "--out", tmp_path / "out", "-m", tmp_path / "model") == 1
    assert "is a DDPMPipeline, which takes no" in one_line(capsys.readouterr().err)


def test_hub_id_offline(tmp_path: Path) -> None:
    run = fastdit("render", "a", "--out", tmp_path / "out", "-m", "nobody/nothing")
    assert run.returncode == 1
    assert "cannot load the model nobody/nothing" in one_line(run.stderr)
    assert not (tmp_path / "out").exists()


def test_embedded_model_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fastdit.pipelines.embedded.PATH", tmp_path / "gone")
    assert call(monkeypatch, "render", "a", "--out", tmp_path / "out") == 1
    assert "reinstall fastdit" in one_line(capsys.readouterr().err)


def test_no_ffmpeg(
    saved_pipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    assert call(monkeypatch, "render", "a", *GOOD, "--out", tmp_path / "out", "-m", saved_pipe) == 1
    assert "IMAGEIO_FFMPEG_EXE=/nowhere/ffmpeg does not run: unset it" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
