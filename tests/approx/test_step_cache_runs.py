"""Statistics in whole pipelines: no branch, run, size or pipeline sees another one's, and a skipped block ages nothing."""

import copy
import itertools
import math

import pytest
import torch
import torch._dynamo.testing
from diffusers import (
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
)
from util import enter, render, tiny_wan_pipeline, windows_reusing

import fastdit
from fastdit import Config, Phase, Window
from fastdit.attach import site_call
from fastdit.attach.processor import installed
from fastdit.attach.site_call import SiteCall
from fastdit.config import Reuse
from fastdit.policies import SpatialTemporal, TopMass


@pytest.fixture
def pipes():
    return tiny_wan_pipeline(), tiny_wan_pipeline()


SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "heun": lambda: FlowMatchHeunDiscreteScheduler(shift=3.0),
    "unipc": lambda: UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    "dpm++": lambda: DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_two_prompts_in_a_row_are_two_fresh_pipelines(pipes, scheduler):
    used, fresh = pipes
    used.scheduler, fresh.scheduler = SCHEDULERS[scheduler](), SCHEDULERS[scheduler]()
    fastdit.accelerate(used, windows_reusing())
    first = render(used)
    assert math.isfinite(float(first.sum()))
    second = render(used, "d a", seed=5)
    fastdit.accelerate(fresh, windows_reusing())
    assert torch.equal(second, render(fresh, "d a", seed=5))
    assert fastdit.report(used).phases[0].reused > 0


def test_a_run_that_broke_spoils_nothing(pipes):
    used, fresh = pipes
    fastdit.accelerate(used, windows_reusing())
    fastdit.accelerate(fresh, windows_reusing())

    def stop(pipe, step, timestep, values):
        if step == 4:
            raise InterruptedError("as a user would")
        return values

    with pytest.raises(InterruptedError):
        render(used, seed=3, callback_on_step_end=stop)
    assert torch.equal(render(used, seed=4), render(fresh, seed=4))
    # a new run that begins below the noise level at which the last one broke
    with pytest.raises(InterruptedError):
        render(used, seed=3, callback_on_step_end=stop)
    short = [0.2, 0.1]
    if "sigmas" in used.scheduler.set_timesteps.__code__.co_varnames:
        used.scheduler.set_timesteps(sigmas=short)
        fresh.scheduler.set_timesteps(sigmas=short)
    x, t = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([200.0])
    text = torch.randn(1, 512, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(used.transformer(x, t, text)[0], fresh.transformer(x, t, text)[0])


def test_another_size_starts_anew(pipes):
    used, fresh = pipes
    fastdit.accelerate(used, windows_reusing())
    fastdit.accelerate(fresh, windows_reusing())
    render(used, size=96)
    assert torch.equal(render(used), render(fresh))


def test_two_pipelines_do_not_meet(pipes):
    """Steps of two pipelines alternate, in one thread, as a page with two users would run them."""
    a, b = pipes
    alone = []
    for pipe, seed in ((a, 1), (b, 2)):
        fastdit.accelerate(pipe, windows_reusing())
        alone.append(render(pipe, seed=seed))
    both = {}

    def between(pipe, step, timestep, values):
        if step == 2:
            both["b"] = render(b, seed=2)
        return values

    both["a"] = render(a, seed=1, callback_on_step_end=between)
    assert torch.equal(both["a"], alone[0])
    assert torch.equal(both["b"], alone[1])


def test_branches_do_not_mix(pipes):
    """Conditional and unconditional calls in turn, each with statistics of its own: the same as each alone."""
    pipe, _ = pipes
    model = pipe.transformer
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 3, 16, 16, generator=generator)
    texts = [torch.randn(1, 512, 16, generator=generator) * 30 for _ in range(2)]

    def run(branches):
        handle = fastdit.accelerate(model, windows_reusing(store="float32"))
        found = []
        with torch.no_grad():
            for sigma in (900.0, 800.0, 700.0, 600.0):
                found.append([model(x, torch.tensor([sigma]), texts[i])[0] for i in branches])
        return found, {id(key[1]) for site in handle.sites for key in site.memories}

    both, kept = run([0, 1])
    for branch in (0, 1):
        alone, _ = run([branch])
        assert all(torch.equal(a[0], b[branch]) for a, b in zip(alone, both, strict=True))
    assert len(kept) == 2


def test_both_branches_in_one_batch(pipes):
    pipe, _ = pipes
    model = pipe.transformer
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 16, 16, generator=generator)
    text = torch.randn(2, 512, 16, generator=generator) * 30
    found = []
    for batches in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        fastdit.accelerate(model, windows_reusing(store="float32"))
        with torch.no_grad():
            for sigma in (900.0, 800.0, 700.0):
                parts = [model(x[part], torch.full((len(x[part]),), sigma), text[part])[0] for part in batches]
        found.append(torch.cat(parts))
    assert torch.allclose(*found, atol=1e-5)


@pytest.mark.parametrize("policy", [TopMass(density=0.3), SpatialTemporal(density=0.3)], ids=str)
def test_a_dynamic_map_serves_as_long_as_it_should(pipes, monkeypatch, policy):
    """And with SpatialTemporal's the trades of the heads."""
    pipe, _ = pipes
    chosen = []
    original = type(policy).select
    monkeypatch.setattr(type(policy), "select", lambda self, *a, **k: chosen.append(1) or original(self, *a, **k))
    counts = {}
    for maps in (1, 2, 6):
        chosen.clear()
        fastdit.accelerate(pipe, windows_reusing("none", policy, maps=maps))
        render(pipe)
        counts[maps] = len(chosen)
    assert counts == {1: 6 * 2 * 2, 2: 3 * 2 * 2, 6: 1 * 2 * 2}  # steps, branches, layers
    chosen.clear()
    fastdit.accelerate(pipe, windows_reusing("retention", policy))
    render(pipe)
    assert len(chosen) == 2 * 2 * 2  # a map a refresh, each third step


@pytest.mark.parametrize("at_once", [True, False], ids=["read at once", "read at the next forward, as on a GPU"])
def test_a_step_is_a_refresh_when_its_errors_would_exceed_the_drift(pipes, monkeypatch, at_once):
    pipe, _ = pipes
    if not at_once:
        monkeypatch.setattr(site_call, "reads_at_once", lambda device: False)

    def calls(drift):
        """The picture, and the records by layer and branch."""
        reuse = Reuse("residual", 9, store="float32", drift=drift)
        fastdit.accelerate(pipe, Config((Phase(policy=Window(size=(1, 1, 1)), reuse=reuse),), (1, 2, 2), min_tokens=0))
        out = render(pipe)
        fastdit.report(pipe)  # reads the last step's verdicts
        return out, [site.calls[branch::2] for site in installed(pipe.transformer).sites for branch in (0, 1)]

    never, plain = calls(None)
    assert {call.error for branch in plain for call in branch} == {None}
    out, found = calls(1e6)
    assert torch.equal(out, never)
    assert [[call.how for call in branch] for branch in found] == [["refresh", *["reuse"] * 5]] * 4
    errors = [call.error for branch in found for call in branch[1:]]
    assert [[call.how for call in branch] for branch in calls(1e-6)[1]] == [["refresh", "reuse"] * 3] * 4
    drift, due = (min(errors) + max(errors)) / 2, 0
    found = calls(drift)[1]
    for branch in (found[::2], found[1::2]):  # of each layer
        age = 0
        for before, now in itertools.pairwise(zip(*branch, strict=True)):
            age = 0 if before[0].how == "refresh" else age + 1
            ahead = [call.error * (age + 1) / age for call in before if age]
            wanted = bool(ahead) and math.hypot(*ahead) / math.sqrt(len(ahead)) > drift
            assert {call.how for call in now} == {"refresh" if wanted else "reuse"}
            due += wanted
    assert 0 < due < 2 * 3


def test_statistics_and_map_are_renewed_together(pipes, monkeypatch):
    """A map is chosen anew where the drift makes a refresh, and statistics of the map before are never used with it."""
    pipe, _ = pipes
    chosen, select = [], TopMass.select
    monkeypatch.setattr(TopMass, "select", lambda self, *a, **k: chosen.append(1) or select(self, *a, **k))
    fastdit.accelerate(pipe, windows_reusing("residual", TopMass(density=0.3), store="float32", drift=1e-6))
    render(pipe)
    hows = [call.how for site in installed(pipe.transformer).sites for call in site.calls]
    assert hows.count("refresh") == len(chosen) == 3 * 2 * 2  # each second step, branches, layers


STEP_CACHES = {
    "first block": lambda pipe: FirstBlockCacheConfig(threshold=0.35),
    "taylor": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, max_order=1, cache_identifiers=[r"blocks\.\d+"]
    ),
    "mag": lambda pipe: MagCacheConfig(
        num_inference_steps=12, mag_ratios=torch.ones(12), threshold=0.5, max_skip_steps=2, retention_ratio=0.2
    ),
    "broadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 901),
        spatial_attention_block_identifiers=("blocks",), current_timestep_callback=lambda: pipe.current_timestep,
    ),
}  # fmt: skip


@pytest.mark.parametrize("cache", STEP_CACHES)
def test_what_a_step_cache_skips_ages_nothing(pipes, monkeypatch, cache):
    """Statistics are refreshed every third time that a layer runs in a branch, however many steps its block was skipped."""
    pipe, _ = pipes
    pipe.transformer.enable_cache(STEP_CACHES[cache](pipe))
    handle = fastdit.accelerate(pipe, windows_reusing())
    seen = {}
    record = SiteCall.record

    def note(self, plan, how, *rest):
        seen.setdefault((self.layer, id(self.forward.branch)), []).append((handle.clock.step, how))
        return record(self, plan, how, *rest)

    monkeypatch.setattr(SiteCall, "record", note)
    render(pipe, steps=12)
    assert len(seen) == 4 if cache != "broadcast" else len(seen) >= 2  # which skips the second branch's calls altogether
    assert min(map(len, seen.values())) < 12
    for calls in seen.values():
        assert [how for _, how in calls] == [("refresh", "reuse", "reuse")[i % 3] for i in range(len(calls))]
        assert len({step for step, _ in calls}) == len(calls)


def test_another_batch_starts_anew_and_a_phase_that_ends_leaves_nothing(pipes):
    model = pipes[0].transformer
    phases = [Phase(span, Window(size=(1, 1, 1)), reuse=Reuse("retention", 5)) for span in ((1.0, 0.5), (0.5, 0.0))]
    handle = fastdit.accelerate(model, Config(tuple(phases), (1, 2, 2), min_tokens=0))
    x, text = torch.randn(2, 4, 3, 16, 16), torch.randn(2, 512, 16)
    held = []
    with torch.no_grad():
        for sigma, batch in ((900.0, 1), (800.0, 1), (700.0, 2), (600.0, 1), (400.0, 1)):
            model(x[:batch], torch.full((batch,), sigma), text[:batch])
            held.append(sum(memory.bytes() for site in handle.sites for memory in site.memories.values()))
    assert [ran.how for ran in handle.sites[0].calls] == ["refresh", "reuse", "refresh", "reuse", "refresh"]
    assert held == [held[0], held[0], 3 * held[0], 3 * held[0], held[0]]
    assert fastdit.report(model).memory == 3 * held[0], "when it was most"


def test_copy_remembers_nothing_and_two_denoisers_have_their_own(pipes):
    pipe, _ = pipes
    fastdit.accelerate(pipe, windows_reusing())
    render(pipe)
    twin = copy.deepcopy(pipe.transformer)
    assert fastdit.report(twin).memory == 0
    assert fastdit.report(pipe).memory > 0
    pipe.transformer_2 = tiny_wan_pipeline().transformer
    pipe.register_to_config(boundary_ratio=0.5)
    fastdit.accelerate(pipe, windows_reusing())
    out = render(pipe)
    sites = fastdit.report(pipe).sites
    assert len(sites) == 4
    assert all(site.ran != "never" and site.memory > 0 for site in sites)
    assert out.isfinite().all()


def test_rows_with_other_padding_have_statistics_of_their_own(pipes):
    """Two prompts in a batch, equally long, whose padding lies elsewhere: each as if it were alone."""
    model = pipes[0].transformer
    attn = model.blocks[0].attn1
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(3, 2, 3 * 4 * 4 + 8, 128, generator=generator)
    shown = torch.ones(2, 1, 1, 56, dtype=torch.bool)
    shown[0, ..., 50:52] = shown[1, ..., 54:56] = False

    def answers(rows):
        handle = fastdit.accelerate(model, windows_reusing("residual"))
        found = []
        for i, hidden in enumerate(steps):
            forward = enter(handle.denoisers[0], (3, 4, 4), 0.9 - 0.1 * i, after=8)
            found.append(attn.processor(attn, hidden[rows], attention_mask=shown[rows])[:, :50])
        assert forward.seen[0] == 1
        return torch.stack(found), [ran.how for ran in handle.sites[0].calls]

    with torch.no_grad():
        both, hows = answers(slice(0, 2))
        assert hows == ["refresh"] * 2 + ["reuse"] * 4
        for row in (0, 1):
            assert torch.allclose(answers(slice(row, row + 1))[0], both[:, row : row + 1], atol=1e-5)


@pytest.mark.parametrize("kind", ["residual", "broadcast"])
def test_density_is_that_of_what_ran(pipes, kind):
    """All pairs in a refresh, the window's in a sparse step, none where the last output serves again."""
    pipe, _ = pipes
    fastdit.accelerate(pipe, windows_reusing(kind))
    render(pipe)
    window = 1 / 12 if kind == "residual" else 0.0
    assert fastdit.report(pipe).density == pytest.approx((2 + 4 * window) / 6)


def test_memory_is_counted(pipes):
    pipe, _ = pipes
    fastdit.accelerate(pipe, windows_reusing(store="bfloat16"))
    render(pipe)
    tokens, channels, heads = 3 * 4 * 4, 128, 2
    a_branch = tokens * channels * 2 + tokens * heads * 4
    assert fastdit.report(pipe).memory == a_branch * 2 * 2  # branches, layers
    assert "statistics held" in str(fastdit.report(pipe))


@pytest.mark.slow
def test_compiled_without_another_graph(pipes):
    """All of it inside the opaque op: as many graphs at the last step as at the first."""
    pipe, fresh = pipes
    early = Phase((1.0, 0.5), Window(size=(1, 1, 1)), reuse=Reuse("retention", 3))
    late = Phase((0.5, 0.0), TopMass(density=0.3), reuse=Reuse(maps=2))
    both = Config((early, late), (1, 2, 2), min_tokens=0, error_budget=0.9)
    fastdit.accelerate(pipe, both)
    fastdit.accelerate(fresh, both)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    pipe.transformer.compile(fullgraph=True, backend=counter)
    out = render(pipe)
    first = counter.frame_count
    assert torch.allclose(out, render(fresh), atol=1e-4)
    assert torch.equal(out, render(pipe))
    assert counter.frame_count == first <= 2
