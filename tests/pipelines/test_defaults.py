"""Numbers do not depend on PyTorch's defaults: `torch.set_default_dtype` and `torch.set_default_device`.

What is cached (orders of tiles, maps of static policies) is made under the other default first, on a grid of the test's own.
"""

import contextlib

import pytest
import torch
from families import CASES

import fastdit
from fastdit import Config, Phase, Quant, Reuse, Window, ops
from fastdit.approx import residual_store, step_cache
from fastdit.approx.remainder import REMAINDERS, attention
from fastdit.approx.residual_store import FORMS
from fastdit.approx.step_cache import Memory
from fastdit.config import AUTO
from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.pipelines.family import noise_level
from fastdit.pipelines.registry import ADAPTERS
from fastdit.planning.forward_plan import CallPlan, complete
from fastdit.policies import LSH, Antidiagonal, Dense, PowerOfTwo, Radial, SpatialTemporal, Stripe, TopMass
from fastdit.reporting import head_profile


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "another device": lambda: torch.device("meta"),
}
defaults = pytest.mark.parametrize("other", DEFAULTS)


def inputs(other, kind):
    """A layout of nobody else's, and q, k, v of it."""
    layout = Layout((2, 5, 6 + list(DEFAULTS).index(other)), (1, 4, 3 + kind), text_len=5)
    generator = torch.Generator().manual_seed(0)
    return layout, [torch.randn(1, 2, layout.length, 16, generator=generator).bfloat16() for _ in range(3)]


def equal(a, b):
    assert [x.dtype for x in a] == [x.dtype for x in b]
    assert all(x.device.type == "cpu" for x in a)
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def twice(other, compute):
    with DEFAULTS[other]():
        changed = compute()
    return changed, compute()


POLICIES = [
    Dense(), Window(size=(1, 1, 3)), Radial(density=0.5), PowerOfTwo(), PowerOfTwo(along="raster"),
    Antidiagonal(tau=0.7, stride=5), TopMass(density=0.5, similarity=0.1), Stripe(theta=0.5, window=(1, 1, 1)), LSH(),
    SpatialTemporal(),
]  # fmt: skip
QUANTS = [
    Quant(),
    Quant("fp8", "fp8"),
    Quant("int8", "int8", smooth_q=True, smooth_k=True, smooth_v=True),
    Quant("int4", "fp8"),
]


@defaults
def test_policies(other):
    layout, (q, k, v) = inputs(other, 0)

    def maps():
        video = [layout.to_tiles(x)[:, :, : layout.video_tiles] for x in (q, k, v)]
        kept = [policy.select(layout, *video[: len(policy.reads)]) for policy in POLICIES]
        return [complete(each, layout) for each in kept]

    assert equal(*twice(other, maps))


@defaults
@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_attention_with_every_remainder(other, quant):
    layout, qkv = inputs(other, 1)

    def answers():
        mask = BlockMask.from_tile_map(complete(Window(size=(1, 1, 1)).select(layout), layout), layout)
        found = [x for remainder in REMAINDERS for x in attention(*qkv, mask, quant, remainder=remainder)]
        return [*found, *ops.attention(*qkv, quant=quant)]

    assert equal(*twice(other, answers))


@defaults
@pytest.mark.parametrize("store", [*FORMS, AUTO])
@pytest.mark.parametrize("kind", ["retention", "residual", "ratio", "broadcast"])
def test_statistics(other, store, kind):
    layout, (q, k, v) = inputs(other, 2)
    reuse = Reuse(kind, refresh=3, store=store)

    def steps():
        mask = BlockMask.from_tile_map(complete(Window(size=(1, 1, 1)).select(layout), layout), layout)
        plan, held = CallPlan(0, density=mask.density(), block_mask=mask, reuse=reuse), Memory()
        found = [step_cache.attention(q * level, k, v, plan, reuse, held, None, lambda: q + v)[0] for level in (1.0, 0.9, 0.8)]
        if (kept := held.kept) is not None:
            assert [x.dtype for x in kept.tensors] == [dtype for _, dtype in residual_store.layout(kept.shape, kept.form)]
        return found

    assert equal(*twice(other, steps))


@defaults
def test_profiles(other):
    layout, (q, k, _) = inputs(other, 3)

    def mass():
        config, seen = head_profile.watching(1, layout.tile)
        video = [layout.to_tiles(x)[:, :, : layout.video_tiles] for x in (q, k)]
        for _ in range(2):
            kept = config.phases[0].policy.select(layout, *video)
        chosen = head_profile.choose(seen, [Window(size=(1, 1, 3)), Window(size=(1, 3, 1))])
        assert isinstance(chosen, Config)
        return [seen.mass[0], kept]

    assert equal(*twice(other, mass))


@defaults
@pytest.mark.parametrize("timestep", [501, 500.7, torch.tensor(500.7), torch.tensor([501]), [500.7, 500.7]], ids=str)
def test_noise_levels(other, timestep):
    assert equal(*twice(other, lambda: [noise_level(timestep)]))


@defaults
@pytest.mark.parametrize("timestep", [501, 0.3717], ids=str)
def test_timesteps_of_unets(other, timestep):
    case = next(case for case in CASES if case.cls == "UNet2DConditionModel")
    model, call = case.model(), case.call() | {"timestep": timestep}
    assert equal(*twice(other, lambda: [(facts := ADAPTERS[case.cls].facts(model, (), call)).sigma, facts.timestep]))


@pytest.mark.parametrize("other", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("store", [*FORMS, AUTO])
@torch.no_grad()
def test_a_whole_denoiser(other, store):
    """Whose own answer does not depend on the default."""
    case = next(case for case in CASES if case.cls == "WanTransformer3DModel")
    window = Window(size=(1, 1, 1))
    phase = Phase((0.8, 0.0), window, Quant("int8", "fp8"), reuse=Reuse("residual", refresh=2, store=store))
    config = Config((Phase((1.0, 0.8), TopMass(density=0.5)), phase), (1, 2, 2), min_tokens=0, max_density=1, error_budget=50.0)
    call = case.call()

    def run(config):
        model = case.model()
        with fastdit.accelerate(model, config), DEFAULTS[other]() if changed else contextlib.nullcontext():
            return [model(**call | {"timestep": torch.full_like(call["timestep"], 1000 * x)})[0] for x in (0.9, 0.7, 0.6)]

    answers = {}
    for changed in (True, False):
        answers[changed] = [*run(config), *run("exact")]
    assert equal(answers[True][3:], answers[False][3:])
    assert equal(answers[True], answers[False])
