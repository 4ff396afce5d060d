"""Fixtures, markers and who shares a process. Triton kernels run interpreted where there is no GPU.

Under `pytest -n N` tests go to any worker, one by one. Those of a file with a fixture for all of it stay together, and so do
all that look at the page in a browser. Every process has one thread for sums, unless OMP_NUM_THREADS says otherwise: N workers
then do not fight for N cores, and no answer depends on how many threads added it up.
"""

from __future__ import annotations

import functools
import inspect
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported; processes that tests start inherit it

import pytest
import torch
from device import DEVICE
from util import ROOT, tiny_wan_pipeline

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

if find_spec("triton") and DEVICE == "cpu":  # before any test module imports Triton, whichever comes first
    import interpreter  # noqa: F401

TELLING = {
    "browser": {"chromium"},
    "process": {"subprocess", "Popen", "Processes", "serve", "server", "cluster", "both", "test_compile"},
    "compile": {"compile", "compile_repeated_blocks"},
}
"""A test has a marker if its file, one of its fixtures or a name in its code is one of these."""


def names(item: pytest.Function) -> set[str]:
    """What a test is made of: its fixtures, its file, the names in its code."""
    function = inspect.unwrap(item.function)
    found = {*item.fixturenames, item.path.stem, *function.__code__.co_names}
    command = "fastdit" in found and callable(function.__globals__.get("fastdit"))  # `util.fastdit`, not the package
    return found | {"subprocess"} if command else found


@functools.cache
def together(file: str) -> str | None:
    """A name for the tests that share a process with those of a file, or None.

    One for all browsers: two at once leave no time to see what happens in them. A file's own, if a fixture is made once for it.
    """
    text = (ROOT / file).read_text(encoding="utf-8")
    if "playwright" in text:
        return "browser"
    return file if 'scope="module"' in text else None


@pytest.hookimpl(optionalhook=True)  # xdist's, for whom it is `--dist loadgroup`, which pytest 9.2 and xdist 3.8 do not follow
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Shared(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return together(nodeid.partition("::")[0]) or nodeid

    return Shared(config, log)


def pytest_itemcollected(item: pytest.Function) -> None:
    """Before `-m` chooses."""
    for mark in (mark for mark, telling in TELLING.items() if telling & names(item)):
        item.add_marker(mark)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # what takes long begins first, and no worker ends late with it
        items.sort(key=lambda item: not {"browser", "process", "compile"} & {mark.name for mark in item.iter_markers()})


def pytest_runtest_setup(item: pytest.Item) -> None:
    if (mark := item.get_closest_marker("gpu")) is not None and torch.cuda.device_count() < (wanted := (*mark.args, 1)[0]):
        pytest.skip("needs a GPU" if wanted == 1 else f"needs {wanted} GPUs")


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
