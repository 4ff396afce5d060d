"""`fastdit doctor` says what is so, also where something is broken; `fastdit models` and docs/families.md are one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from util import call

from fastdit.apps.bench import attention
from fastdit.apps.cli import doctor
from fastdit.apps.cli import list as lists
from fastdit.core.quant import Quant
from fastdit.kernels import launch
from fastdit.pipelines.registry import ADAPTERS, HOPELESS

DOCS = Path(__file__).parents[3] / "docs"


def findings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *more: object, code: int = 0
) -> dict[str, Any]:
    assert call(monkeypatch, "doctor", "--json", *more) == code
    return {found["what"]: found for found in json.loads(capsys.readouterr().out)}


def test_a_sound_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = findings(monkeypatch, capsys, "-o", tmp_path / "not" / "yet")
    assert found["torch"]["found"] == torch.__version__
    assert found["ffmpeg"]["good"]
    assert found["disk"]["found"].endswith(f"GB free at {tmp_path}")
    tested = [each for what, each in found.items() if what.startswith("kernel")]
    assert len(tested) == 5
    if not torch.cuda.is_available():  # the CPU's kernels know every format
        assert all(each["good"] and "agrees with float64" in each["found"] for each in tested)
        assert "attention runs on the CPU" in found["GPU"]["found"]


def test_what_is_broken_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A kernel that answers a thousandth too much, one that cannot be compiled, no ffmpeg, a folder that is full."""
    right = attention.ops.attention

    def wrong(q: Any, k: Any, v: Any, mask: Any, quant: Quant) -> Any:
        if quant == Quant("int8", "int8", smooth_k=True):
            raise RuntimeError("no compiler\nand a long trace")
        out, lse = right(q, k, v, mask, quant)
        return (1.001 * out, lse) if quant.is_none else (out, lse)

    monkeypatch.setattr(attention.ops, "attention", wrong)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    monkeypatch.setattr(doctor, "LEAST_DISK", 1 << 80)
    found = findings(monkeypatch, capsys, code=1)
    assert found["kernel, 16 bits"]["found"].startswith("WRONG: ")
    assert found["kernel, INT8"]["found"] == "does not run: no compiler"
    assert found["kernel, FP8"]["good"]
    assert "unset it" in found["ffmpeg"]["remedy"]
    assert "make room" in found["disk"]["remedy"]


def test_which_kernel_is_said_with_why(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    assert doctor.which_kernel((9, 0)) == "the overlapped kernel for Hopper (Gluon)"
    assert "this is sm_89" in doctor.which_kernel((8, 9))
    monkeypatch.setattr(launch, "GLUON_FROM", (99, 0))
    monkeypatch.setattr(launch, "no_gluon", launch.no_gluon.__wrapped__)
    assert doctor.which_kernel((9, 0)).startswith("the Triton kernel: Triton ")
    assert launch.overlapped(128, Quant(), 128) is None


def test_for_people(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "kernels", lambda: [doctor.Finding("kernel, FP8", "WRONG", False, "report this")])
    assert call(monkeypatch, "doctor") == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("!!  kernel, FP8")
    assert lines[-1].strip() == "-> report this"


def test_models_are_those_that_the_adapters_know(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "models", "--json") == 0
    rows = {row["cls"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {*ADAPTERS, *HOPELESS}
    assert {name for name, row in rows.items() if not row["helped"]} == set(HOPELESS)
    assert call(monkeypatch, "models") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_the_page_of_families_is_made_from_the_table() -> None:
    text = (DOCS / "families.md").read_text(encoding="utf-8")
    between = text.partition(lists.BEGIN)[2].partition(lists.END)[0]
    assert between == f"\n{lists.markdown(list(lists.rows()))}\n", "run: fastdit models --table docs/families.md"
