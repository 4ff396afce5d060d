"""The table of stores in docs/statistics.md is made from the rows that were measured, and the forms keep what they promise."""

import json
from pathlib import Path

from fastdit.approx.residual_store import FORMS
from fastdit.apps.bench.quality import stores_table

DOCS = Path(__file__).parents[2] / "docs"
ROWS = DOCS / "results" / "stores.json"


def test_the_page_holds_the_measured_rows():
    assert stores_table.markdown(ROWS) in (DOCS / "statistics.md").read_text(encoding="utf-8")


def test_an_eighth_of_the_bytes_within_15_percent_and_a_quarter_within_3():
    measured = json.loads(ROWS.read_text(encoding="utf-8"))
    rows = {row["store"]: row for row in measured["rows"]}
    assert list(rows) == [*FORMS, "none"]
    for form, share, error in (("pca2", 1 / 8, 1.15), ("pca4", 1 / 4, 1.03)):
        assert rows[form]["bits"] <= 16 * share
        for steps in measured["steps"]:
            assert rows[form][f"error {steps}"] <= error * rows["bfloat16"][f"error {steps}"]
