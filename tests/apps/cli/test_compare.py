"""`fastdit compare` of a pipeline in a folder: the verdict first, files, what Ctrl-C leaves, and every mistake in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from util import call

import fastdit
from fastdit import Config, Phase, Window
from fastdit.apps.compare import measure

SPARSE = Config((Phase((0.85, 0.0), Window(density=0.3)),), tile=(1, 2, 2), min_tokens=0)
SMALL = ["--frames", 9, "--height", 64, "--width", 64, "--steps", 3]


@pytest.fixture
def given(saved_pipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Options: a model, a sparse preset `fast`, a file with a configuration."""
    monkeypatch.setitem(fastdit.PRESETS, "fast", SPARSE)
    (tmp_path / "mine.json").write_text(json.dumps(Config().to_dict()))
    return ["-m", saved_pipe, *SMALL, "--preset", "fast", "--config", tmp_path / "mine.json"]


def test_the_verdict_comes_first(
    given: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call(monkeypatch, "compare", "--prompt", "a red circle", *given, "--seed", 5, "-o", out) == 0
    verdict, heads, *rows = capsys.readouterr().out.splitlines()
    found = json.loads((out / "compare.json").read_text())
    assert verdict == found["verdict"]
    assert verdict.startswith("`fast`: ")
    assert verdict.endswith("; `mine` stayed dense: the configuration is dense")
    assert heads.split()[:4] == ["best", "s", "median", "s"]
    assert [row.split()[0] for row in rows[:3]] == ["dense", "fast", "mine"]
    assert rows[-3:] == [str(out / name) for name in ("compare-sheet.png", "compare-plot.png", "compare.json")]
    assert [row["runs"] for row in found["rows"]] == [2, 2, 1]
    assert found["each"][0]["call"]["seed"] == 5
    assert found["machine"]["pipeline"] == "WanPipeline"
    assert call(monkeypatch, "compare", "--prompt", "a red circle", *given, "-o", out) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_file_of_prompts_and_json(
    given: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red circle"}\n{"prompt": "a blue square", "steps": 2}\n')
    assert call(monkeypatch, "compare", "--prompts", tmp_path / "prompts.jsonl", *given, "--repeats", 1, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["call"]["steps"] for each in found["each"]] == [3, 2]
    assert [row["calls"] for row in found["rows"]] == [2, 2, 2]
    assert [row["name"] for row in found["rows"]] == ["dense", "fast", "mine"]


def test_ctrl_c_keeps_what_is_done(
    given: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = measure.draw

    def draw(pipe: Any, call: Any, label: str, *rest: Any) -> Any:
        if label == "mine 1/2":
            raise KeyboardInterrupt
        return real(pipe, call, label, *rest)

    monkeypatch.setattr(measure, "draw", draw)
    assert call(monkeypatch, "compare", "--prompt", "a red circle", *given, "-o", tmp_path / "out") == 130
    said = capsys.readouterr()
    assert said.out.startswith("`fast`: ")
    assert "interrupted" in said.err
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["dense", "fast"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say what to draw: --prompt TEXT, or --prompts FILE, or give two clips"),
        (("--prompt", "a", "--prompts", "b.txt"), "not both"),
        (("a.mp4", "b.mp4", "--preset", "fast"), "compared as they are"),
        (("a.mp4",), "a.mp4 alone"),
        (("--prompt", "a", "--preset", "quick"), "unknown preset 'quick'"),
        (("--prompt", "a", "--preset", "fast", "--preset", "fast"), "'fast' is named twice"),
        (("--prompt", "a", "--config", "none.json"), "cannot read none.json"),
        (("--prompt", "a", "--repeats", 0), "--repeats must be at least 1"),
        (("--prompt", "a", "--steps", 0), "--steps must be at least 1"),
        (("--prompt", "a", "-o", __file__), "choose another folder with --out"),
    ],
)
def test_mistakes(
    arguments: tuple[Any, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "compare", *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_line_gives_no_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a", "preset": "fast"}\n')
    assert call(monkeypatch, "compare", "--prompts", tmp_path / "prompts.jsonl") == 2
    assert "compare takes presets from --preset alone" in capsys.readouterr().err
