"""Denoising loops and names of calls, by thread."""

import contextlib
import gc
import threading

import pytest
from diffusers import DiffusionPipeline
from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks
from models import wan

from fastdit.runs import loops


class Pipe(DiffusionPipeline):
    def __init__(self, quiet=False):
        super().__init__()
        self.set_progress_bar_config(disable=quiet)


@pytest.mark.parametrize("quiet", [True, False])
def test_a_loop_lasts_as_long_as_its_bar(quiet):
    pipe, ended = Pipe(quiet), []
    assert loops.loop() is None
    with pipe.progress_bar(total=3) as bar:
        assert loops.loop().pipeline is pipe
        loops.loop().at_end(lambda: ended.append(1))
        bar.update()
    assert (loops.loop(), ended) == (None, [1])
    bar.close()
    assert ended == [1]


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize("left", ["ends", "break", "raises"])
def test_iterated(quiet, left):
    ended = []

    def walk():
        for i in Pipe(quiet).progress_bar(range(3)):
            loops.loop().at_end(lambda: ended.append(1))
            if i == 1 and left == "break":
                break
            if i == 1 and left == "raises":
                raise InterruptedError

    with contextlib.suppress(InterruptedError):
        walk()
    gc.collect()
    assert loops.loop() is None
    assert ended


def test_the_innermost_loop_counts_and_threads_do_not_meet():
    outer, inner, seen = Pipe(True), Pipe(True), []
    with outer.progress_bar(total=1):
        with inner.progress_bar(total=1):
            assert loops.loop().pipeline is inner
            other = threading.Thread(target=lambda: seen.append(loops.loop()))
            other.start()
            other.join()
        assert loops.loop().pipeline is outer
    assert seen == [None]


def test_blocks_of_modular_pipelines_have_loops():
    assert LoopSequentialPipelineBlocks.progress_bar.__wrapped__.__qualname__ == "LoopSequentialPipelineBlocks.progress_bar"


def test_names_are_those_of_the_running_call():
    model, other = wan(), wan()
    assert loops.name_of(model) is None
    with model.cache_context("cond"):
        assert (loops.name_of(model), loops.name_of(other)) == ("cond", None)
        with other.cache_context("uncond"), model.cache_context("inner"):
            assert (loops.name_of(model), loops.name_of(other)) == ("inner", "uncond")
        assert loops.name_of(model) == "cond"
    with pytest.raises(InterruptedError), model.cache_context("cond"):
        raise InterruptedError
    assert loops.name_of(model) is None


class Slotted:
    """As little of a bar as a pipeline needs."""

    __slots__ = ()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("bar", [lambda *a, **k: Slotted(), lambda x=None, **k: x, lambda x=None, **k: iter(x or ())])
def test_what_stands_for_a_bar_is_left_alone(monkeypatch, bar):
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.tqdm", bar)
    found = Pipe(True).progress_bar([1, 2])
    assert isinstance(found, Slotted) or list(found) == [1, 2]
    assert loops.loop() is None
