"""Fixtures: the small pipeline of `util`, in memory and saved. Triton kernels run interpreted where there is no GPU."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from device import DEVICE
from util import tiny_wan_pipeline

if find_spec("triton") and DEVICE == "cpu":  # before any test module imports Triton, whichever comes first
    import interpreter  # noqa: F401


@pytest.fixture
def pipe() -> Any:
    """A fresh small WanPipeline with random weights."""
    return tiny_wan_pipeline()


@pytest.fixture(scope="session")
def saved_pipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, as a folder that nobody may write into."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_wan_pipeline().save_pretrained(folder)
    return folder
