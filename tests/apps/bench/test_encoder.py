"""`fastdit bench encoder` on a UNet that is small enough, and the page made from its rows."""

import json
from pathlib import Path

import pytest
import torch

from fastdit.apps.bench import encoder as bench
from fastdit.apps.errors import UserError

DOCS = Path(__file__).parents[3] / "docs"
SMALL = {
    "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    for key, value in SMALL.items():
        monkeypatch.setitem(bench.SD15, key, value)
    monkeypatch.setattr(bench, "MODELS", {"SD 1.5": bench.SD15})


def run(out, **more):
    given = {"size": 8, "steps": 0, "repeats": 0, "together": 2, "guidance": True, "table": None}
    bench.bench_encoder(**given | {"out": out} | more)


def test_rows_and_page(small, tmp_path):
    out, page = tmp_path / "rows.json", tmp_path / "page.md"
    run(out, repeats=1)
    run(out, steps=4)
    rows = json.loads(out.read_text())
    forward, loop = rows["forward 8x8, batch 2"], rows["loop 8x8, batch 2, 4 steps"]
    assert set(forward["seconds"]) == {
        "stock", "decoder alone", "decoder, skips convolved once", "the same, 2 steps in a batch",
    }  # fmt: skip
    assert (loop["done"], loop["keys"]) == (4, 4)
    assert 0 < rows["operations SD 1.5 8x8"]["skips convolved once"] < rows["operations SD 1.5 8x8"]["decoder alone"] < 1
    page.write_text(f"before\n{bench.BEGIN}\n{bench.END}\nafter\n")
    run(out, table=page)
    assert page.read_text().startswith(f"before\n{bench.BEGIN}\n| operations")
    assert "4 of 4 DDIM steps, 4 of them key steps" in page.read_text()


def test_wrong_answer_is_not_timed(small, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "fastdit.encoder_reuse.hooks.first_step", lambda x, batch, times: torch.zeros_like(x[: len(x) // times])
    )
    with pytest.raises(UserError, match="two ways to decode differ"):
        run(tmp_path / "rows.json", repeats=1)


def test_the_page_holds_the_committed_rows():
    rows = json.loads((DOCS / "results" / "encoder_cpu.json").read_text())
    assert "\n".join(bench.lines(rows)) in (DOCS / "encoder.md").read_text()
