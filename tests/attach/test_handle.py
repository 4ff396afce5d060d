"""What a pipeline's handle holds, for how long, and whose statistics are whose."""

import gc
import threading
import weakref

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from families import CASES
from util import render, tiny_wan_pipeline, windows_reusing

import fastdit
from fastdit import Config, Phase, Window
from fastdit.config import Reuse
from fastdit.core.reference import relative_error
from fastdit.runs import run

MOCHI = next(case for case in CASES if case.cls == "MochiTransformer3DModel")


def held(pipe):
    denoiser = fastdit.attach.processor.installed(pipe.transformer)
    return sum(memory.bytes() for site in denoiser.sites for memory in site.memories.values())


@pytest.mark.parametrize("restored", [True, False])
@pytest.mark.parametrize("broken", [True, False])
def test_a_pipeline_that_nobody_holds_is_freed(restored, broken):
    pipe = tiny_wan_pipeline()
    handle = fastdit.accelerate(pipe, windows_reusing())

    def stop(pipe, step, timestep, values):
        raise InterruptedError

    if broken:
        with pytest.raises(InterruptedError):
            render(pipe, callback_on_step_end=stop)
    else:
        render(pipe)
    if restored:
        fastdit.restore(pipe)
    alive = weakref.ref(pipe), weakref.ref(pipe.transformer)
    memories = [weakref.ref(memory) for site in handle.sites for memory in site.memories.values()]
    del pipe
    if not restored:
        del handle
    gc.collect()
    assert [reference() for reference in (*alive, *memories)] == [None] * (2 + len(memories))


def test_statistics_go_at_once_with_the_acceleration():
    pipe = tiny_wan_pipeline()
    gc.disable()
    try:
        with fastdit.accelerate(pipe, windows_reusing()) as handle:
            with torch.no_grad():
                pipe.transformer(torch.randn(1, 4, 3, 16, 16), torch.tensor([900.0]), torch.randn(1, 512, 16))
            assert held(pipe) > 0
        assert not any(site.memories for site in handle.sites)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["retention", "broadcast"])
def test_nothing_is_held_after_the_last_step(kind):
    """Decoding needs the room; the report still says how much it was."""
    pipe = tiny_wan_pipeline()
    fastdit.accelerate(pipe, windows_reusing(kind))
    most = []

    def look(pipe, step, timestep, values):
        most.append(held(pipe))
        return values

    render(pipe, callback_on_step_end=look)
    assert held(pipe) == 0
    assert all(size > 0 for size in most)
    assert fastdit.report(pipe).memory == max(most)
    render(pipe, steps=4, callback_on_step_end=look)
    assert fastdit.report(pipe).phases[0].reused > 0


def test_every_sample_has_statistics_of_its_own_beside_a_step_cache():
    """Mochi attends sample by sample; a step cache names the call of both. (Its timestep rises as the noise falls.)"""
    call = MOCHI.call()
    call["encoder_attention_mask"] = torch.ones_like(call["encoder_attention_mask"])  # both in one go
    reuse = Config((Phase((1.0, 0.0), Window(size=(1, 1, 1)), reuse=Reuse("residual", refresh=3)),), (1, 4, 4), min_tokens=0)
    found = {}
    for cached in (False, True):
        model = MOCHI.model()
        if cached:
            model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        fastdit.accelerate(model, reuse)
        with torch.no_grad():
            for level in (100, 200, 300, 400):
                noise = {"timestep": call["timestep"] * 0 + level}
                if cached:
                    with model.cache_context("cond"):
                        found[cached, level] = model(**call | noise)[0]
                else:
                    found[cached, level] = model(**call | noise)[0]
        sites = fastdit.attach.processor.installed(model).sites
        assert all([ran.how for ran in site.calls] == 2 * ["refresh"] + 4 * ["reuse"] + 2 * ["refresh"] for site in sites[1:])
    for level in (100, 200, 300, 400):
        assert relative_error(found[True, level], found[False, level]) < 1e-5


def test_a_bare_model_at_one_noise_level_does_not_remember_without_end(monkeypatch):
    monkeypatch.setattr(run, "MOST_CALLS", 8)
    case = next(case for case in CASES if case.cls == "WanTransformer3DModel")
    model, call = case.model(), case.call()
    handle = fastdit.accelerate(model, windows_reusing())
    with torch.no_grad():
        for _ in range(8 + 6):
            model(**call)
    site = handle.sites[0]
    assert len(site.memories) == len(site.calls) == 6
    handle.reset()
    with torch.no_grad():
        model(**call)
    assert len(site.memories) == len(site.calls) == 1
    assert handle.runs == 3


def test_ids_stay_on_the_cpu_whatever_the_default_device_is():
    pipe = tiny_wan_pipeline()
    with torch.device("meta"):
        fastdit.accelerate(pipe, windows_reusing())
    render(pipe)
    assert fastdit.report(pipe).phases[0].reused > 0


def test_a_model_that_is_deleted_takes_statistics_and_masks_along_at_once():
    """Without `restore`, and without Python's collector."""
    pipe = tiny_wan_pipeline()
    handle = fastdit.accelerate(pipe, windows_reusing())
    with torch.no_grad():
        pipe.transformer(torch.randn(1, 4, 3, 16, 16), torch.tensor([900.0]), torch.randn(1, 512, 16))
    gc.collect()
    gc.disable()
    try:
        assert handle.masks.bytes() > 0
        assert handle.bytes() > 0
        del pipe
        assert (handle.masks.bytes(), handle.bytes()) == (0, 0)
    finally:
        gc.enable()


def test_threads_that_end_take_their_statistics_along_at_once():
    pipe = tiny_wan_pipeline()
    handle = fastdit.accelerate(pipe, windows_reusing())

    @torch.no_grad()
    def work():
        pipe.transformer(torch.randn(1, 4, 3, 16, 16), torch.tensor([900.0]), torch.randn(1, 512, 16))

    gc.collect()
    gc.disable()
    try:
        held = []
        for _ in range(4):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            held.append(handle.bytes())
        assert held[-1] == held[0], "but for the latest, whose report is kept"
    finally:
        gc.enable()


def test_reset_forgets_what_ran():
    pipe = tiny_wan_pipeline()
    handle = fastdit.accelerate(pipe, windows_reusing())
    render(pipe)
    assert len(fastdit.report(pipe).calls) > 0
    handle.reset()
    assert len(fastdit.report(pipe).calls) == len(fastdit.report(pipe.transformer).calls) == 0
