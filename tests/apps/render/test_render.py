"""`fastdit render`: what it writes, and that it writes it whole or not at all."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from util import command, decode, environment, fastdit, probe

import fastdit as package
from fastdit.apps.errors import UserError
from fastdit.apps.render.generate import generate
from fastdit.apps.render.jobs import Job
from fastdit.apps.render.load import check_shape, dropped_tokens, multiples
from fastdit.apps.render.media import to_uint8
from fastdit.apps.render.renderer import Renderer
from fastdit.apps.render.settings import Settings

SMALL = ["--frames", "9", "--height", "32", "--width", "48", "--steps", "3"]


def small(**more: Any) -> Settings:
    return Settings(**{"prompt": "a red circle", "frames": 9, "height": 32, "width": 48, "steps": 3} | more)


def job(**more: Any) -> Job:
    return Job(0, {"prompt": "a red circle", "frames": 9, "height": 32, "width": 48, "steps": 3} | more)


def test_one_command_three_files(saved_pipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    arguments = ["render", "a red circle moving right", "--seed", 1, *SMALL, "--out", out, "-m", saved_pipe]
    run = fastdit(*arguments)
    assert run.returncode == 0, run.stderr
    assert "3/3" not in run.stderr  # bars are for terminals
    (mp4,) = out.glob("*.mp4")
    assert mp4.name == "0000-a-red-circle-moving-right-s1.mp4"
    assert {path.name for path in out.iterdir()} == {
        "manifest.jsonl",
        *(mp4.stem + end for end in (".json", ".mp4", "-sheet.png")),
    }
    facts = json.loads(mp4.with_suffix(".json").read_text())
    assert facts["settings"]["prompt"] == "a red circle moving right"
    assert package.Config.from_dict(facts["settings"]["config"]) == package.PRESETS["balanced"]
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["seconds"]) == {"load", "text", "denoise", "decode", "encode"}
    assert len(facts["step_seconds"]) == 3
    assert sum(facts["step_seconds"]) == pytest.approx(facts["seconds"]["denoise"])
    assert {"density", "phases", "sites"} <= set(facts["report"])
    assert json.loads(Image.open(out / f"{mp4.stem}-sheet.png").text["fastdit"]) == facts["settings"]
    assert "h264" in probe(mp4)
    assert decode(mp4).shape == (9, 32, 48, 3)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = fastdit(*arguments)
    assert again.returncode == 0
    assert "exists already, made with these settings" in again.stderr
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_exact_is_stock(pipe: Any) -> None:
    """`generate` changes nothing, and times what it says."""
    settings = small(preset="exact", seed=7, negative="blue")
    stock = pipe(
        prompt="a red circle",
        negative_prompt="blue",
        num_frames=9,
        height=32,
        width=48,
        num_inference_steps=3,
        guidance_scale=settings.guidance,
        generator=torch.Generator().manual_seed(7),
    ).frames[0]
    with package.accelerate(pipe, settings.config()):
        clip = generate(pipe, settings, show=False)
    assert np.array_equal(clip.frames, stock)
    assert min(clip.seconds.values()) > 0
    assert not pipe.transformer._forward_pre_hooks


def test_seed_decides(pipe: Any) -> None:
    clips = [generate(pipe, small(seed=seed, steps=1), show=False).frames for seed in (1, 1, 2)]
    assert np.array_equal(clips[0], clips[1])
    assert not np.array_equal(to_uint8(clips[0]), to_uint8(clips[2]))


def test_not_finite(pipe: Any, saved_pipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN from the second step on: said at once, nothing written, pipeline as it was."""
    steps = iter(range(100))

    def spoil(model: Any, args: Any, out: Any) -> Any:
        return (out[0] * float("nan"),) if next(steps) >= 1 else out

    pipe.transformer.register_forward_hook(spoil)
    processors = dict(pipe.transformer.attn_processors)
    monkeypatch.setattr("fastdit.apps.render.renderer.load", lambda settings: pipe)
    renderer = Renderer(show=False)
    with pytest.raises(UserError, match=r"step 2 of 3 gave NaN or infinity.*--dtype float32") as told:
        renderer.render(job())
    assert told.value.code == 1
    renderer.close()
    assert all(pipe.transformer.attn_processors[name] is one for name, one in processors.items())


def test_nan_weights(saved_pipe: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(saved_pipe, tmp_path / "model")
    path = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["proj_out.bias"].fill_(float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    run = fastdit("render", "a red circle", *SMALL, "--out", tmp_path / "out", "-m", model)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("fastdit: denoising: step 1 of 3 gave NaN or infinity")
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_long_prompt(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ("red circle " * 1000)[:4_000]
    monkeypatch.setattr("fastdit.apps.render.renderer.load", lambda settings: pipe)
    result = Renderer(show=False).render(job(prompt=prompt, steps=1))
    count = len(prompt.split()) + 1  # and the end of the sentence
    assert f"the prompt has {count} tokens and the model reads 512: {count - 512} are dropped" in capsys.readouterr().err
    assert result.record["dropped_tokens"] == count - 512
    assert result.record["settings"]["prompt"] == prompt
    assert dropped_tokens(pipe, "a red circle") == 0


def test_shapes_of_other_patches(pipe: Any) -> None:
    assert multiples(pipe) == (4, 16, 16)
    check_shape(pipe, 1, 16, 64)
    for size, nearest in ((23, 16), (25, 32), (1000, 992)):
        with pytest.raises(UserError, match=f"got {size}: nearest is {nearest}"):
            check_shape(pipe, 1, 16, size)


class Watched:
    """A render that has begun to denoise, as its progress says on a terminal."""

    def __init__(self, saved_pipe: Path, out: Path, steps: int) -> None:
        arguments = ["render", "a red circle", "--out", out, "-m", saved_pipe, "--frames", 9, "--height", 64, "--width", 64]
        self.terminal, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (24, 100))
        self.process = subprocess.Popen(
            command(*arguments, "--steps", steps), stderr=theirs, env=environment(),
            # a shell without job control starts background jobs, and all that they start, with Ctrl-C ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        os.close(theirs)
        limit = time.monotonic() + 60
        seen = ""
        while not re.search(r" [1-9]\d*/\d+ \[", seen):
            seen += (more := self.read())
            assert more, seen
            assert time.monotonic() < limit, seen

    def read(self) -> str:
        """What was written since the last time; waits for some, and is empty when the process has ended."""
        try:
            return os.read(self.terminal, 1 << 16).decode(errors="replace")
        except OSError:  # Linux's word for a terminal that nobody writes to any more
            return ""

    def ended(self) -> str:
        """The rest of what it writes until it ends."""
        rest = "".join(iter(self.read, ""))
        self.process.wait(60)
        os.close(self.terminal)
        return rest


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(number: int, code: int, saved_pipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    watched = Watched(saved_pipe, out, 5000)
    watched.process.send_signal(number)
    rest = watched.ended()
    assert watched.process.returncode == code
    assert "Traceback" not in rest
    if number == signal.SIGINT:
        assert rest.splitlines()[-1] == "fastdit: interrupted: nothing was left half-written"
    assert not out.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_killed_and_run_again(saved_pipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    watched = Watched(saved_pipe, out, 300)
    watched.process.kill()
    watched.ended()
    assert not list(out.glob("*.mp4"))
    arguments = ["--frames", 9, "--height", 64, "--width", 64, "--steps", 300]
    run = fastdit("render", "a red circle", "--out", out, "-m", saved_pipe, *arguments)
    assert run.returncode == 0, run.stderr
    assert sorted(path.suffix for path in out.iterdir()) == [".json", ".jsonl", ".mp4", ".png"]
    assert not [name for name in os.listdir(out) if name.startswith(".")]
