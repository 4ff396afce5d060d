"""Batches as a studio leaves them running: bad lines, kills, full disks, workers that die. Real processes throughout."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from util import call, command, decode, environment, fastdit

from fastdit.apps.render.manifest import FILE, read

TINY = ["--frames", 5, "--height", 32, "--width", 32, "--steps", 2]
BAD = [
    "{not json",
    '{"prompt": "a", "sparkle": 1}',
    '{"prompt": "a", "num_frames": -5}',
    json.dumps({"prompt": "a" * 10_000}),
    '{"prompt": "a", "image": "/nowhere.png"}',
    '{"prompt": "a red circle 0", "seed": 0}',
    '{"seed": 3}',
    '{"prompt": "a", "steps": "many"}',
    '{"prompt": "a", "preset": "warp"}',
    "[]",
]
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: process groups, tmpfs, /proc")


def hashes(out: Path) -> dict[str, str]:
    return {key: record["frames_sha256"] for key, record in read(out).items() if record["state"] == "done"}


def prompts(path: Path, count: int) -> Path:
    """`count` lines, ten of them bad, at places that a seed decides."""
    lines = [json.dumps({"prompt": f"a red circle {i}", "seed": i % 3}) for i in range(count - len(BAD))]
    places = sorted(random.Random(0).sample(range(1, count), len(BAD)))
    for place, bad in zip(places, BAD, strict=True):
        lines.insert(place, bad)
    path.write_text("\n".join(lines) + "\n")
    return path


@linux
@pytest.mark.parametrize(("count", "kills"), [(34, 3), pytest.param(200, 5, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_as_undisturbed(count: int, kills: int, tmp_path: Path) -> None:
    file, calm, storm = prompts(tmp_path / "p.jsonl", count), tmp_path / "calm", tmp_path / "storm"
    run = subprocess.run(
        command("render", "--prompts", file, *TINY, "-o", calm), capture_output=True, text=True, env=environment(), timeout=900
    )
    assert run.returncode == 1
    good = count - len(BAD)
    errors = [line for line in run.stderr.splitlines() if line.startswith("fastdit: p.jsonl line ")]
    assert len(errors) == len(BAD), run.stderr
    assert f"{good} rendered, {len(BAD)} failed" in run.stdout
    assert len(hashes(calm)) == len(list(calm.glob("*.mp4"))) == good

    dice = random.Random(1)
    for _ in range(kills):
        process = subprocess.Popen(
            command("render", "--prompts", file, *TINY, "-o", storm), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            env=environment(), start_new_session=True,
        )  # fmt: skip
        before, limit = len(read(storm)), time.monotonic() + 600
        while len(read(storm)) < before + max(1, good // (kills + 2)) and process.poll() is None:
            assert time.monotonic() < limit
            time.sleep(0.01)
        time.sleep(dice.random() * 0.3)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = len(hashes(storm))
    assert 0 < done < good, "the kills came too late to prove anything"
    last = fastdit("render", "--prompts", file, *TINY, "-o", storm)
    assert f"{good - done} rendered, {done} there already, {len(BAD)} failed" in last.stdout or done + 1 == good, last.stdout
    assert hashes(storm) == hashes(calm)
    lines = [json.loads(line) for line in (storm / FILE).read_text().splitlines()]
    assert len(lines) == len({line["job"] for line in lines}), "a job was rendered again after it had finished"
    names = {path.name for path in storm.iterdir()}
    assert names - {".fastdit.lock"} == {path.name for path in calm.iterdir()}
    again = fastdit("render", "--prompts", file, *TINY, "-o", storm)
    assert f"{good} there already" in again.stdout
    assert " rendered" not in again.stdout


def test_every_format_and_the_sidecar(tmp_path: Path) -> None:
    lines = [{"prompt": "a red circle", "format": kind} for kind in ("mp4", "webp", "gif", "png")]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    run = fastdit("render", "--prompts", tmp_path / "p.jsonl", *TINY, "-o", out, "--name", "{hash}", "--json")
    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in run.stdout.splitlines()]
    assert len({record["frames_sha256"] for record in records}) == 1
    mp4, webp, gif, png = (out / record["file"] for record in records)
    assert decode(mp4).shape == (5, 32, 32, 3)
    assert (Image.open(webp).n_frames, Image.open(gif).n_frames) == (5, 5)
    assert Image.open(webp).format == "WEBP"
    assert png.name.endswith("-0004.png")
    assert Image.open(png).size == (32, 32)
    for record in records:
        beside = json.loads((out / f"{record['name']}.json").read_text())
        assert {key: beside[key] for key in record} == record
        assert beside["report"]["sites"]


def workers(pid: int) -> list[int]:
    """Processes that a driver has spawned for jobs, the oldest first."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_workers_draw_the_same_and_survive_a_death(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("\n".join(f"a red circle {i}" for i in range(12)))
    small = [*TINY, "--threads", 1]  # sums round by the number of threads: on some processors that shows in a pixel
    fastdit("render", "--prompts", file, *small, "-o", tmp_path / "one")
    process = subprocess.Popen(
        command("render", "--prompts", file, *small, "-o", tmp_path / "two", "--workers", 2),
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    limit = time.monotonic() + 600
    for done in (0, 2):  # one dies of its first job, while it still imports PyTorch; another at work, or waiting for it
        while len(read(tmp_path / "two")) < done or len(found := workers(process.pid)) < 2:
            assert time.monotonic() < limit
            time.sleep(0.01)
        os.kill(found[0], signal.SIGKILL)
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "12 rendered" in said
    assert "died (exit status -9): trying again" in errors
    assert len(hashes(tmp_path / "one")) == 12
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")


@linux
def test_disk_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "none", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        file = tmp_path / "p.txt"
        file.write_text("\n".join(f"a red circle {i}" for i in range(12)))
        run = fastdit("render", "--prompts", file, *TINY, "-o", disk / "out")
        assert run.returncode == 1
        assert "is full" in run.stderr.splitlines()[-1]
        assert "Traceback" not in run.stderr
        done = hashes(disk / "out")
        assert 0 < len(done) < 12
        for record in read(disk / "out").values():
            assert decode(disk / "out" / record["file"]).shape == (5, 32, 32, 3)
        assert not list((disk / "out").glob("*.part"))
        subprocess.run(["mount", "-o", "remount,size=10m", disk], check=True)
        run = fastdit("render", "--prompts", file, *TINY, "-o", disk / "out")
        assert run.returncode == 0, run.stderr
        assert f"{12 - len(done)} rendered, {len(done)} there already" in run.stdout
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupt_ends_the_batch_in_order(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("\n".join(f"a red circle {i}" for i in range(300)))
    process = subprocess.Popen(
        command("render", "--prompts", file, *TINY, "-o", tmp_path / "out"), stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env=environment(), preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    limit = time.monotonic() + 600
    while len(read(tmp_path / "out")) < 2:
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert "stopping after this step" in errors
    done = len(hashes(tmp_path / "out"))
    assert f"{done} rendered, {300 - done} left" in said
    assert len(list((tmp_path / "out").glob("*.mp4"))) == done


def test_one_failing_job_does_not_stop_the_others(tmp_path: Path) -> None:
    lines = [{"prompt": "a"}, {"prompt": "b", "height": 35}, {"prompt": "c", "frames": 6}, {"prompt": "d"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    run = fastdit("render", "--prompts", tmp_path / "p.jsonl", *TINY, "-o", out)
    assert run.returncode == 1
    assert "2 rendered, 2 failed" in run.stdout
    assert "p.jsonl line 2: --height must be a multiple of" in run.stdout
    states = [record["state"] for record in read(out).values()]
    assert states == ["done", "failed", "failed", "done"]
    quiet = fastdit("render", "--prompts", tmp_path / "p.jsonl", *TINY, "-o", out, "--quiet")
    assert quiet.stdout == ""
    assert len(quiet.stderr.splitlines()) == 2


def test_a_batch_has_a_page_and_a_log_has_a_line_a_clip(tmp_path: Path) -> None:
    prompts = ["a <b>red</b> circle", "a blue square"]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    out = tmp_path / "out"
    run = fastdit("render", "--prompts", tmp_path / "p.txt", *TINY, "-o", out)
    assert run.returncode == 0, run.stderr
    records = list(read(out).values())
    lines = [line for line in run.stderr.splitlines() if " of 2: " in line]
    assert [line.split(", ")[0] for line in lines] == [f"fastdit: {i + 1} of 2: {r['file']}" for i, r in enumerate(records)]
    assert "it/s" not in run.stderr
    assert "\r" not in run.stderr
    page = (out / "index.html").read_text()
    assert page.count("<figure>") == 2
    assert "a &lt;b&gt;red&lt;/b&gt; circle" in page
    assert "<b>" not in page
    assert [name for record in records if (name := record["file"]) not in page] == []
    (out / "index.html").write_text("somebody's own")
    assert fastdit("render", "--prompts", tmp_path / "p.txt", *TINY, "-o", out).returncode == 0
    assert (out / "index.html").read_text() == "somebody's own"


def test_dry_run_and_standard_input(tmp_path: Path) -> None:
    run = subprocess.run(
        command("render", "--prompts", "-", "--dry-run", "--json", "--repeat", 2, "-o", tmp_path / "out"),
        input="a red circle\na blue square\n", capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert [(row["where"], row["settings"]["seed"]) for row in rows] == [
        ("line 1", 0), ("line 1", 1), ("line 2", 0), ("line 2", 1),
    ]  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_configuration_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    files = {
        "a.toml": '[[phases]]\nsigma = [0.9, 0.0]\npolicy = {name = "window", density = 0.3}\n',
        "a.yaml": "phases:\n- sigma: [0.9, 0.0]\n  policy: {name: window, density: 0.3}\n",
        "a.json": '{"phases": [{"sigma": [0.9, 0.0], "policy": {"name": "window", "density": 0.3}}]}',
    }
    told = set()
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        assert call(monkeypatch, "render", "a", "--config", tmp_path / name, "--dry-run", "--json") == 0
        told.add(json.dumps(json.loads(capsys.readouterr().out)["settings"]["config"]))
    assert len(told) == 1
    assert '"density": 0.3' in told.pop()
    wrong = {"a.toml": "x =", "b.json": '{"phasen": []}', "c.yaml": "- 1", "d.json": '{"phases": [{"sigma": 5}]}'}
    for name, content in wrong.items():
        (tmp_path / name).write_text(content)
        assert call(monkeypatch, "render", "a", "--config", tmp_path / name, "--dry-run") == 2
        said = capsys.readouterr().err
        assert "is no configuration" in said
        assert len(said.splitlines()) == 1


def test_pictures_of_an_image_pipeline(tmp_path: Path) -> None:
    """A Flux of the real classes, saved and given by -m: its own defaults, png, no frames."""
    from util import tiny_flux_pipeline

    tiny_flux_pipeline().save_pretrained(tmp_path / "flux")
    out = tmp_path / "out"
    run = fastdit("render", "a red circle", "-m", tmp_path / "flux", "--height", 32, "--width", 48, "--steps", 2, "-o", out)
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "0000-a-red-circle-s0.json", "0000-a-red-circle-s0.png", FILE,
    ]  # fmt: skip
    assert Image.open(out / "0000-a-red-circle-s0.png").size == (48, 32)
    run = fastdit("render", "a red circle", "-m", tmp_path / "flux", "--height", 32, "--width", 48, "--frames", 5, "-o", out)
    assert "makes single images" in run.stderr


def test_removed_output_folder(tmp_path: Path) -> None:
    file, out = tmp_path / "p.txt", tmp_path / "out"
    file.write_text("\n".join(f"a red circle {i}" for i in range(16)))
    process = subprocess.Popen(
        command("render", "--prompts", file, *TINY, "-o", out), stderr=subprocess.PIPE, text=True, env=environment()
    )
    limit = time.monotonic() + 600
    while len(read(out)) < 3:
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.rename(out, tmp_path / "moved")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "going on in a new one" in errors
    assert len(read(out)) == 16
    files = {path.name for folder in (out, tmp_path / "moved") for path in folder.glob("*.mp4")}
    assert len(files) == 16
    shutil.rmtree(tmp_path / "moved")
    again = fastdit("render", "--prompts", file, *TINY, "-o", out)  # those that went with the old folder
    assert again.returncode == 0
    assert len(list(out.glob("*.mp4"))) == 16


def test_no_prompt_reaches_out_of_the_folder(tmp_path: Path) -> None:
    lines = ["../../etc/passwd", "/etc/passwd", "北京/東京", "a\\b", "..", "C:\\x", "\u202emp4.exe", "a\u0000b", "é" * 300]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"prompt": line, "frames": 1, "steps": 1}) for line in lines))
    before = sorted(path.name for path in tmp_path.iterdir())
    run = fastdit("render", "--prompts", tmp_path / "p.jsonl", *TINY, "-o", tmp_path / "out", "--name", "{slug}")
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "out"])
    assert len(hashes(tmp_path / "out")) == len(lines)
    for record in read(tmp_path / "out").values():
        assert (tmp_path / "out" / record["file"]).resolve().parent == tmp_path / "out"
        assert record["settings"]["prompt"] in lines
