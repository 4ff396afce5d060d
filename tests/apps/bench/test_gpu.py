"""What `fastdit bench gpu` does where there is no GPU: its own tests counted, refusals, and tables that follow from rows."""

import shutil
from pathlib import Path

import pytest
import torch
from util import call

from fastdit.apps.bench import gpu_tests
from fastdit.apps.errors import UserError

ROOT = Path(__file__).parents[3]


def test_outcomes_are_counted_by_file(tmp_path):
    one, two = tmp_path / "test_kernel_one.py", tmp_path / "test_kernel_two.py"
    one.write_text("import pytest\n\n\n@pytest.mark.parametrize('x', [1, 2, 3])\ndef test(x):\n    assert x != 2\n")
    two.write_text("import pytest\n\n\ndef test_a():\n    pytest.skip('no')\n\n\n@pytest.fixture\ndef bad():\n    1 / 0\n\n\n"
                   "def test_b(bad):\n    pass\n")  # fmt: skip
    rows = {row.pop("file"): row for row in gpu_tests.suite([one, two])}
    assert {name: (row["passed"], row["skipped"], row["failed"]) for name, row in rows.items()} == {
        "test_kernel_one": (2, 0, 1), "test_kernel_two": (0, 1, 1),
    }  # fmt: skip


def test_a_file_that_cannot_be_imported_is_an_error_not_a_row(tmp_path):
    broken = tmp_path / "test_kernel_broken.py"
    broken.write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError, match="nothing_of_that_name"):
        list(gpu_tests.suite([broken]))


def test_what_the_sanitizer_watches_runs(capsys):
    gpu_tests.main()
    assert capsys.readouterr().out == "calls: 64\n"


def test_every_kernel_test_file_is_run():
    assert {path.stem for path in gpu_tests.TESTS} == {path.stem for path in (ROOT / "tests" / "kernels").glob("test_*.py")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it would measure")
def test_without_a_gpu_it_says_what_to_use_instead(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, "bench", "gpu", "--out", tmp_path) == 1
    assert "PyTorch sees no CUDA GPU here: fastdit bench and fastdit bench kernel measure on a CPU" in capsys.readouterr().err


@pytest.mark.parametrize("page", ["docs/benchmarks.md", "README.md"])
def test_the_tables_in_the_docs_follow_from_the_rows(monkeypatch, tmp_path, page):
    copy = tmp_path / "page.md"
    shutil.copy(ROOT / page, copy)
    assert call(monkeypatch, "bench", "gpu", "--out", ROOT / "docs" / "results", "--table", copy) == 0
    assert copy.read_text(encoding="utf-8") == (ROOT / page).read_text(encoding="utf-8")
