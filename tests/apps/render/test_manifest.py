"""The manifest: whole lines, one process at a time, nothing outside the folder, and whatever happens to the disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from util import environment

from fastdit.apps.errors import UserError
from fastdit.apps.render import manifest as module
from fastdit.apps.render.manifest import FILE, LOCK, Manifest, read

FILES = {".json": b'{"job": "a", "file": "clip.mp4", "state": "done", "report": {}}', ".mp4": b"film"}


def done(job: str, **more: Any) -> dict[str, Any]:
    return {"job": job, "state": "done", "file": f"{job}.mp4", "name": job} | more


def test_last_line_counts_and_order_is_of_appending(tmp_path: Path) -> None:
    with Manifest(tmp_path) as manifest:
        manifest.append(done("a", finished="2030-01-01T00:00:00+00:00"))
        manifest.append({"job": "b", "state": "failed", "error": "ü\n"})
        manifest.append(done("b", finished="1999-01-01T00:00:00+00:00"))  # a clock that was set back
        manifest.append(done("a", again=True))
    records = read(tmp_path)
    assert list(records) == ["b", "a"]
    assert records["a"]["again"]
    assert records["b"]["state"] == "done"
    assert len((tmp_path / FILE).read_text().splitlines()) == 4
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_half_a_line_is_dropped(cut: int, tmp_path: Path) -> None:
    whole = json.dumps(done("a")) + "\n"
    half = json.dumps(done("b"))[:cut]
    (tmp_path / FILE).write_text(whole + half)
    with Manifest(tmp_path) as manifest:
        assert list(manifest.records) == ["a"]
        manifest.append(done("c"))
    assert list(read(tmp_path)) == ["a", "c"]
    assert (tmp_path / FILE).read_text().startswith(whole)


def test_broken_lines_are_skipped(tmp_path: Path) -> None:
    lines = ["nonsense", "[]", "5", '{"job": "x"}', json.dumps(done("a")), "\x00\x00", '{"job": ["x"], "state": 1}']
    (tmp_path / FILE).write_text("\n".join(lines) + "\n")
    assert list(read(tmp_path)) == ["a"]


def test_a_mark_of_byte_order_hides_no_record(tmp_path: Path) -> None:
    """As an editor on Windows leaves it: what is done stays done, by the manifest and by the file beside a clip."""
    mark = b"\xef\xbb\xbf"
    (tmp_path / FILE).write_bytes(
        mark + json.dumps(done("a", settings={"prompt": "x\u2028y"}), ensure_ascii=False).encode() + b"\r\n"
    )
    (tmp_path / "clip.json").write_bytes(mark + FILES[".json"].replace(b'"a"', b'"b"'))
    for name in ("a.mp4", "clip.mp4"):
        (tmp_path / name).write_bytes(b"film")
    assert read(tmp_path)["a"]["settings"]["prompt"] == "x\u2028y"
    with Manifest(tmp_path) as manifest:
        assert manifest.finished("a", "a") == manifest.records["a"]
        assert manifest.finished("b", "clip") == {"job": "b", "file": "clip.mp4", "state": "done"}


def test_nothing_done_leaves_nothing(tmp_path: Path) -> None:
    with Manifest(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / FILE).exists()
    assert not (tmp_path / "a" / "b").exists()


def test_finished_only_while_the_clip_is_there(tmp_path: Path) -> None:
    with Manifest(tmp_path) as manifest:
        manifest.publish("a", "clip", FILES)
        manifest.append(done("a", file="clip.mp4"))
        assert manifest.finished("a", "clip")
        (tmp_path / "clip.mp4").unlink()
        assert manifest.finished("a", "clip") is None


def test_killed_between_files_and_line(tmp_path: Path) -> None:
    with Manifest(tmp_path) as manifest:
        manifest.publish("a", "clip", FILES)
        assert not manifest.records
    with Manifest(tmp_path) as manifest:
        assert manifest.finished("b", "clip") is None
        assert manifest.finished("a", "clip") == {"job": "a", "file": "clip.mp4", "state": "done"}
    assert list(read(tmp_path)) == ["a"]


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"mine")
    with Manifest(tmp_path) as manifest:
        with pytest.raises(UserError, match=r"clip\.mp4 is in the way"):
            manifest.publish("a", "clip", FILES)
        assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "clip.mp4", FILE]
        manifest.publish("a", "clip", FILES, overwrite=True)
        assert (tmp_path / "clip.mp4").read_bytes() == b"film"
        manifest.publish("a", "clip", FILES)  # now it is ours
        with pytest.raises(UserError, match=r"clip\.json is in the way"):
            manifest.publish("b", "clip", FILES)
        manifest.append(done("a", name="clip"))
        assert manifest.name("a", "other") == "clip"
        assert manifest.name("b" * 16, "clip") == "clip-bbbbbbbb"


@pytest.mark.parametrize("target", ["outside.mp4", "nowhere.mp4"])
def test_a_link_in_the_way(target: str, tmp_path: Path) -> None:
    """What a link points to is not written; the link itself is replaced only when that is asked for."""
    (tmp_path / "outside.mp4").write_bytes(b"mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / "clip.mp4").symlink_to(tmp_path / target)
    with Manifest(out) as manifest:
        with pytest.raises(UserError, match="in the way"):
            manifest.publish("a", "clip", FILES)
        manifest.publish("a", "clip", FILES, overwrite=True)
    assert not (out / "clip.mp4").is_symlink()
    assert (tmp_path / "outside.mp4").read_bytes() == b"mine"
    assert not (tmp_path / "nowhere.mp4").exists()


@pytest.mark.parametrize("name", [FILE, LOCK])
def test_a_link_for_manifest_or_lock_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / name).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="cannot write into"), Manifest(out):
        pass
    assert (tmp_path / "outside").read_bytes() == b"mine"


def test_two_processes(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from fastdit.apps.render.manifest import Manifest\n"
    code += "with Manifest(Path(sys.argv[1])): "
    other = subprocess.Popen(
        [sys.executable, "-c", code + "print('in', flush=True); sys.stdin.read()", tmp_path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert other.stdout is not None
    assert other.stdout.readline() == "in\n"
    with pytest.raises(UserError, match="another fastdit is writing into"), Manifest(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()
    other.kill()  # the lock goes with its process
    other.communicate()
    with Manifest(tmp_path) as manifest:
        manifest.append(done("a"))


def test_folder_removed_under_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    out = tmp_path / "out"
    with Manifest(out) as manifest:
        manifest.append(done("a"))
        shutil.rmtree(out)
        manifest.publish("b", "b", FILES)
        manifest.append(done("b"))
        with pytest.raises(UserError, match="another fastdit"), Manifest(out):
            pass
    assert "was removed or replaced under way" in capsys.readouterr().err
    assert list(read(out)) == ["a", "b"]
    assert (out / "b.mp4").read_bytes() == b"film"


def test_a_write_that_fails_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that takes half a line and then is full."""
    with Manifest(tmp_path) as manifest:
        manifest.append(done("a"))
        write, calls = os.write, []

        def full(file: int, text: bytes) -> int:
            calls.append(text)
            if len(calls) > 1:
                raise OSError(28, "No space left on device")
            return write(file, text[:20])

        monkeypatch.setattr(module.os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            manifest.append(done("b"))
        monkeypatch.undo()
        manifest.append(done("c"))
    assert [json.loads(line)["job"] for line in (tmp_path / FILE).read_text().splitlines()] == ["a", "c"]
