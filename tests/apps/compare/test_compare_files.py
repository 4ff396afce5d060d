"""`fastdit compare`: numbers of clips whose difference is known, pictures that can be read, and every mistake in a line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from util import call, decode

from fastdit.apps.compare.files import clips, read
from fastdit.apps.render.media import encode


def film(count: int = 5, height: int = 33, width: int = 40, shift: float = 0.0) -> np.ndarray:
    """A gradient that moves, and a rectangle; `shift` is added to the rectangle alone."""
    frames = np.zeros((count, height, width, 3), np.float32)
    frames += np.linspace(0.2, 0.6, width, dtype=np.float32)[None, None, :, None]
    for f in range(count):
        frames[f, 8:16, 8 + f : 16 + f] = 0.3 + shift
    return frames


def write(path: Path, frames: np.ndarray, fps: int = 8) -> Path:
    """In the format that its name says; of png, only what one frame gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in encode(frames, path.suffix[1:], fps, 0, {}).items():
        (path.parent / (path.stem + suffix)).write_bytes(content)
    return path


def test_pictures_have_the_difference_that_was_put_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a" / "x.png", film(4))
    write(tmp_path / "b" / "x.png", film(4, shift=0.2))
    assert call(monkeypatch, "compare", tmp_path / "a", tmp_path / "b", "--json", "-o", tmp_path / "out") == 0
    row = json.loads(capsys.readouterr().out)
    assert (row["clip"], row["frames"], row["identical"]) == ("x.png", 4, False)
    share = 64 / (33 * 40)
    assert row["psnr_db"] == pytest.approx(-10 * np.log10(0.2**2 * share), abs=0.2)  # 8 bits round
    assert row["difference_peak"] == pytest.approx(0.2, abs=0.005)
    assert 0 < row["ms_ssim"] < 1
    assert row["flicker_db"] > row["psnr_db"]  # the rectangle moves: only its edges change
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["x-difference.png", "x-sheet.png", "x-side.mp4", "x.json"]
    assert json.loads((out / "x.json").read_text()) == row
    heat = np.asarray(Image.open(out / "x-difference.png")).astype(int)
    assert heat.shape == (33, 40, 3)
    assert heat[12, 12].sum() > heat[30, 30].sum() + 200  # where they differ it is lighter
    side = decode(out / "x-side.mp4").astype(int)
    assert side.shape == (4, 34, 120, 3)
    assert np.abs(side[0, :33, :40] - 255 * film(1)[0]).mean() < 6
    assert np.abs(side[0, :33, 40:80] - 255 * film(1, shift=0.2)[0]).mean() < 6
    assert call(monkeypatch, "compare", tmp_path / "a", tmp_path / "b", "-o", out) == 1
    assert "exists already" in capsys.readouterr().err
    assert call(monkeypatch, "compare", tmp_path / "a", tmp_path / "b", "-o", out, "--overwrite") == 0


@pytest.mark.parametrize("kind", ["mp4", "webp", "gif"])
def test_equal_files_of_every_format(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / f"x.{kind}", film(5, 32, 40), fps=10)
    assert read([path]).frames.shape == (5, 32, 40, 3)
    assert read([path]).fps == pytest.approx(10, rel=0.01)
    assert call(monkeypatch, "compare", path, path) == 0
    heads, values, *rest = capsys.readouterr().out.splitlines()
    assert heads.split() == ["PSNR", "SSIM", "MS-SSIM", "flicker", "LPIPS", "clip"]
    assert values.split() == ["equal", "1.0000", "1.0000", "equal", "-", "x"]
    assert rest[0] == "PSNR and flicker in dB; MS-SSIM of 2 scales"
    assert rest[1].startswith("no LPIPS: ")


def test_folders_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder / "both.mp4", film(5, 32, 40, 0.1 if folder == "b" else 0))
        write(tmp_path / folder / "length.mp4", film(5 if folder == "a" else 6, 32, 40))
        write(tmp_path / folder / "pöster.png", film(1))
        (tmp_path / folder / "both-sheet.png").write_bytes(b"no clip")
        (tmp_path / folder / "both.json").write_text("{}")
    write(tmp_path / "a" / "alone.gif", film(2))
    (tmp_path / "b" / "broken.mp4").write_bytes(b"nothing")
    (tmp_path / "a" / "broken.mp4").write_bytes(b"nothing")
    assert list(clips(tmp_path / "b")) == ["both.mp4", "broken.mp4", "length.mp4", "pöster.png"]
    assert call(monkeypatch, "compare", tmp_path / "a", tmp_path / "b") == 1
    said = capsys.readouterr()
    assert [row.split()[-1] for row in said.out.splitlines()[1:3]] == ["both.mp4", "pöster.png"]
    assert "mean of 2" in said.out
    errors = said.err.splitlines()
    assert len(errors) == 3
    assert all(error.startswith("fastdit: ") for error in errors)
    assert "alone.gif is missing in" in errors[0]
    assert "broken.mp4 as a clip" in errors[1]
    assert "has 5 frames of 40 x 32" in errors[2]
    assert "has 6 frames" in errors[2]


def test_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a" / "x.png", film(1))
    small = write(tmp_path / "small.png", film(1)[:, :8, :8])
    (tmp_path / "empty").mkdir()
    cases = [
        ((path, tmp_path / "no.mp4"), 2, "no such file or folder"),
        ((path, tmp_path), 2, "two files or two folders"),
        ((tmp_path / "a", tmp_path / "empty"), 1, "have no clip of the same name"),
        ((small, small), 1, "at least 11 x 11 pixels"),
        ((path,), 2, "give two clips or two folders, or say what to draw"),
    ]
    for arguments, code, said in cases:
        assert call(monkeypatch, "compare", *arguments) == code
        errors = capsys.readouterr().err
        assert said in errors
        assert len(errors.splitlines()) == 1
