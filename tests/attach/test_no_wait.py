"""Nobody waits for the GPU in a layer: PyTorch's own watch over synchronization, around the sites of a real denoiser."""

import math

import pytest
import torch
from models import wan, wan_inputs

import fastdit
from fastdit import Config, Phase, Quant, Reuse, Window
from fastdit.approx import remainder
from fastdit.core.reference import relative_error
from fastdit.policies import LSH, Antidiagonal, Dense, PowerOfTwo, Radial, SpatialTemporal, Stripe, TopMass

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

POLICIES = [
    Window(size=(1, 1, 1)), Radial(density=0.3), SpatialTemporal(density=0.3), Antidiagonal(density=0.3), TopMass(density=0.3),
    Stripe(), PowerOfTwo(), LSH(density=0.3), Dense(),
]  # fmt: skip
QUANTS = [Quant(), Quant("fp8", "fp8"), Quant("int8", "fp8")]


def of(policy, **more):
    return Config((Phase(policy=policy, **more),), (1, 4, 4), min_tokens=0, max_density=1)


CONFIGS = {
    "exact": Config(),
    **{f"{policy}": of(policy) for policy in POLICIES},
    **{f"window in {quant}": of(Window(size=(1, 1, 1)), quant=quant) for quant in QUANTS[1:]},
    **{f"{kind}": of(Window(size=(1, 1, 1)), reuse=Reuse(kind, 2)) for kind in ("retention", "ratio", "residual", "broadcast")},
    **{f"{kind} remainder": of(Window(size=(1, 1, 1)), remainder=kind) for kind in ("pooled", "sampled")},
    "budget": Config((Phase(policy=TopMass(density=0.3)),), (1, 4, 4), min_tokens=0, max_density=1, error_budget=0.01),
}


@pytest.fixture
def model():
    return wan().to("cuda", torch.bfloat16)


def run(model, sigma=0.9):
    given = {name: x.to("cuda", torch.bfloat16) for name, x in wan_inputs().items() if isinstance(x, torch.Tensor)}
    return model(**given | {"timestep": torch.tensor([1000 * sigma], device="cuda")})[0]


def watched(model):
    """From here on a wait between the model's pre-hooks and its hooks raises. fastdit's own pre-hook, which may, is first."""
    model.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
    model.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"), always_call=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_layer_waits(model, name):
    fastdit.accelerate(model, CONFIGS[name])
    watched(model)
    with torch.no_grad():
        for sigma in (0.9, 0.8, 0.7, 0.6):
            assert run(model, sigma).isfinite().all()


@pytest.mark.parametrize("preset", fastdit.PRESETS)
def test_no_layer_of_a_preset_waits(model, preset):
    handle = fastdit.accelerate(model, preset)
    handle.config = Config(**vars(handle.config) | {"min_tokens": 0, "max_density": 1.0})
    watched(model)
    with torch.no_grad():
        for sigma in (1.0, 0.97, 0.9, 0.8, 0.6, 0.4, 0.2, 0.05):
            assert run(model, sigma).isfinite().all()


@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_an_overflow_in_a_layer_is_repaired_without_a_wait(model, monkeypatch, quant):
    """V of the second layer's second call is poisoned on its way into the kernel, as an overflow would."""
    with torch.no_grad():
        stock = [run(model, sigma) for sigma in (0.9, 0.8, 0.7)]
    original, calls = remainder.attention, []

    def poisoned(q, k, v, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            v = v.clone()
            v[:, :, 5] = math.inf
        return original(q, k, v, *args, **kwargs)

    handle = fastdit.accelerate(model, of(Window(density=1.0), quant=quant))
    monkeypatch.setattr("fastdit.approx.step_cache.attention.__defaults__", (poisoned, None))
    watched(model)
    with torch.no_grad():
        found = [run(model, sigma) for sigma in (0.9, 0.8, 0.7)]
    assert all(relative_error(a, b) < 0.05 for a, b in zip(found, stock, strict=True))
    assert "not finite" in fastdit.report(model).sites[1].reason
    assert [call.how for call in handle.sites[1].calls] == ["sparse", "dense", "dense"]
