"""Reading jobs: every format says the same, every mistake has its line, names stay in their folder."""

from __future__ import annotations

import io
import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdit import PRESETS, Config, Phase, Window
from fastdit.apps.errors import UserError
from fastdit.apps.render import jobs
from fastdit.apps.render.jobs import make, parse, read
from fastdit.apps.render.paths import _sha256

BASE = {"seed": 3, "preset": "fast"}
TWO = [
    {"prompt": "a red circle, moving", "seed": 7, "num_frames": 9, "guidance_scale": 1.5},
    {"prompt": "ein grüner Kreis – «so»", "height": 64},
]
FILES = {
    "a.jsonl": "\n".join(map(json.dumps, TWO)) + "\n\n",
    "a.csv": 'prompt,seed,num_frames,guidance_scale,height\n"a red circle, moving",7,9,1.5,\nein grüner Kreis – «so»,,,,64\n',
    "a.yaml": "- prompt: a red circle, moving\n  seed: 7\n  num_frames: 9\n  guidance_scale: 1.5\n"
    "- {prompt: ein grüner Kreis – «so», height: 64}\n",
}


@pytest.mark.parametrize("name", FILES)
def test_formats_agree(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    batch = make(read(str(tmp_path / name)), BASE)
    assert not batch.errors
    first, second = batch.jobs
    assert first.given == {"prompt": TWO[0]["prompt"], "seed": 7, "preset": "fast", "frames": 9, "guidance": 1.5}
    assert second.given == {"prompt": TWO[1]["prompt"], "seed": 3, "preset": "fast", "height": 64}
    assert [job.name for job in batch.jobs] == ["0000-a-red-circle-moving-s7", "0001-ein-gruner-kreis-so-s3"]
    assert second.where == {"a.jsonl": "a.jsonl line 2", "a.csv": "a.csv line 3", "a.yaml": "a.yaml line 5"}[name]


def test_text_and_standard_input(tmp_path: Path) -> None:
    text = "a red circle\n\n# not this\n  a blue square  \n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # as some editors on Windows begin a file
    assert read(str(tmp_path / "a.txt")) == [("a.txt line 1", "a red circle"), ("a.txt line 4", "a blue square")]
    assert read("-", io.StringIO(text)) == [("line 1", "a red circle"), ("line 4", "a blue square")]
    assert read("-", io.StringIO('{"prompt": "x"}\n')) == [("line 1", {"prompt": "x"})]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "cannot read"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b"\n \n", "is empty"),
        ("a.docx", b"a", "neither txt, csv, jsonl nor yaml"),
        ("a.csv", b"text,seed\na,1\n", "one of them `prompt`"),
        ("a.yaml", b"prompt: a\n", "must be a list"),
        ("a.yaml", b"- [a\n", "not yaml"),
        ("a.yaml", b"- !!python/object/apply:os.system [id]\n", "not yaml"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as told:
        read(str(tmp_path / name))
    assert told.value.code == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "expected a prompt or a mapping"),
        ('{"seed": 1}', "there is no prompt"),
        ('{"prompt": ""}', "there is no prompt"),
        ('{"prompt": 5}', "prompt must be text, got 5"),
        ('{"prompt": "a", "sparkle": 1}', "unknown key 'sparkle'"),
        ('{"prompt": "a", "num_frames": -5}', "--frames must be positive, got -5"),
        ('{"prompt": "a", "steps": "many"}', "steps must be a whole number, got 'many'"),
        ('{"prompt": "a", "steps": 2.5}', "steps must be a whole number, got '2.5'"),
        ('{"prompt": "a", "steps": true}', "steps must be a whole number"),
        ('{"prompt": "a", "seed": NaN}', "seed must be a whole number"),
        ('{"prompt": "a", "seed": 1e999}', "seed must be a whole number"),
        ('{"prompt": "a", "guidance": "inf"}', "guidance must be a number"),
        ('{"prompt": "a", "steps": 3, "num_inference_steps": 4}', "given twice"),
        ('{"prompt": "a", "image": "/nowhere/a.png"}', "no file /nowhere/a.png"),
        ('{"prompt": "a", "preset": "warp"}', "unknown preset 'warp'"),
        (json.dumps({"prompt": "a" * 10_000}), "10000 characters"),
        ('{"prompt": "first"}', "duplicate of a.jsonl line 1"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_bad_lines_are_named_and_the_others_kept(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "first"}}\n{line}\n{{"prompt": "last"}}\n')
    batch = make(read(str(tmp_path / "a.jsonl")), BASE)
    assert [job.given["prompt"] for job in batch.jobs] == ["first", "last"]
    ((where, why),) = batch.errors
    assert where == "a.jsonl line 2"
    assert said.replace("'2.5'", "2.5") in why.replace("'2.5'", "2.5")


def test_seeds_and_repeats() -> None:
    batch = make([("1", "a"), ("2", {"prompt": "b", "seed": 10})], BASE, repeat=3)
    assert [(job.index, job.given["prompt"], job.given["seed"]) for job in batch.jobs] == [
        (0, "a", 3), (1, "a", 4), (2, "a", 5), (3, "b", 10), (4, "b", 11), (5, "b", 12),
    ]  # fmt: skip
    with pytest.raises(UserError, match="--repeat must be at least 1"):
        make([("1", "a")], BASE, repeat=0)
    overlap = make([("1", "a"), ("2", {"prompt": "a", "seed": 5})], BASE, repeat=3)
    assert [where for where, _ in overlap.errors] == ["2"]


def test_hash_is_of_the_clip() -> None:
    def hash_of(**more: Any) -> str:
        return make([("1", {"prompt": "a"})], BASE | more).jobs[0].hash

    assert hash_of(device="cpu") == hash_of(cpu_offload="model") == hash_of(compile=True) == hash_of()
    config = Config(phases=(Phase(policy=Window(density=0.3)),))
    others = {hash_of(**more) for more in ({"seed": 4}, {"steps": 3}, {"fps": 9}, {"custom": config}, {"dtype": "float16"})}
    assert len(others | {hash_of()}) == 6
    assert make([("9", "b"), ("8", "a")], BASE).jobs[1].hash == hash_of()  # place and order do not matter


def test_hash_is_of_what_names_stand_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hash_of(**more: Any) -> str:
        return make([("1", {"prompt": "a"})], BASE | more).jobs[0].hash

    before = hash_of()
    assert hash_of(custom=PRESETS["fast"]) == hash_of(preset="fast", custom=PRESETS["fast"]) == before
    assert make([("1", "a")], {"seed": 3}).jobs[0].hash == hash_of(preset="balanced")  # said or not
    monkeypatch.setitem(PRESETS, "fast", Config(phases=(Phase(policy=Window(density=0.3)),)))  # as an upgrade does
    assert hash_of() != before

    picture, copy, lora = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "x.safetensors"
    for file in (picture, copy, lora):
        file.write_bytes(b"one")
    first, weighed = hash_of(image=str(picture)), hash_of(lora=f"{lora}@0.5")
    assert first == hash_of(image=str(copy)) != hash_of()
    assert hash_of(lora=str(lora)) == hash_of(lora=f"{lora}@1") != weighed
    for file in (picture, lora):
        file.write_bytes(b"another")
    assert hash_of(image=str(picture)) != first
    assert hash_of(lora=f"{lora}@0.5") != weighed
    assert hash_of(lora=str(tmp_path)) != hash_of(lora="somebody/style")  # a folder, an id: by their names

    marked = tmp_path / "a@2"  # a file, and no scale of 2
    marked.write_bytes(b"another")
    assert hash_of(lora=str(marked)) == hash_of(lora=str(lora))
    assert hash_of(lora=f"{marked}@0.5") == hash_of(lora=f"{lora}@0.5")


def test_a_file_is_read_once_for_many_jobs(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(bytes(1000))
    reads = _sha256.cache_info().misses
    batch = make([(str(i), {"prompt": f"a {i}", "image": str(picture)}) for i in range(50)], BASE)
    assert len({job.hash for job in batch.jobs}) == 50
    assert _sha256.cache_info().misses == reads + 1


def test_a_line_may_leave_the_configuration_for_a_preset() -> None:
    config = Config(phases=(Phase(policy=Window(density=0.3)),))
    plain, other = make([("1", "a"), ("2", {"prompt": "a", "preset": "exact"})], BASE | {"custom": config}).jobs
    assert plain.settings().config() == config
    assert other.settings().config() == Config()


@pytest.mark.parametrize(
    "template",
    [
        "../{slug}",
        "a/b",
        "{slug",
        "{nothing}",
        "{0}",
        "",
        " ",
        ".{slug}",
        "a\\b",
        "a\0b",
        "a\nb",
        "{seed.real}",
        "{index:z}",
        "\udce2{slug}",
        "c:{slug}",
    ],
)
def test_names_that_are_refused(template: str) -> None:
    with pytest.raises(UserError, match="--name"):
        make([("1", "a")], BASE, name=template)


def test_names_that_are_too_long_or_alike() -> None:
    with pytest.raises(UserError, match=r"makes a name of \d+ bytes"):
        make([("1", "a")], BASE, name="ü" * 150 + "{slug}")
    first, second = make([("1", "a"), ("2", "b")], BASE, name="clip").jobs
    assert (first.name, second.name) == ("clip", f"clip-{second.hash[:8]}")


@given(st.text(max_size=300))
def test_no_prompt_leaves_the_folder(prompt: str) -> None:
    batch = make([("1", {"prompt": prompt})], BASE)
    for job in batch.jobs:
        assert set(job.name) <= set(string.ascii_lowercase + string.digits + "-")
        assert len(job.name) < 100


KEYS = st.sampled_from([*jobs.KINDS, *jobs.ALIASES, "other"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(st.recursive(LEAVES, lambda x: st.lists(x) | st.dictionaries(KEYS, x), max_leaves=8))
def test_whatever_a_line_says_is_a_job_or_an_error(said: Any) -> None:
    batch = make([("1", said)], BASE)
    assert len(batch.jobs) + len(batch.errors) == 1
    try:
        assert "prompt" in parse(said)
    except UserError:
        assert batch.errors
