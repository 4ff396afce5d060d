"""The table of settings: what is made of it stays what it was, so that a folder of clips goes on after an upgrade."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from util import call

from fastdit import Config, Phase, Window
from fastdit.apps.cli import list as lists
from fastdit.apps.cli import main
from fastdit.apps.render import jobs

LINE = {
    "prompt": "A blue square!", "negative_prompt": "blur", "seed": 7, "num_frames": 17, "height": 64, "width": 96,
    "num_inference_steps": 8, "guidance_scale": 1.5, "fps": 12, "preset": "fast", "dtype": "float32", "format": "gif",
    "crf": 30,
}  # fmt: skip
CUSTOM = Config((Phase(policy=Window(density=0.25)),))
QUICK = {"device": "cuda", "cpu_offload": "group", "compile": True, "vae_tiling": True, "ulysses": 2, "ring": 2}


@pytest.mark.parametrize(
    ("said", "base", "repeats", "name", "digits"),
    [
        ({"prompt": "a red circle moving right"}, {"seed": 0}, 0, "0000-a-red-circle-moving-right-s0", "3c5a609b9b015a7e"),
        (LINE, {"seed": 0, "model": "owner/name"}, 0, "0000-a-blue-square-s7", "8cc1e8062d2dd882"),
        ({"prompt": "a star"}, {"seed": 3, "preset": "exact", "crf": 18} | QUICK, 2, "0000-a-star-s3", "d74f14977084fd9a"),
        ({"prompt": "a star", "image": "start.png", "lora": "style.safetensors@0.5"}, {"seed": 3}, 0, "0000-a-star-s3",
         "85c94fa59fbfe0af"),
        ({"prompt": "a star"}, {"seed": 1, "custom": CUSTOM, "preset": "balanced"}, 0, "0000-a-star-s1", "d45b9f0ac852e260"),
    ],
)  # fmt: skip
def test_a_clip_keeps_its_name_and_hash(
    said: dict[str, Any], base: dict[str, Any], repeats: int, name: str, digits: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("start.png").write_text("picture")
    Path("style.safetensors").write_text("lora")
    batch = jobs.make([("a line", said)], base, repeats=repeats)
    assert [(job.name, job.hash) for job in batch.jobs] == [(name, digits)], batch.errors


@pytest.mark.parametrize(
    ("arguments", "digits"),
    [
        ([], "1ac2c7eaf8994872"),
        (
            ["--preset", "fast", "--num-frames", 17, "--negative", "blur", "--guidance-scale", 1.5, "--dtype", "float32"],
            "7ad62331c5c0b224",
        ),
        (["-m", "owner/name", "--compile", "--vae-tiling", "--cpu-offload", "model", "--device", "cpu"], "ae97b1a0d0b8664d"),
        (["-m", "owner/name"], "ae97b1a0d0b8664d"),
    ],
)
def test_so_does_one_of_the_command_line(arguments: list[Any], digits: str, monkeypatch: Any, capsys: Any) -> None:
    assert call(monkeypatch, "render", "a star", *arguments, "--dry-run", "--json") == 0
    assert json.loads(capsys.readouterr().out)["job"] == digits


def test_the_options_of_render_stay() -> None:
    command: Any = typer.main.get_command(main.app)
    found = {
        " ".join(sorted([*option.opts, *option.secondary_opts])): option.default for option in command.commands["render"].params
    }
    assert found == {
        "prompt": None, "--prompts": None, "--out -o": Path("."), "--name": "{index:04d}-{slug}-s{seed}",
        "--model -m": None, "--preset": None, "--config": None, "--negative --negative-prompt": None, "--seed": 0,
        "--repeat": 1, "--frames --num-frames": None, "--height": None, "--width": None, "--num-inference-steps --steps": None,
        "--guidance --guidance-scale": None, "--image": None, "--lora": None, "--fps": None, "--format": None, "--crf": 18,
        "--compare": False, "--repeats": 2, "--device": "auto", "--dtype": "auto", "--cpu-offload": "none", "--compile": False,
        "--vae-tiling": False, "--gpus": None, "--workers": None, "--threads": None, "--cluster": None, "--ulysses": 1,
        "--ring": 1, "--no-resume --resume": True, "--overwrite": False, "--dry-run": False,
        "--json": False, "--quiet -q": False,
    }  # fmt: skip


def test_the_table_of_the_docs_is_that_of_the_code() -> None:
    text = (Path(__file__).parents[3] / "docs" / "cli.md").read_text(encoding="utf-8")
    found = text.partition("<!-- settings -->")[2].partition("<!-- /settings -->")[0]
    assert found == f"\n{lists.settings_table()}\n", "run: fastdit show settings --table docs/cli.md"
