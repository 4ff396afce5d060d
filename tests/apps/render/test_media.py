"""Files a player, a browser and a person will open: read back with ffmpeg and Pillow."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from util import decode, probe

from fastdit.apps.errors import UserError
from fastdit.apps.render.media import SLUG_LENGTH, contact_sheet, digest, ffmpeg, png, slug, to_uint8, write_mp4
from fastdit.apps.render.outputs import Outputs, write_json


def frames(count: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    """A bright square going right over a gradient."""
    clip = np.zeros((count, height, width, 3), np.float32)
    clip[..., 1] = np.linspace(0, 0.5, width)
    for f in range(count):
        clip[f, 8:24, 2 * f : 2 * f + 16, 0] = 1
    return clip


COMMENT = {"prompt": 'quotes " and \\ and ; = # newline\n and 北京 ü', "seed": 1, "config": {"phases": [[1.0, 0.5]]}}


def test_mp4_is_what_players_want(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, frames(), 8, COMMENT)
    said = probe(path)
    assert re.search(r"Video: h264 .*yuv420p.* 48x32.* 8 fps", said), said
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    seen = decode(path)
    assert seen.shape == (9, 32, 48, 3)
    error = np.abs(seen.astype(float) - to_uint8(frames()).astype(float)).mean()
    assert error < 8  # of 255: colours, order and orientation are right; chroma has half the resolution


def test_comment_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, frames(5), 8, COMMENT)
    run = subprocess.run([ffmpeg(), "-v", "error", "-i", str(path), "-f", "ffmetadata", "-"], capture_output=True, check=True)
    escaped = re.search(r"^comment=(.*?)(?<!\\)$", run.stdout.decode(), re.MULTILINE | re.DOTALL)
    assert escaped is not None
    assert json.loads(re.sub(r"\\(.)", r"\1", escaped[1], flags=re.DOTALL)) == COMMENT


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_mp4(tmp_path / name, frames(), 8, COMMENT)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_odd_size_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="even height and width, got 31 x 48"):
        write_mp4(tmp_path / "a.mp4", frames(height=31), 8, {})


def test_ffmpeg_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    with pytest.raises(UserError, match="/nowhere/ffmpeg does not run: unset it"):
        ffmpeg()


def test_ffmpeg_fails(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ffmpeg could not encode"):
        write_mp4(tmp_path / "no folder" / "a.mp4", frames(), 8, {})


def test_sheet_shows_time_order_and_settings(tmp_path: Path) -> None:
    dark, light = np.zeros((9, 32, 48, 3), np.float32), np.ones((9, 32, 48, 3), np.float32)
    rising = dark + np.linspace(0, 1, 9, dtype=np.float32)[:, None, None, None]
    picture = contact_sheet([("dense", rising), ("fast", light)], columns=3)
    (tmp_path / "a.png").write_bytes(png(picture, COMMENT))
    read = Image.open(tmp_path / "a.png")
    assert json.loads(read.text["fastdit"]) == COMMENT
    grey = np.asarray(read.convert("L"))
    cell = 144 + 4  # 48 pixels three times over, and the gap
    first_row = [int(grey[16 + 48, 4 + 72 + column * cell]) for column in range(3)]
    assert first_row == [0, 128, 255]
    assert grey.shape == (2 * (16 + 96 + 4) + 4, 3 * cell + 4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red circle, moving RIGHT!", "a-red-circle-moving-right"),
        ("Ünïcode café", "unicode-cafe"),
        ("../../etc/passwd", "etc-passwd"),
        ("a red circle\u2028moving\x85right", "a-red-circle-moving-right"),
        ("北京", "clip"),
        ("   ", "clip"),
        ("x" * 10_000, "x" * SLUG_LENGTH),
    ],
)
def test_slug(text: str, expected: str) -> None:
    assert slug(text) == expected


def test_slug_cuts_at_words() -> None:
    name = slug("word " * 2000)
    assert len(name) <= SLUG_LENGTH
    assert set(name.split("-")) == {"word"}


def test_digest_tells_settings_apart() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})


def test_outputs_appear_together(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with Outputs(folder, "a.json", "b [1].mp4") as out:
        for name in out.names:
            out[name].write_text(name)
            assert not (folder / name).exists()
        out.publish()
    assert sorted(os.listdir(folder)) == ["a.json", "b [1].mp4"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_outputs_leave_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with Outputs(tmp_path / "new", "a.json") as out:
            out["a.json"].write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert os.listdir(tmp_path) == []


def test_outputs_sweep_what_a_killed_run_left(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (tmp_path / f".a.mp4.{int(dead.stdout)}.part").touch()
    (tmp_path / f".a.mp4.{os.getppid()}.part").touch()
    (tmp_path / ".other.mp4.1.part").touch()
    with Outputs(tmp_path, "a.mp4"):
        pass
    assert sorted(os.listdir(tmp_path)) == [f".a.mp4.{os.getppid()}.part", ".other.mp4.1.part"]


@pytest.mark.parametrize("folder", ["file/below", "/proc/fastdit"])
def test_outputs_unwritable(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("I was here")
    with pytest.raises(UserError, match="choose another folder with --out"), Outputs(tmp_path / folder, "a.json"):
        pass
    assert (tmp_path / "file").read_text() == "I was here"


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"psnr": float("inf")})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "new" / "a.json", {"psnr": None})
    assert [path.read_text() for path in (tmp_path / "new").iterdir()] == ['{\n  "psnr": null\n}\n']
    with pytest.raises(UserError, match="choose another file with --out"):
        write_json(tmp_path / "new" / "a.json" / "below.json", {})
