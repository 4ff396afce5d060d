"""`fastdit bench`: rows that say everything, kept over interruptions, and the table made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from util import call

from fastdit import PRESETS, Config, Dense, Phase, Window
from fastdit.apps.bench.markdown import cpu_name
from fastdit.apps.bench.presets import BEGIN, END, markdown, read_rows, run, write_table
from fastdit.apps.compare import measure
from fastdit.apps.errors import UserError
from fastdit.apps.sizes import FRAMES, parse_size

SIZES = [(5, 32, 32), (9, 64, 64)]
FIELDS = (
    "date cpu cores threads torch diffusers shape tokens dtype steps preset baseline includes "
    "dense_s fast_s ratio density psnr_db ssim velocity_error repeats"
)


@pytest.fixture
def measured(saved_pipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of a bench of two presets, one of them sparse on small clips."""
    sparse = Config((Phase((1.0, 0.8), Dense()), Phase((0.8, 0.0), Window(density=0.3))), tile=(1, 2, 2), min_tokens=0)
    monkeypatch.setitem(PRESETS, "fast", sparse)
    out = tmp_path / "results" / "bench.json"
    return {
        "out": out,
        "sizes": SIZES,
        "presets": ["balanced", "fast"],
        "steps": 3,
        "repeats": 2,
        "model": str(saved_pipe),
    }


def test_rows_and_table(measured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run(**measured)
    assert rows == read_rows(measured["out"])
    assert [(row["shape"], row["preset"]) for row in rows] == [
        (shape, preset) for shape in ("5x32x32", "9x64x64") for preset in ("balanced", "fast")
    ]
    for row in rows:
        assert set(row) >= set(FIELDS.split())
        assert row["ratio"] == pytest.approx(row["dense_s"] / row["fast_s"])
        assert row["tokens"] == (8 if row["shape"] == "5x32x32" else 48)
    assert rows[2]["psnr_db"] is None  # too short for `balanced`: dense, and equal to it
    assert "48 tokens, this CPU needs" in rows[2]["stayed_dense"]
    assert rows[3]["stayed_dense"] is None
    assert rows[3]["density"] < 1
    readme = tmp_path / "README.md"
    readme.write_text(f"# A\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    assert call(monkeypatch, "bench", "--out", measured["out"], "--table", readme) == 0
    text = readme.read_text()
    assert text.startswith(f"# A\n\n{BEGIN}\n| clip ")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "old" not in text
    assert text.count("\n| ") == 1 + len(rows)
    assert f"**{rows[3]['ratio']:.2f} ×**" in text
    assert "stays dense" in text
    write_table(readme, rows)
    assert readme.read_text() == text


def test_goes_on_where_it_stopped(measured: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = measure.measure, []

    def interrupted(pipe: Any, settings: Any, configs: Any, repeats: int) -> Any:
        if (settings.frames, list(configs)) == (9, ["balanced", "fast"]) and len(asked) == 1:
            asked.append("interrupt")
            raise KeyboardInterrupt
        asked.append(f"{settings.frames} {' '.join(configs)}")
        return real(pipe, settings, configs, repeats, show=False)

    monkeypatch.setattr(measure, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(**measured)
    first = read_rows(measured["out"])
    assert [row["shape"] for row in first] == ["5x32x32"] * 2
    rows = run(**measured)
    assert asked == ["5 balanced fast", "interrupt", "9 balanced fast"]
    assert rows[:2] == first
    assert len(rows) == 4
    run(**measured | {"steps": 2, "sizes": SIZES[:1], "presets": ["fast"]})
    assert len(read_rows(measured["out"])) == 5
    run(**measured | {"sizes": SIZES[:1], "again": True})
    assert asked[-2:] == ["5 fast", "5 balanced fast"]
    assert len(read_rows(measured["out"])) == 5


def test_nothing_is_written_for_wrong_usage(measured: dict[str, Any], tmp_path: Path) -> None:
    for change, said in (
        ({"presets": ["warp"]}, "unknown preset 'warp'"),
        ({"repeats": 0}, "--repeats must be at least 1"),
        ({"steps": 0}, "--steps must be at least 1"),
    ):
        with pytest.raises(UserError, match=said) as told:
            run(**measured | change)
        assert told.value.code == 2
    assert not measured["out"].exists()
    with pytest.raises(UserError, match="got 33: nearest is 32"):
        run(**measured | {"sizes": [(5, 33, 32)]})


def test_files_of_another_kind(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    for content in ("not JSON", "[]", '{"rows": [{"a": 1}]}'):
        other.write_text(content)
        with pytest.raises(UserError, match="does not hold rows of fastdit bench"):
            read_rows(other)
        assert other.read_text() == content
    with pytest.raises(UserError, match="measure first"):
        read_rows(tmp_path / "none.json", must_exist=True)
    other.write_text("# no markers")
    with pytest.raises(UserError, match="has no <!-- bench:main -->"):
        write_table(other, [])
    assert other.read_text() == "# no markers"


def test_sizes() -> None:
    assert parse_size(" 33x256x256", "--sizes") == (33, 256, 256)
    for wrong in ("33x256", "", "axbxc", "33x0x256", "33x256x256x1"):
        with pytest.raises(UserError, match="--sizes: .* is not frames x height x width"):
            parse_size(wrong, "--sizes", FRAMES)


def test_machine() -> None:
    assert cpu_name()
    assert markdown([]).startswith("| clip ")
