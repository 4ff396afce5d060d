"""Whose state is whose: threads, pipelines, runs, windows, tiles and branches on one model, each as if it were alone."""

import threading

import pytest
import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    PNDMScheduler,
    WanPipeline,
)
from families import CASES
from models import Pipe
from torch.overrides import TorchFunctionMode
from util import render, tiny_wan_pipeline

import fastdit
from fastdit import Config, Phase, Window
from fastdit.config import Reuse
from fastdit.core.reference import relative_error
from fastdit.runs.branches import Branch

WINDOW = Config((Phase(policy=Window(size=(1, 1, 1))),), (1, 2, 2), min_tokens=0, max_density=1)
RESIDUAL = Config(
    (Phase(policy=Window(size=(1, 1, 1)), reuse=Reuse("residual", refresh=3)),), (1, 2, 2), min_tokens=0, max_density=1
)
PHASES = Config(
    (Phase((1.0, 0.8)), Phase((0.8, 0.0), Window(size=(1, 1, 1)), reuse=Reuse("residual", refresh=4))), (1, 2, 2),
    min_tokens=0, max_density=1,
)  # fmt: skip
CONFIGS = {"exact": Config(), "window": WINDOW, "residual": RESIDUAL, "phases": PHASES}
UNET = next(case for case in CASES if case.cls == "UNet2DConditionModel")
TEXT = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1))


def beside(pipe):
    """Another pipeline on the same models, with a scheduler of its own, as `from_pipe` makes it."""
    other = WanPipeline(**(pipe.components | {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}))
    other.set_progress_bar_config(disable=True)
    return other


def hows(report, layer=0):
    return [ran.how for site, ran in report.calls if site == layer]


@pytest.mark.parametrize("name", CONFIGS)
def test_eight_threads_on_one_model(name):
    """Of different prompts, sizes, steps and schedulers: what each gives alone. State of another run would be a percent off. In
    some processes that have run much else, matrix products of a thread differ from those of the main one by a rounding, with
    `exact` too, where nothing of ours reaches a number: so it is not to the bit."""
    jobs = [{"prompt": p, "seed": i, "steps": 4 + i % 3, "size": 64 if i % 2 else 96} for i, p in enumerate("abcdefgh")]
    first = tiny_wan_pipeline()
    pipes = [first, *(beside(first) for _ in jobs[1:])]
    fastdit.accelerate(first, CONFIGS[name])
    expected = [render(pipe, **job) for pipe, job in zip(pipes, jobs, strict=True)]
    densities = [fastdit.report(pipe).density for pipe in pipes]
    found, errors = {}, []

    def work(i):
        try:
            found[i] = render(pipes[i], **jobs[i])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    wrong = {i: relative_error(found[i], each) for i, each in enumerate(expected)}
    assert max(wrong.values()) < 1e-5, wrong
    for pipe, job, density in zip(pipes, jobs, densities, strict=True):  # of its own run, whichever was the last of all
        report = fastdit.report(pipe)
        assert len(report.calls) == job["steps"] * 2 * 2
        assert report.density == density


def test_two_pipelines_one_after_the_other():
    a = tiny_wan_pipeline()
    b = beside(a)
    fastdit.accelerate(a, RESIDUAL)
    render(a, steps=4)
    found = render(b, steps=9, seed=1)
    fresh = beside(tiny_wan_pipeline())
    fastdit.accelerate(fresh, RESIDUAL)
    assert torch.equal(found, render(fresh, steps=9, seed=1))
    assert fastdit.report(b).to_dict()["density"] == fastdit.report(fresh).to_dict()["density"]
    assert len(fastdit.report(b).calls) == 9 * 2 * 2


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_run_that_is_broken_off_is_over(stop):
    """Also where the next one, of another pipeline, begins at a lower noise level than where it stopped."""

    def raises(pipe, step, timestep, values):
        if step == stop:
            raise KeyboardInterrupt
        return values

    def low(pipe):
        whole = type(pipe.scheduler).set_timesteps.__get__(pipe.scheduler)
        pipe.scheduler.set_timesteps = lambda n=None, device=None, **_: whole(
            device=device, sigmas=torch.tensor([0.3, 0.2, 0.15, 0.1, 0.05]).numpy()
        )
        return render(pipe, steps=5, seed=7)

    a = tiny_wan_pipeline()
    b = beside(a)
    handle = fastdit.accelerate(a, RESIDUAL)
    with pytest.raises(KeyboardInterrupt):
        render(a, steps=8, seed=5, callback_on_step_end=raises)
    assert handle.bytes() == 0, "nothing is held after an exception"
    found = low(b)
    fresh = beside(tiny_wan_pipeline())
    fastdit.accelerate(fresh, RESIDUAL)
    assert torch.equal(found, low(fresh))
    assert len(fastdit.report(b).calls) == len(fastdit.report(fresh).calls) == 5 * 2 * 2


def test_nested_runs_of_one_model():
    """A callback renders another clip with the same model in the middle of a run."""
    a = tiny_wan_pipeline()
    b = beside(a)
    fastdit.accelerate(a, RESIDUAL)
    alone = render(a, seed=1), render(b, seed=2, steps=4)
    inner = []

    def between(pipe, step, timestep, values):
        if step == 2:
            inner.append(render(b, seed=2, steps=4))
        return values

    assert torch.equal(render(a, seed=1, callback_on_step_end=between), alone[0])
    assert torch.equal(inner[0], alone[1])


# Calls by hand --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def walk(model, pieces, levels=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5), texts=None):
    """Latents of pieces of a picture, and of branches of each, walked down the noise levels; pieces(step): their places."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 4, 12, 16, 16, generator=generator)
    texts = texts or (lambda step: [torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(9))])
    for step, level in enumerate(levels):
        change, times = torch.zeros_like(x), torch.zeros_like(x)
        for start in pieces(step):
            at = [(start + i) % 12 for i in range(4)]
            for text in texts(step):
                given = {"hidden_states": x[:, :, at], "encoder_hidden_states": text, "timestep": torch.tensor([1000 * level])}
                change[:, :, at] += model(**given, return_dict=False)[0]
                times[:, :, at] += 1
        x = x - 0.1 * change / times.clamp(min=1)
    return x


def wan():
    return next(case for case in CASES if case.cls == "WanTransformer3DModel").model()


def error(**how):
    """Of windows alone and of windows completed by statistics, against dense; and what the first layer did."""
    dense, found = walk(wan(), **how), []
    for config in (WINDOW, RESIDUAL):
        model = wan()
        fastdit.accelerate(model, config)
        found.append(relative_error(walk(model, **how), dense))
    return *found, hows(fastdit.report(model))


def test_context_windows_that_stand_still():
    alone, completed, ran = error(pieces=lambda step: (0, 4, 8))
    assert completed < alone / 5
    assert ran.count("refresh") == 3 * 2


def test_context_windows_in_another_order():
    alone, completed, ran = error(pieces=lambda step: (0, 4, 8) if step % 2 else (8, 0, 4))
    assert completed < alone / 5
    assert ran.count("refresh") == 3 * 2


def test_context_windows_that_move_from_step_to_step():
    """Of a window at another place nothing is taken over; one that comes back finds its own."""
    alone, completed, ran = error(pieces=lambda step: (2, 6, 10) if step % 2 else (0, 4, 8))
    assert completed < alone / 3
    assert ran[:6] == ["refresh"] * 6
    assert "reuse" in ran


def prompts(*seeds):
    return [torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]


@pytest.mark.parametrize(
    ("order", "refreshes"),
    [
        (lambda step: (1, 2), 4),
        (lambda step: (2, 1) if step % 2 else (1, 2), 4),  # which comes first tells nothing
        (lambda step: (1, 2) if step < 3 else (1,), 3),  # guidance that ends
        (lambda step: (1,) if step < 3 else (2, 1), 3),  # that starts, unconditional first
        (lambda step: (1, 1), 4),  # the negative prompt is the prompt: two calls alike
    ],
)
def test_branches_are_told_by_their_conditioning(order, refreshes):
    alone, completed, ran = error(pieces=lambda step: (0,), texts=lambda step: prompts(*order(step)))
    assert completed < alone / 4
    assert ran.count("refresh") == refreshes


@pytest.mark.parametrize("name", ["cond", None])
def test_branches_are_told_by_their_name(name):
    """Two calls alike but for their name: neither takes the other's statistics, whichever is left out."""
    model = wan()
    handle = fastdit.accelerate(model, RESIDUAL)
    x, text = torch.randn(1, 4, 4, 16, 16), prompts(1)[0]
    with torch.no_grad():
        for step, level in enumerate((900.0, 800.0, 700.0, 600.0)):
            for each in ("uncond", "cond") if step < 2 else ("cond",):
                given = {"hidden_states": x, "encoder_hidden_states": text, "timestep": torch.tensor([level])}
                if name is None:
                    model(**given)
                else:
                    with model.cache_context(each):
                        model(**given)
    assert len(handle.latest.branches.known) == 2
    expected = ["refresh", "refresh", "reuse", "reuse", "reuse", "refresh"]
    assert hows(fastdit.report(model)) == expected


def test_over_a_hundred_tiles_a_step():
    """Each tile has statistics of its own, as if it were alone."""
    config, levels = RESIDUAL, (1.0, 0.8, 0.6)
    text, start = prompts(1)[0], torch.randn(100, 4, 1, 16, 16, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def go(model, tiles):
        x = start[tiles].clone()
        for level in levels:
            for i in range(len(x)):
                x[i : i + 1] -= 0.2 * model(x[i : i + 1], torch.tensor([1000 * level]), text, return_dict=False)[0]
        return x

    model = wan()
    fastdit.accelerate(model, config)
    found = go(model, slice(None))
    assert len(fastdit.report(model).calls) == 100 * 3 * 2
    assert hows(fastdit.report(model)).count("reuse") == 200
    for tile in (0, 41, 99):
        fastdit.accelerate(model, config)
        assert torch.equal(go(model, slice(tile, tile + 1)), found[tile : tile + 1])


@torch.no_grad()
def sample(model, scheduler, steps=10):
    scheduler.set_timesteps(steps)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        given = x if isinstance(scheduler, DDIMInverseScheduler) else scheduler.scale_model_input(x, t)
        x = scheduler.step(model(given, t, TEXT, return_dict=False)[0], t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("known", [True, False])
def test_inversion_is_one_run(known):
    scheduler, model = DDIMInverseScheduler(), UNET.model()
    pipe = Pipe(model, scheduler)
    fastdit.accelerate(pipe if known else model, RESIDUAL)
    sample(model, scheduler)
    report = fastdit.report(model)
    assert hows(report) == ["refresh", "reuse", "reuse"] * 3 + ["refresh"]
    assert [ran.step for site, ran in report.calls if site == 0] == list(range(10))
    sample(model, scheduler)
    assert len(hows(fastdit.report(model))) == 10, "the next one is another run"


@pytest.mark.parametrize(
    "scheduler",
    [DDIMScheduler, lambda: PNDMScheduler(skip_prk_steps=True), KDPM2AncestralDiscreteScheduler, HeunDiscreteScheduler],
)
def test_nothing_is_held_after_the_last_step_by_hand(scheduler):
    scheduler, model = scheduler(), UNET.model()
    pipe = Pipe(model, scheduler)
    handle = fastdit.accelerate(pipe, RESIDUAL)
    sample(model, scheduler)
    assert handle.bytes() == 0
    assert fastdit.report(model).memory > 0


@pytest.mark.parametrize("end", [None, 2, 4, 5])
def test_nothing_is_held_when_decoding_begins(end):
    """Whenever guidance ended, also right before the last of six steps."""
    pipe = tiny_wan_pipeline()
    handle = fastdit.accelerate(pipe, RESIDUAL)
    held, decode = [], pipe.vae.decode
    pipe.vae.decode = lambda *a, **k: held.append(handle.bytes()) or decode(*a, **k)

    def stop(pipe, step, timestep, values):
        if end is not None and step == end - 1:
            pipe._guidance_scale = 1.0
        return values

    render(pipe, output_type="np", callback_on_step_end=stop)
    assert held == [0]
    assert len(fastdit.report(pipe).calls) == (6 + (6 if end is None else end)) * 2
    assert fastdit.report(pipe).memory > 0


# What a tester found ---------------------------------------------------------------------------------------------------------


class Stepwise(DiffusionPipeline):
    """A pipeline that gives way after every step, as servers that step several requests in turns do."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def steps(self, seed, levels=(1.0, 0.9, 0.8, 0.7, 0.6, 0.5), travel=0.0):
        x = torch.randn(1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        text = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(seed + 9))
        with self.progress_bar(total=len(levels)):
            for level in levels:
                v = self.transformer(x, torch.tensor([1000 * level]), text, return_dict=False)[0]
                x, text = x - 0.1 * v, text + travel
                yield x
        self.found = x


def test_loops_that_take_turns_in_one_thread():
    model = wan()
    a, b = (Stepwise(model, FlowMatchEulerDiscreteScheduler()) for _ in range(2))
    fastdit.accelerate(a, RESIDUAL)
    alone = [list(pipe.steps(seed))[-1] for seed, pipe in enumerate((a, b))]
    both = list(zip(a.steps(0), b.steps(1), strict=True))[-1]
    assert all(torch.equal(found, expected) for found, expected in zip(both, alone, strict=True))
    for pipe in (a, b):
        assert hows(fastdit.report(pipe)) == ["refresh", "reuse", "reuse"] * 2


def test_what_never_comes_back_is_let_go():
    """A prompt that changes at every step: statistics of two steps at most, and the report says why all was dense."""
    pipe = Stepwise(wan(), FlowMatchEulerDiscreteScheduler())
    handle = fastdit.accelerate(pipe, RESIDUAL)
    levels = [1 - i / 20 for i in range(20)]
    held = [handle.bytes() for _ in pipe.steps(0, levels, travel=0.01)]
    assert max(held) <= 3 * held[0]
    site = fastdit.report(pipe).sites[0]
    assert (site.ran, site.reason) == ("mixed", "no earlier step of its branch: the conditioning or the noise is new")


def test_noise_that_rises_in_a_loop_begins_anew_and_stays_in_the_report():
    pipe = Stepwise(wan(), FlowMatchEulerDiscreteScheduler())
    fastdit.accelerate(pipe, RESIDUAL)
    levels = (1.0, 0.8, 0.6, 0.9, 0.6, 0.3)
    list(pipe.steps(0, levels))
    calls = [ran for site, ran in fastdit.report(pipe).calls if site == 0]
    assert [ran.sigma for ran in calls] == pytest.approx(levels)
    assert [ran.step for ran in calls] == list(range(6))
    assert [ran.how for ran in calls] == ["refresh", "reuse", "reuse"] * 2
    list(pipe.steps(0, levels))
    assert len(hows(fastdit.report(pipe))) == 6, "of the latest loop"


def test_calls_that_are_not_ours_are_calls_of_their_run():
    class Watches(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **kwargs or {})

    pipe = tiny_wan_pipeline()
    other = beside(pipe)
    fastdit.accelerate(pipe, WINDOW)
    with Watches():
        render(pipe)
    render(other)
    for _ in range(2):
        report = fastdit.report(pipe)
        assert (len(report.calls), report.density) == (6 * 2 * 2, 1.0)
        assert {(site.ran, site.reason) for site in report.sites} == {("dense", "Watches may change attention")}
    assert {(site.ran, site.reason) for site in fastdit.report(other).sites} == {("sparse", None)}


@torch.no_grad()
def test_processors_put_back_after_the_acceleration_are_the_models_own():
    model, call = wan(), {"timestep": torch.tensor([500.0]), "encoder_hidden_states": prompts(1)[0], "return_dict": False}
    call["hidden_states"] = torch.randn(1, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    stock = model(**call)[0]
    with fastdit.accelerate(model, WINDOW):
        kept = model.attn_processors
        assert not torch.equal(model(**call)[0], stock)
    model.set_attn_processor(kept)
    assert torch.equal(model(**call)[0], stock)
    fastdit.accelerate(model, Config())
    model.set_attn_processor(kept)
    assert torch.equal(model(**call)[0], stock)


@torch.no_grad()
def test_a_layer_called_by_itself_has_no_facts_of_a_call_that_is_over():
    model = wan()
    fastdit.accelerate(model, WINDOW)
    call = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": prompts(1)[0], "return_dict": False}
    call["hidden_states"] = torch.randn(1, 4, 3, 16, 16)
    model(**call)
    model.forward(**call)  # past the hooks
    assert len(fastdit.report(model).calls) == 2
    assert fastdit.attach.processor.installed(model).sites[0].refusal == "called outside of its denoiser's forward"


def test_one_model_in_both_places():
    pipe = tiny_wan_pipeline()
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae", "transformer", "scheduler")}
    twice = WanPipeline(**parts, transformer_2=pipe.transformer, boundary_ratio=0.8)
    twice.set_progress_bar_config(disable=True)
    fastdit.accelerate(twice, Config(WINDOW.phases, WINDOW.tile, min_tokens=0, max_density=1, strict=True))
    render(twice)
    assert len(fastdit.report(twice).sites) == 2
    assert len(fastdit.report(twice).calls) == 6 * 2 * 2


def test_a_branch_is_due_when_its_layers_errors_would_exceed_the_drift():
    branch = Branch((), torch.zeros(1), 0.5, 0)
    assert not branch.due()
    for error in (0.05, 0.09):  # the second step of three: .075 and .135 in the third
        branch.foresee(error, uses=2, drift=0.1)
    assert branch.foreseen == pytest.approx([0.75, 1.35])
    assert branch.due()  # the root mean square is 1.092
    assert not branch.due()
    for error in (0.05, 0.078):
        branch.foresee(error, uses=2, drift=0.1)
    assert not branch.due()  # .983
