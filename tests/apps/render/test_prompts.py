"""Text of others: marks of byte order, ends of lines that are none, lines that are no prompts, and paths in them."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from util import call, command, environment

from fastdit.apps.cli.render import Console
from fastdit.apps.errors import UserError
from fastdit.apps.render.jobs import make
from fastdit.apps.render.paths import split_lora
from fastdit.apps.render.prompts import read
from fastdit.apps.render.settings import Settings

MARK = "\ufeff"
SAYS = {
    "a.txt": "{}\n{}\n",
    "a.jsonl": '{{"prompt": "{}"}}\n{{"prompt": "{}"}}\n',
    "a.csv": 'prompt\n"{}"\n"{}"\n',
    "a.yaml": '- prompt: "{}"\n- {}\n',
    "- text": "{}\n{}\n",
    "- JSON": '{{"prompt": "{}"}}\n{{"prompt": "{}"}}\n',
}
"""Two prompts, in every way in which they come; after "-" on standard input."""


def stdin(content: bytes) -> io.TextIOWrapper:
    """As `sys.stdin` is."""
    return io.TextIOWrapper(io.BytesIO(content), "utf-8")


def prompts(name: str, content: str | bytes, folder: Path) -> tuple[list[Any], list[tuple[str, str]]]:
    """What a file of that name makes jobs of, and its errors by line."""
    content = content.encode() if isinstance(content, str) else content
    if name.startswith("-"):
        lines = read("-", stdin(content))
    else:
        (folder / name).write_bytes(content)
        lines = read(str(folder / name))
    batch = make(lines, {"seed": 0})
    return [job.given["prompt"] for job in batch.jobs], [(where.split()[-1], why) for where, why in batch.errors]


@pytest.mark.parametrize("name", SAYS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_mark_of_byte_order_is_not_read(name: str, end: str, tmp_path: Path) -> None:
    said = SAYS[name].format("a red circle", "ein grüner Kreis").replace("\n", end)
    assert prompts(name, MARK + said, tmp_path) == (["a red circle", "ein grüner Kreis"], [])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "- text", "- JSON"])
def test_files_that_were_joined(name: str, tmp_path: Path) -> None:
    said = MARK + SAYS[name].format("a", "b") + MARK + "# more\n" + MARK + SAYS[name].format("c", "d")
    assert prompts(name, said, tmp_path) == (["a", "b", "c", "d"], [])


def test_a_mark_within_text_that_is_passed_on() -> None:
    """$(cat FILE) on the command line, a cell, the page."""
    assert [job.given["prompt"] for job in make([("1", f"{MARK}a"), ("2", {"prompt": f"{MARK}b"})], {"seed": 0}).jobs] == [
        "a",
        "b",
    ]


@pytest.mark.parametrize("name", SAYS)
@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e"])
def test_what_ends_no_line(inside: str, name: str, tmp_path: Path) -> None:
    escaped = inside < " " and name in ("a.jsonl", "a.yaml", "- JSON")  # where such characters may not stand as they are
    first = f"a red circle{json.dumps(inside)[1:-1] if escaped else inside}moving right"
    # where YAML sees the end of a line, a space is what it makes of it
    read_as = " " if name == "a.yaml" and not escaped else inside
    assert prompts(name, SAYS[name].format(first, "a star"), tmp_path) == ([f"a red circle{read_as}moving right", "a star"], [])


def test_yaml_lines_are_those_of_editors(tmp_path: Path) -> None:
    found, errors = prompts("a.yaml", "- a red\u2028circle\n- {seed: 1}\n- a\x85star\n", tmp_path)
    assert (found, errors) == (["a red circle", "a star"], [("2", "there is no prompt")])


def test_comments_and_empty_lines(tmp_path: Path) -> None:
    """Chat programs put U+200B into empty lines."""
    said = "# one\na red circle\n  # two\n\t#three\n \u200b \n\u3000\nred #2\n"
    assert prompts("a.txt", said, tmp_path) == (["a red circle", "red #2"], [])
    assert prompts("- text", said, tmp_path) == (["a red circle", "red #2"], [])
    assert prompts("a.jsonl", '# mine\n{"prompt": "a"}\n  # more\n', tmp_path) == (["a"], [])
    with pytest.raises(UserError, match="a.txt is empty"):
        prompts("a.txt", f"{MARK}\n# nothing\n\u200b\n", tmp_path)
    with pytest.raises(UserError, match="the prompt is empty"):
        Settings("\u200b \u2060").check()


@pytest.mark.parametrize("before", ["# my prompts\n", "\n\n", f"{MARK}# a\r\n{MARK}", "  # a\n  "])
def test_json_on_standard_input(before: str, tmp_path: Path) -> None:
    batch = make(read("-", stdin(f'{before}{{"prompt": "a red circle", "seed": 7}}\n'.encode())), {"seed": 0})
    assert [(job.given["prompt"], job.given["seed"]) for job in batch.jobs] == [("a red circle", 7)]
    assert not batch.errors


def test_braces_of_other_programs_are_text(tmp_path: Path) -> None:
    said = "{red|blue} circle\n[red:blue:0.5] circle\n[{red|blue}::10] circle\n(star:1.2), <lora:style:0.8>\n"
    for name in ("a.txt", "- text"):
        assert prompts(name, said, tmp_path) == (said.splitlines(), [])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('--prompt "a man surfing in hawaii" --negative_prompt "extra limbs" --steps 50', "settings in a line of text"),
        ("  --steps 20 --prompt a castle", "settings in a line of text"),
        ("Negative prompt: blurry", "settings in a line of text"),
        ("Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1", "settings in a line of text"),
        ('{"prompt": "a red circle"}', "JSON in a file of text"),
        ('[{"prompt": "a red circle"},', "JSON in a file of text"),
        ("[", "JSON in a file of text"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "- text"])
def test_lines_that_are_no_prompts_are_named_and_not_drawn(line: str, said: str, name: str, tmp_path: Path) -> None:
    found, ((where, why),) = prompts(name, f"a circle -- red\n{line}\n—a star\n", tmp_path)
    assert found == ["a circle -- red", "—a star"]
    assert where == "2"
    assert said in why


@pytest.mark.parametrize("odd", ["\0", "\x1b", "\x07", "\x08"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "- text"])
def test_characters_that_no_text_has(odd: str, name: str, tmp_path: Path) -> None:
    found, ((where, why),) = prompts(name, SAYS[name].format(f"a red{odd} circle", "a\tstar"), tmp_path)
    assert found == ["a\tstar"]
    assert where == ("2" if name == "a.csv" else "1")
    assert f"{odd!r} in a line, so it is not text" in why


@pytest.mark.parametrize("odd", ["\0", "\x1b"])
def test_control_characters_that_json_says(odd: str, tmp_path: Path) -> None:
    """A prompt may have them, as where a pipeline is called with it; a path may not, and no terminal gets to see them."""
    said = [{"prompt": f"a{odd}b"}, {"prompt": "a", "image": f"{odd}[2J.png"}]
    found, ((where, why),) = prompts("a.jsonl", "\n".join(map(json.dumps, said)), tmp_path)
    assert (found, where) == ([f"a{odd}b"], "2")
    assert why == f"the image contains {odd!r}: remove it"


@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "image", "lora", "preset"])
def test_half_a_surrogate_pair(field: str, tmp_path: Path) -> None:
    """Valid JSON, of which neither a tokenizer nor a manifest can be made."""
    said = [{"prompt": "a"} | {field: "a\ud800"}, {"prompt": "a star"}]
    found, ((where, why),) = prompts("a.jsonl", "\n".join(map(json.dumps, said)), tmp_path)
    assert (found, where) == (["a star"], "1")
    assert f"the {field.removesuffix('_prompt')} contains '\\ud800'" in why


def test_utf16_is_not_drawn(tmp_path: Path) -> None:
    for name in ("a.txt", "- text"):
        found, errors = prompts(name, "a red circle\n".encode("utf-16-le"), tmp_path)
        assert not found
        assert "'\\x00' in a line, so it is not text: save it as UTF-8" in errors[0][1]
        for content in ("a red circle\n".encode("utf-16"), "un château\n".encode("latin-1")):
            with pytest.raises(UserError, match="not UTF-8: save it as UTF-8"):
                prompts(name, content, tmp_path)


def test_no_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot read standard input"):
        read("-", None)  # as Python has it where it was closed


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    """The line's place goes into the manifest."""
    file = tmp_path / "ch\udce2teau.txt"
    file.write_text("a")
    assert read(str(file)) == [("ch?teau.txt line 1", "a")]


@pytest.mark.parametrize("image", ["~nobody-of-this-name/a.png", "x" * 5000, "a/" * 3000])
def test_paths_that_cannot_be(image: str, tmp_path: Path) -> None:
    lines = [{"prompt": "a", "image": image}, {"prompt": "a", "lora": image}]
    found, ((where, why),) = prompts("a.jsonl", "\n".join(map(json.dumps, lines)), tmp_path)
    assert (found, where) == (["a"], "1")
    assert "--image: no file" in why
    with pytest.raises(UserError, match="cannot read"):
        read(f"{image}.txt")


@pytest.mark.parametrize(
    ("said", "path", "scale"),
    [
        ("here@v2/style.safetensors", "here@v2/style.safetensors", "1"),
        ("here@v2/style.safetensors@0.8", "here@v2/style.safetensors", "0.8"),
        ("here@v2", "here@v2", "1"),
        ("half@0.5", "half@0.5", "1"),
        ("half@0.5@0.7", "half@0.5", "0.7"),
        ("~/half@0.5", "~/half@0.5", "1"),
        ("owner/style@0.5", "owner/style", "0.5"),
        ("owner/style@-1e-1", "owner/style", "-1e-1"),
        ("owner/style", "owner/style", "1"),
        ("gone@v2/style.safetensors", "gone@v2/style.safetensors", "1"),
        ("owner/style@main", "owner/style@main", "1"),
        ("owner/style@nan", "owner/style@nan", "1"),
        ("@1", "@1", "1"),
    ],
)
def test_lora_paths(said: str, path: str, scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there wins; a scale is a number."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here@v2").mkdir()
    for name in ("here@v2/style.safetensors", "half@0.5"):
        (tmp_path / name).touch()
    assert split_lora(said) == (path, scale)


def test_configurations_of_windows_editors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf{}\r\n")
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbf# mine\r\nmin_tokens = 0\r\n")
    for name in ("a.json", "a.toml"):
        assert call(monkeypatch, "render", "a", "--config", tmp_path / name, "--dry-run") == 0, capsys.readouterr().err
    assert call(monkeypatch, "show", "schedule", tmp_path / "a.json") == 0, capsys.readouterr().err


def test_the_command_line(tmp_path: Path) -> None:
    """Bytes on a real standard input, lines of JSON that every reader cuts alike, and an output that lacks the letters."""
    said = f"{MARK}a red circle\u2028moving\x85right 猫\n--prompt x\n".encode()
    run = subprocess.run(
        command("render", "--prompts", "-", "--dry-run", "--json", "--out", tmp_path),
        input=said, capture_output=True, env=environment(PYTHONIOENCODING="latin-1"),
    )  # fmt: skip
    (row,) = map(json.loads, run.stdout.decode().splitlines())
    assert row["settings"]["prompt"] == "a red circle\u2028moving\x85right 猫"
    assert run.stderr.startswith(b"fastdit: line 2: settings in a line of text")
    assert run.returncode == 1
    plain = subprocess.run(
        command("render", "ein Kreis 猫", "--dry-run"), capture_output=True, env=environment(PYTHONIOENCODING="latin-1")
    )
    assert (plain.returncode, plain.stderr) == (0, b"")
    assert r"'ein Kreis \u732b'" in plain.stdout.decode("latin-1")
    assert "9×32×32 = 9,216 tokens" in plain.stdout.decode("latin-1")


def test_a_record_is_one_line_to_every_reader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console, record = Console(False, True, False, tmp_path), {"where": "line 1", "error": "a\u2028b\x85c"}
    console.begin(0)
    console.done(record, "")
    console.failed(record)
    console.close()
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [record, record]
