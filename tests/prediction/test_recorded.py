"""Predictions beside what was measured: the rows of docs/results, and the table in the docs that is made of both.

The rates of `prediction/cards.py` were fitted to these rows, so this shows that one set of rates explains all shapes and
configurations, not that a new shape would be met as well. Bytes are not fitted.
"""

import pytest
from util import DOCS

from fastdit.apps.bench import predict_table
from fastdit.apps.bench.predict_table import TOLERANCE, recorded

ROWS = recorded(DOCS / "results")


def test_all_rows_are_there():
    assert len(ROWS) == 24 + 14 + 2
    assert {row.device for row in ROWS} == {"NVIDIA H200", "NVIDIA H100 80GB HBM3", "CPU"}


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_predicted_beside_measured(row):
    assert row.predicted_ratio == pytest.approx(row.ratio, rel=TOLERANCE)
    assert row.predicted_density == pytest.approx(row.density, abs=0.001)
    if row.dense_seconds is not None:
        assert row.predicted_seconds == pytest.approx(row.dense_seconds, rel=TOLERANCE)


@pytest.mark.parametrize(("model", "layers"), [("Wan 1.3B, 81 frames, 480p", 30), ("Wan 1.3B, 81 frames, 720p", 30)])
def test_statistics_are_what_the_peak_rose_by(model, layers):
    """Peak memory with `balanced`, less that of the same windows without statistics."""
    mine = {row.config: row for row in ROWS if row.model == model and row.device == "NVIDIA H200"}
    rose = mine["preset balanced"].peak - mine["window 0.125, 2x8x8, bf16"].peak
    assert mine["preset balanced"].predicted_bytes / 1e9 == pytest.approx(rose, rel=0.02)


def test_the_table_in_the_docs_is_of_these_rows():
    assert predict_table.markdown(ROWS) in (DOCS / "statistics.md").read_text(encoding="utf-8")
