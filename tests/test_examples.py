"""Every example of the README and of docs/: nothing that a reader may copy is out of date.

A command runs exactly as it is written, in an empty folder that has the files it names, if it needs no more than this machine:
no other model, no GPU, no cluster, no hour. Those that need more are taken apart by the program's own parser, options and
values, and `render` makes its jobs besides (`--dry-run`). What takes minutes runs with `-m slow`. Python runs as it is written
on a small pipeline of the real classes, whose size and steps when nothing is said are small too.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from util import DOCS, ROOT, call, environment, tiny_wan_pipeline

from fastdit import preset

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")), ROOT / "assets/tiny/MODEL.md"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:fastdit|python -m fastdit[\w.]*)(?: [^`]*)?)`", re.DOTALL)
ELSEWHERE = ("-m", "--model", "--gpus", "--cluster", "--ulysses", "--ring", "--lora", "--cpu-offload")
"""Options of `render` and `compare` that need another model, a GPU or a cluster."""
LONG = ("bench", "show gallery")
USUAL = 33 * 128 * 128 * 20
"""Pixels times steps of a clip when nothing is said."""


def examples() -> list[Any]:
    found = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = [body for kind, body in BLOCK.findall(text) if kind in ("", "sh", "bash")]
        lines = [line.partition("  #")[0].strip() for body in blocks for line in body.replace("\\\n", " ").splitlines()]
        said = [line for line in lines if re.match(r"(fastdit|torchrun|python -m fastdit|make|pytest|pip) ?", line)]
        said += [" ".join(each.split()) for each in INLINE.findall(BLOCK.sub("", text))]
        for line in said:
            if line in ("fastdit", "python -m fastdit", "fastdit render"):
                continue  # a name in a sentence
            found.setdefault(line, pytest.param(line, id=f"{page.name}: {line}"))
    return list(found.values())


EXAMPLES = examples()


def parts(line: str) -> list[str] | None:
    """Arguments of `fastdit` in an example; None for another program."""
    words = shlex.split(line)
    if "-m" in words and words[words.index("-m") + 1] == "fastdit":
        return words[words.index("-m") + 2 :]
    return words[1:] if words[0] == "fastdit" else None


def prepare(folder: Path, line: str) -> None:
    """Files that examples name."""
    (folder / "prompts.jsonl").write_text('{"prompt": "a star", "num_frames": 5, "height": 32, "width": 32, "steps": 2}\n')
    (folder / "mine.json").write_text(json.dumps(preset("fast").to_dict()))
    for page in (
        "README.md",
        "docs/benchmarks.md",
        "docs/cli.md",
        "docs/families.md",
        "docs/policies.md",
        "docs/statistics.md",
    ):
        (folder / page).parent.mkdir(exist_ok=True)
        (folder / page).write_text((ROOT / page).read_text(encoding="utf-8"), encoding="utf-8")
    shutil.copytree(DOCS / "results", folder / "docs/results")
    if "compare clips" in line:
        import numpy as np

        from fastdit.apps.render.media import encode

        clip = np.random.default_rng(0).random((3, 16, 16, 3), np.float32)
        for name in ("clips/a.mp4", "clips/b.mp4", "clips-dense/a.mp4", "clips-fast/a.mp4"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(encode(clip, "mp4", 8, 18, {})[".mp4"])


def size(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> int:
    """Pixels times steps of all clips of a `render`, dense runs too; that its jobs can be made is shown by the way."""
    assert call(monkeypatch, *arguments, "--dry-run", "--json") == 0, capsys.readouterr().err
    rows = [json.loads(row)["settings"] for row in capsys.readouterr().out.splitlines()]
    assert rows
    runs = 4 if "--compare" in arguments else 1
    return runs * sum(row["frames"] * row["height"] * row["width"] * row["steps"] for row in rows)


def parse(arguments: list[str]) -> None:
    """By the program's own parser. Raises its usage errors."""
    import typer

    from fastdit.apps.cli import main

    command: Any = typer.main.get_command(main.app)
    rest = arguments
    while hasattr(command, "resolve_command") and rest and not rest[0].startswith("-"):
        context = command.make_context(command.name, rest[:1], resilient_parsing=True)
        _, found, _ = command.resolve_command(context, rest)
        assert found is not None, rest
        command, rest = found, rest[1:]
    command.make_context(command.name, rest)


@pytest.mark.parametrize("line", EXAMPLES)
@pytest.mark.parametrize("slow", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "slow"])
def test_command(
    line: str, slow: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = parts(line)
    if arguments is None:
        if not slow:
            other_program(line)
        return
    if "…" in line or "COMMAND" in line or "NAME" in line:
        line = line.replace("…", "x").replace("COMMAND", "render").replace("NAME", "window")
        arguments = parts(line) or []
    if arguments == ["--install-completion"]:
        return  # it would write into the shell's files; `test_completion` asks what the shell would ask
    prepare(tmp_path, line)
    monkeypatch.chdir(tmp_path)
    long = " ".join(arguments).startswith(LONG) and "--table" not in arguments
    elsewhere = arguments[:2] == ["bench", "kernel"] or arguments[:1] == ["web"]  # which serves until it is stopped
    if arguments[:1] == ["render"] and len(arguments) > 1 and "--help" not in arguments:
        (tmp_path / "clips").mkdir(exist_ok=True)
        elsewhere = bool({*ELSEWHERE} & {*arguments})
        long = size(arguments, monkeypatch, capsys) > USUAL
    if arguments[:1] in (["compare"], ["tune"]):
        elsewhere = bool({*ELSEWHERE} & {*arguments})
    if elsewhere or (long and not slow):
        parse(arguments)
    elif slow and not long:
        pytest.skip("short: it runs without -m slow")
    else:
        assert call(monkeypatch, *arguments) == 0, capsys.readouterr().err


def other_program(line: str) -> None:
    """`make TARGET` has its target; `python -m MODULE` is there and has the options; the others are no part of fastdit."""
    words = shlex.split(line)
    if words[0] == "make":
        targets = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{word}:", targets, re.MULTILINE) for word in words[1:] if "=" not in word)
        assert all(f"{word.partition('=')[0]} ?=" in targets for word in words[1:] if "=" in word)
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]), line
        source = Path(str(import_module(words[2]).__file__)).read_text()
        assert all(word in source for word in words[3:] if word.startswith("--")), line


def test_there_are_examples() -> None:
    lines = [str(each.values[0]) for each in EXAMPLES]
    assert len(lines) > 25
    assert any(line.startswith("torchrun") for line in lines)


PYTHON = [
    pytest.param(page, body, id=f"{page.name} {number}")
    for page in PAGES
    for number, (kind, body) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
    if kind == "python"
]


@pytest.mark.parametrize(("page", "body"), PYTHON)
def test_python(page: Path, body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import WanPipeline

    class Small(WanPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            small = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2}
            return super().__call__(*args, **small | kwargs)

    import fastdit

    pipe, model = Small(**tiny_wan_pipeline().components), tiny_wan_pipeline().transformer
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.chdir(tmp_path)
    program = compile(body, str(page), "exec")
    if "propagate_encoder" in body or "gradio_client" in body:
        return  # needs a UNet, or the page to be served: test_propagate_pipelines.py and test_web_api.py run these calls
    if not re.search("accelerate|set_attn_processor|install", body):
        fastdit.accelerate(pipe)  # what the page's sentence before it says
    exec(program, {"pipe": pipe, "prompt": "a red circle", "fastdit": fastdit, "model": model})


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ([], ["render", "compare", "doctor", "models", "bench", "show", "--version", "--install-completion"]),
        (
            ["render"],
            ["--prompts", "--compare", "--cluster", "--ulysses", "--gpus", "--resume", "--crf", "--dry-run"],
        ),
        (["compare"], ["--out", "--json", "flicker", "--prompt", "--preset", "--config", "--repeats"]),
        (["doctor"], ["--json", "float64"]),
        (["models"], ["--json", "--table"]),
        (["bench"], ["--sizes", "--table", "kernel"]),
        (["bench", "kernel"], ["--grid", "--formats", "--densities"]),
        (["show"], ["policy", "policies", "presets", "schedule", "gallery"]),
        (["show", "policy"], ["--grid", "--set"]),
        (["show", "schedule"], ["--steps", "--shift"]),
        (["show", "presets"], ["presets"]),
        (["show", "policies"], ["policies"]),
        (["show", "gallery"], ["--docs"]),
    ],
    ids=" ".join,
)
def test_help(command: list[str], says: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert call(monkeypatch, *command, "--help") == 0
    said = capsys.readouterr().out
    assert all(word in said for word in says), said


def test_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    """What bash asks when a user types `fastdit rend<Tab>` and `fastdit show p<Tab>`."""
    for words, expected in (("fastdit rend", {"render"}), ("fastdit show p", {"policy", "policies", "presets"})):
        run = subprocess.run(
            [sys.executable, "-c", "from fastdit.apps.cli.main import app; app(prog_name='fastdit')"],
            capture_output=True, text=True,
            env=environment(_FASTDIT_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" "))),
        )  # fmt: skip
        assert set(run.stdout.split()) == expected, run.stderr
