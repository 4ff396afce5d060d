"""Statistics kept from step to step: Re-ttention's properties, and that state leaks from no branch, run or pipeline."""

import copy
import math
from dataclasses import replace

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
from util import tiny_wan_pipeline

import fastdit
from fastdit import Config, Phase, Window, memory
from fastdit.attend import _Call
from fastdit.blockmask import BlockMask
from fastdit.layout import Layout
from fastdit.memory import Memory, Stored
from fastdit.plan import Plan
from fastdit.policies import SpatialTemporal, TopMass
from fastdit.quant import Quant
from fastdit.reference import attention, relative_error, token_mask
from fastdit.reuse import KINDS, Reuse

LAYOUT = Layout((4, 6, 6), (1, 3, 3))
KEPT = Window(size=(1, 3, 3)).select(LAYOUT)


def tensors(seed=0, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, LAYOUT.length, 16, dtype=torch.float64, generator=generator) * scale for _ in range(3)]


def plan_of(kept=KEPT):
    return Plan(0, 0.25, BlockMask.from_tile_map(kept, LAYOUT), Quant(), None)


def call(reuse, held, q, k, v, plan=None):
    return memory.attention(q, k, v, plan or plan_of(), reuse, held, None, lambda: attention(q, k, v)[0])


def exactly(**fields):
    return Reuse(**{"store": "float32", "refresh": 100} | fields)


def test_refresh_is_dense_and_the_residual_is_what_was_dropped():
    q, k, v = tensors()
    held = Memory()
    out, how = call(exactly(kind="retention"), held, q, k, v)
    full, lse = attention(q, k, v)
    mask = token_mask(LAYOUT, KEPT)
    assert how == "refresh"
    assert relative_error(out, full) < 1e-12
    part, part_lse = attention(q, k, v, mask)
    ratio = (part_lse - lse).exp()
    assert torch.allclose(held.ratio, ratio, atol=1e-12)
    assert ((held.ratio > 0) & (held.ratio <= 1)).all()
    assert held.ratio.shape == q.shape[:3]
    weights = ((q @ k.mT) * 16**-0.5 - lse[..., None]).exp()
    assert torch.allclose(held.ratio, (weights * mask).sum(-1), atol=1e-12)  # the LSE formula is the ratio of sums
    dropped = (weights * ~mask) @ v
    assert relative_error(held.kept.load(q), dropped) < 1e-6  # kept in float32
    assert relative_error(full, ratio[..., None] * part + dropped) < 1e-12


def test_same_inputs_give_dense_again_and_the_ramp_adds_what_it_says():
    q, k, v = tensors(1)
    full, part = attention(q, k, v)[0], attention(q, k, v, token_mask(LAYOUT, KEPT))[0]
    held = Memory()
    call(exactly(kind="retention", ramp=0), held, q, k, v)
    for _ in range(5):
        out, how = call(exactly(kind="retention", ramp=0), held, q, k, v)
        assert how == "reuse"
        assert relative_error(out, full) < 1e-6
    held, ramp = Memory(), 0.01
    call(exactly(kind="retention", ramp=ramp), held, q, k, v)
    for n in range(4):
        out, _ = call(exactly(kind="retention", ramp=ramp), held, q, k, v)
        added = ((held.ratio + n * ramp).clamp(max=1) - held.ratio)[..., None] * part
        assert relative_error(out - full, added) < 1e-5 or n == 0
        assert n > 0 or relative_error(out, full) < 1e-6  # the first sparse step uses ρ itself


def test_a_ratio_is_never_above_one():
    """Neither where rounded logits say so, nor where the ramp leads there."""
    q, k, v = tensors(1)
    held, plan = Memory(), replace(plan_of(torch.ones_like(KEPT)), quant=Quant("int4"))
    call(exactly(kind="retention"), held, q, k, v, plan)
    assert held.ratio.max() == 1
    assert held.ratio.min() < 1
    held = Memory()
    call(exactly(kind="ratio", ramp=1), held, q, k, v)
    part = attention(q, k, v, token_mask(LAYOUT, KEPT))[0]
    assert relative_error(call(exactly(kind="ratio", ramp=1), held, q, k, v)[0], held.ratio[..., None] * part) < 1e-12
    assert relative_error(call(exactly(kind="ratio", ramp=1), held, q, k, v)[0], part) < 1e-12


def test_a_row_depends_on_its_own_query_alone():
    q, k, v = tensors(2)
    one, two = Memory(), Memory()
    call(exactly(kind="retention"), one, q, k, v)
    other = q.clone()
    other[:, :, 7] += 1
    call(exactly(kind="retention"), two, other, k, v)
    same = torch.arange(LAYOUT.length) != 7
    assert torch.equal(one.ratio[:, :, same], two.ratio[:, :, same])
    assert not torch.equal(one.ratio[:, :, 7], two.ratio[:, :, 7])


def test_nothing_dropped_nothing_remembered():
    q, k, v = tensors(3)
    held = Memory()
    call(exactly(kind="retention"), held, q, k, v, plan_of(torch.ones_like(KEPT)))
    assert torch.allclose(held.ratio, torch.ones(()).double())
    assert held.kept.load(q).abs().max() < 1e-6


def test_limits_are_the_baselines():
    """ρ = 1 is DiTFastAttn's O_sparse + (O_full − O_sparse); no window at all is the last dense output."""
    q, k, v = tensors(4)
    later = [x + 0.05 * y for x, y in zip((q, k, v), tensors(5), strict=True)]
    mask = token_mask(LAYOUT, KEPT)
    full, part, part_later = attention(q, k, v)[0], attention(q, k, v, mask)[0], attention(*later, mask)[0]
    for kind, expected in (("residual", part_later + full - part), ("broadcast", full)):
        held = Memory()
        call(exactly(kind=kind), held, q, k, v)
        assert relative_error(call(exactly(kind=kind), held, *later)[0], expected) < 1e-6
    held = Memory()
    call(exactly(kind="ratio"), held, q, k, v)
    assert held.kept is None
    assert relative_error(call(exactly(kind="ratio"), held, *later)[0], held.ratio[..., None] * part_later) < 1e-12


def test_order_of_errors_under_small_drift():
    """papers: at 5 % drift of random data, sparse alone > ratio > residual > Re-ttention (2.86, .95, .21, .08)."""
    q, k, v = tensors(6)
    later = [x + 0.05 * y for x, y in zip((q, k, v), tensors(7), strict=True)]
    truth = attention(*later)[0]
    errors = []
    for kind in ("none", "ratio", "residual", "retention"):
        held, reuse = Memory(), exactly(kind=kind, ramp=0)
        call(reuse, held, q, k, v)
        errors.append(relative_error(call(reuse, held, *later)[0], truth))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.15 < 0.5 < errors[1]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_refresh_comes_every_so_many_steps(kind):
    q, k, v = tensors(8)
    held = Memory()
    found = [call(Reuse(kind=kind, refresh=4), held, q, k, v)[1] for _ in range(9)]
    assert found == ["refresh", *["reuse"] * 3] * 2 + ["refresh"]


@pytest.mark.parametrize(("store", "error"), [("float32", 1e-6), ("bfloat16", 4e-3), ("fp8", 0.04)])
@pytest.mark.parametrize("host", [False, True])
def test_stores(store, error, host):
    x = torch.randn(2, 3, 50, 32) * torch.logspace(-6, 4, 50)[:, None]
    stored = Stored.of(x, store, host)
    back = stored.load(x)
    assert ((back - x).norm(dim=-1) / x.norm(dim=-1)).max() < error
    assert Memory(kept=stored).bytes() == x.numel() * {"float32": 4, "bfloat16": 2, "fp8": 1}[store] + (x.numel() // 32 * 4) * (
        store == "fp8"
    )
    assert Stored.of(torch.zeros(2, 8), store, host).load(x).eq(0).all()


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the host's memory is another one than the GPU's only where there is a GPU"
)
def test_what_the_gpu_has_no_room_for_goes_to_the_host(monkeypatch):
    q, k, v = (x.float().cuda() for x in tensors(9))
    kept = BlockMask.from_tile_map(KEPT.cuda(), LAYOUT)
    for asked, room, expected in ((True, 1 << 40, "cpu"), (False, 1 << 40, "cuda"), (False, 0, "cpu")):
        monkeypatch.setattr(memory, "free_bytes", lambda device: room if device.type == "cuda" else 1 << 40)  # noqa: B023
        held = Memory()
        call(exactly(kind="residual", host=asked), held, q, k, v, replace(plan_of(), block_mask=kept))
        assert held.kept.data.device.type == expected
        assert held.bytes(torch.device("cpu")) == (q.nbytes if expected == "cpu" else 0)
        out, how = call(exactly(kind="residual", host=asked), held, q, k, v, replace(plan_of(), block_mask=kept))
        assert how == "reuse"
        assert relative_error(out, attention(q, k, v)[0]) < 1e-3


def test_what_does_not_fit_is_not_remembered(monkeypatch):
    q, k, v = tensors(9)
    held = Memory()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    out, how = call(Reuse(kind="retention"), held, q, k, v)
    assert how == "dense"
    assert "no room" in held.no_room
    assert held.bytes() == 0
    assert relative_error(out, attention(q, k, v)[0]) < 1e-12
    assert call(Reuse(kind="retention"), held, q, k, v)[1] == "dense"


def test_all_together_never_take_more_than_half_of_what_was_free(monkeypatch):
    """Sites that come first have their statistics, the others stay dense; R and its scales and ratios are all counted."""
    q, k, v = tensors(9)
    free, sites = 100_000, [Memory() for _ in range(8)]
    monkeypatch.setattr(memory, "free_bytes", lambda device: free - sum(site.bytes(device) for site in sites))

    def held(device):
        return sum(site.bytes(device) for site in sites)

    reuse = Reuse(kind="retention", store="fp8")
    hows = [memory.attention(q, k, v, plan_of(), reuse, site, None, lambda: q, held)[1] for site in sites]
    one = sites[0].bytes()
    assert one == q.numel() + q.numel() // 16 * (4 + 8)  # float64 has ratios of its own width
    assert hows == ["refresh"] * (free // 2 // one) + ["dense"] * (8 - free // 2 // one)
    assert held(None) == held(torch.device("cpu")) <= free // 2
    assert held(torch.device("meta")) == 0


@pytest.mark.parametrize(
    ("kind", "refresh", "maps", "age"), [("none", 5, 3, 3), ("ratio", 5, 1, 5), ("ratio", 4, 6, 8), ("ratio", 3, 6, 6)]
)
def test_statistics_hold_for_one_map_only(kind, refresh, maps, age):
    assert Reuse(kind, refresh=refresh, maps=maps).map_age == age


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"kind": "magic"}, "kind"), ({"store": "int3"}, "store"), ({"refresh": 0}, "refresh"), ({"ramp": -1}, "ramp")],
)
def test_what_is_wrong_is_named(fields, named):
    with pytest.raises(ValueError, match=named):
        Reuse(**fields)
    with pytest.raises(ValueError, match="reuse"):
        Reuse.from_dict({"kinds": "ratio"})


# Whole pipelines from here on: 3×4×4 tokens, windows that drop most of them.
def config(kind="retention", policy=None, **fields):
    policy = policy or Window(size=(1, 1, 1))
    phase = Phase((1.0, 0.0), policy, reuse=Reuse(kind=kind, refresh=3, **fields))
    return Config((phase,), (1, 2, 2), min_tokens=0)


def render(pipe, prompt="a b c", seed=0, steps=6, size=64, callback=None, **more):
    video = pipe(
        prompt, negative_prompt="d e", num_frames=9, height=size, width=size, num_inference_steps=steps, output_type="latent",
        generator=torch.Generator().manual_seed(seed), callback_on_step_end=callback, **more,
    )  # fmt: skip
    return video.frames


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
    fastdit.accelerate(used, config())
    first = render(used)
    assert math.isfinite(float(first.sum()))
    second = render(used, "d a", seed=5)
    fastdit.accelerate(fresh, config())
    assert torch.equal(second, render(fresh, "d a", seed=5))
    assert fastdit.report(used).phases[0].reused > 0


def test_a_run_that_broke_spoils_nothing(pipes):
    used, fresh = pipes
    fastdit.accelerate(used, config())
    fastdit.accelerate(fresh, config())

    def stop(pipe, step, timestep, values):
        if step == 4:
            raise InterruptedError("as a user would")
        return values

    with pytest.raises(InterruptedError):
        render(used, seed=3, callback=stop)
    assert torch.equal(render(used, seed=4), render(fresh, seed=4))
    # a new run that begins below the noise level at which the last one broke
    with pytest.raises(InterruptedError):
        render(used, seed=3, callback=stop)
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
    fastdit.accelerate(used, config())
    fastdit.accelerate(fresh, config())
    render(used, size=96)
    assert torch.equal(render(used), render(fresh))


def test_two_pipelines_do_not_meet(pipes):
    """Steps of two pipelines alternate, in one thread, as a page with two users would run them."""
    a, b = pipes
    alone = []
    for pipe, seed in ((a, 1), (b, 2)):
        fastdit.accelerate(pipe, config())
        alone.append(render(pipe, seed=seed))
    both = {}

    def between(pipe, step, timestep, values):
        if step == 2:
            both["b"] = render(b, seed=2)
        return values

    both["a"] = render(a, seed=1, callback=between)
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
        handle = fastdit.accelerate(model, config(store="float32"))
        found = []
        with torch.no_grad():
            for sigma in (900.0, 800.0, 700.0, 600.0):
                found.append([model(x, torch.tensor([sigma]), texts[i])[0] for i in branches])
        return found, handle

    both, handle = run([0, 1])
    for branch in (0, 1):
        alone, _ = run([branch])
        assert all(torch.equal(a[0], b[branch]) for a, b in zip(alone, both, strict=True))
    assert {key[1] for site in handle.sites for key in site.memories} == {0, 1}


def test_both_branches_in_one_batch(pipes):
    pipe, _ = pipes
    model = pipe.transformer
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 16, 16, generator=generator)
    text = torch.randn(2, 512, 16, generator=generator) * 30
    found = []
    for batches in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        fastdit.accelerate(model, config(store="float32"))
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
        fastdit.accelerate(pipe, config("none", policy, maps=maps))
        render(pipe)
        counts[maps] = len(chosen)
    assert counts == {1: 6 * 2 * 2, 2: 3 * 2 * 2, 6: 1 * 2 * 2}  # steps, branches, layers
    chosen.clear()
    fastdit.accelerate(pipe, config("retention", policy))
    render(pipe)
    assert len(chosen) == 2 * 2 * 2  # a map a refresh, each third step


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
    handle = fastdit.accelerate(pipe, config())
    seen = {}
    record = _Call.record

    def note(self, plan, how, *rest):
        seen.setdefault((self.site.layer, self.site.denoiser.branch), []).append((handle.clock.step, how))
        record(self, plan, how, *rest)

    monkeypatch.setattr(_Call, "record", note)
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
            held.append(fastdit.report(model).memory)
    assert [ran.how for ran in handle.sites[0].ran] == ["refresh", "reuse", "refresh", "reuse", "refresh"]
    assert held == [held[0], held[0], 3 * held[0], 3 * held[0], held[0]]


def test_copy_remembers_nothing_and_two_denoisers_have_their_own(pipes):
    pipe, _ = pipes
    fastdit.accelerate(pipe, config())
    render(pipe)
    twin = copy.deepcopy(pipe.transformer)
    assert fastdit.report(twin).memory == 0
    assert fastdit.report(pipe).memory > 0
    pipe.transformer_2 = tiny_wan_pipeline().transformer
    pipe.register_to_config(boundary_ratio=0.5)
    fastdit.accelerate(pipe, config())
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
        handle = fastdit.accelerate(model, config("residual"))
        handle.denoisers[0].grid, handle.denoisers[0].after = (3, 4, 4), 8
        found = []
        for i, hidden in enumerate(steps):
            handle.denoisers[0].sigma = torch.tensor(0.9 - 0.1 * i)
            found.append(attn.processor(attn, hidden[rows], attention_mask=shown[rows])[:, :50])
        return torch.stack(found), [ran.how for ran in handle.sites[0].ran]

    with torch.no_grad():
        both, hows = answers(slice(0, 2))
        assert hows == ["refresh"] * 2 + ["reuse"] * 4
        for row in (0, 1):
            assert torch.allclose(answers(slice(row, row + 1))[0], both[:, row : row + 1], atol=1e-5)


@pytest.mark.parametrize("kind", ["residual", "broadcast"])
def test_density_is_that_of_what_ran(pipes, kind):
    """All pairs in a refresh, the window's in a sparse step, none where the last output serves again."""
    pipe, _ = pipes
    fastdit.accelerate(pipe, config(kind))
    render(pipe)
    window = 1 / 12 if kind == "residual" else 0.0
    assert fastdit.report(pipe).density == pytest.approx((2 + 4 * window) / 6)


def test_memory_is_counted(pipes):
    pipe, _ = pipes
    fastdit.accelerate(pipe, config(store="bfloat16"))
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
