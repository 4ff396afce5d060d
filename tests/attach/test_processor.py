"""The seam on a real WanTransformer3DModel: eager, compiled, copied, and everything it must leave alone."""

import copy
import inspect
import weakref

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import Attention
from models import wan, wan_inputs
from torch._dynamo.testing import CompileCounterWithBackend
from util import enter

import fastdit
from fastdit import Config, Phase, Window
from fastdit.attach.handle import Denoiser, Handle, Site
from fastdit.attach.processor import BoundProcessor, installed
from fastdit.attach.seam import bound_class
from fastdit.core.reference import relative_error
from fastdit.planning.adapter import Facts

SPARSE = Config(
    phases=(Phase((1.0, 0.9)), Phase((0.9, 0.0), Window(size=(1, 1, 3)))), tile=(1, 4, 4), min_tokens=0, max_density=1
)
"""Dense above σ = .9; below, 3 × 2 × 2 tiles with own frame and row: density 1/6."""


def run(model, **inputs):
    with torch.no_grad():
        return model(**wan_inputs(**inputs))[0]


@pytest.fixture
def model():
    return wan()


@pytest.mark.parametrize("sigma", [1.0, 0.5])
@pytest.mark.parametrize("batch", [1, 2])
def test_exact_is_bit_exact(model, sigma, batch):
    stock = run(model, sigma=sigma, batch=batch)
    fastdit.accelerate(model, "exact")
    assert torch.equal(run(model, sigma=sigma, batch=batch), stock)


def test_the_noise_level_decides(model):
    noisy, clean = run(model, sigma=0.95), run(model, sigma=0.5)
    fastdit.accelerate(model, SPARSE)
    assert torch.equal(run(model, sigma=0.95), noisy)
    assert 1e-3 < relative_error(run(model, sigma=0.5), clean) < 1


def test_a_window_over_everything_equals_stock(model):
    stock = run(model)
    fastdit.accelerate(model, Config(phases=(Phase(policy=Window(density=1.0)),), tile=(2, 3, 5), min_tokens=0, max_density=1))
    assert relative_error(run(model), stock) < 1e-5
    assert fastdit.report(model).sites[0].ran == "sparse"


def test_only_self_attention_is_bound(model):
    fastdit.accelerate(model)
    for name, module in model.named_modules():
        if hasattr(module, "processor"):
            assert isinstance(module.processor, BoundProcessor) == name.endswith("attn1")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole_is_one_graph_for_all_steps(model, backend):
    levels = (1.0, 0.95, 0.8, 0.5)
    stock = [run(model, sigma=s) for s in levels]
    fastdit.accelerate(model, SPARSE)
    eager = [run(model, sigma=s) for s in levels]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    frames = []
    for sigma, expected, dense in zip(levels, eager, stock, strict=True):
        got = run(compiled, sigma=sigma)
        frames.append(counter.frame_count)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert (relative_error(got, dense) < 1e-5) == (sigma > 0.9)
    assert frames == [2, 2, 2, 2]  # the hook that reads the call's facts, and the forward; nothing more after the first step
    assert [site.ran for site in fastdit.report(model).sites] == ["mixed", "mixed"]


def test_compiled_exact_is_bit_exact_to_compiled_stock(model):
    torch._dynamo.reset()
    stock = [run(torch.compile(model, fullgraph=True), sigma=s) for s in (1.0, 0.5)]
    torch._dynamo.reset()
    fastdit.accelerate(model, "exact")
    compiled = torch.compile(model, fullgraph=True)
    for sigma, expected in zip((1.0, 0.5), stock, strict=True):
        assert torch.equal(run(compiled, sigma=sigma), expected)


def test_compiled_by_block_is_one_graph_for_all_layers(model):
    fastdit.accelerate(model, SPARSE)
    eager = [run(model, sigma=s) for s in (1.0, 0.5)]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    for sigma, expected in zip((1.0, 0.5), eager, strict=True):
        torch.testing.assert_close(run(model, sigma=sigma), expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_the_grid_follows_the_call(model):
    fastdit.accelerate(model, SPARSE)
    for grid in ((3, 8, 8), (1, 5, 7), (4, 4, 12)):
        run(model, grid=grid)
        assert installed(model).call.forward.plan.sequence.grids == (grid,)
        assert fastdit.report(model).sites[0].ran == "sparse"


def test_the_original_backend_serves_dense_phases(model):
    """A backend set on the model reaches the original processor and runs the dense calls, and only those."""
    fastdit.accelerate(model, SPARSE)
    model.set_attention_backend("_native_math")
    try:
        assert model.blocks[0].attn1.processor.inner._attention_backend == "_native_math"
        reference = wan()
        with attention_backend("_native_math"):
            assert torch.equal(run(model, sigma=0.95), run(reference, sigma=0.95))
    finally:
        model.reset_attention_backend()


def test_what_is_not_ours_goes_to_the_original_and_is_reported(model):
    fastdit.accelerate(model, SPARSE)
    attn, hidden = model.blocks[0].attn1, torch.randn(1, 192, 128)
    forward = enter(installed(model), (3, 8, 8))
    mask = torch.rand(1, 1, 192, 192) < 0.5
    with torch.no_grad():
        got = attn.processor(attn, hidden, attention_mask=mask)
        expected = attn.processor.inner(attn, hidden, attention_mask=mask)
    assert torch.equal(got, expected)
    assert fastdit.report(model).sites[0].reason == "the mask hides more than whole keys"
    assert forward.seen[0] == 1


def test_processors_that_call_sdpa_themselves():
    """diffusers' older `Attention` (UNets, CogVideoX, SD3): its processor calls F.scaled_dot_product_attention."""
    torch.manual_seed(0)
    attn = Attention(query_dim=128, heads=2, dim_head=64).eval().requires_grad_(False)
    handle = Handle(SPARSE)
    denoiser = Denoiser("unet", None, handle, weakref.ref(attn))
    handle.denoisers.append(denoiser)
    denoiser.attentions.append(weakref.ref(attn))
    denoiser.sites.append(Site("attn1", 0, 0, denoiser))
    forward = enter(denoiser, (3, 8, 8))
    hidden = torch.randn(2, 192, 128)
    stock, inner = attn(hidden), attn.processor
    attn.set_processor(bound_class(type(inner))(inner, denoiser.sites[0]))
    assert inspect.signature(type(attn.processor).__call__) == inspect.signature(type(inner).__call__)
    assert 1e-4 < relative_error(attn(hidden), stock) < 1
    assert forward.seen[0] == 1
    forward = enter(denoiser, (3, 8, 8), sigma=0.95)
    assert torch.equal(attn(hidden), stock)
    assert forward.seen[0] == 1


def test_training_is_refused(model):
    fastdit.accelerate(model, SPARSE)
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="inference only"):
        model(**wan_inputs())[0].sum().backward()


def test_a_copy_has_a_handle_of_its_own(model):
    handle = fastdit.accelerate(model, SPARSE)
    twin = copy.deepcopy(model)
    run(twin)
    other = installed(twin).handle
    assert other is not handle
    assert other.number != handle.number
    assert (handle.runs, other.runs) == (0, 1)
    fastdit.restore(twin)
    assert fastdit.report(model).sites[0].ran == "never"


def test_a_new_run_counts_anew_even_after_an_exception(model):
    fastdit.accelerate(model, SPARSE)
    for sigma in (1.0, 0.8, 0.6):
        run(model, sigma=sigma)
    with pytest.raises(ZeroDivisionError):
        model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
        run(model, sigma=0.4)
    model.blocks[1]._forward_pre_hooks.clear()
    run(model, sigma=1.0)
    assert [phase.calls for phase in fastdit.report(model).phases] == [2, 0]


def test_tokens_that_are_not_the_grid_stay_dense(model):
    fastdit.accelerate(model, SPARSE)
    denoiser = installed(model)
    facts = denoiser.adapter.facts
    denoiser.adapter = type("Wrong", (), {"facts": staticmethod(lambda *a: Facts((2, 8, 8), facts(*a).sigma))})()
    stock = run(wan())
    assert torch.equal(run(model), stock)
    assert "192 tokens" in fastdit.report(model).sites[0].reason


def test_sdpa_is_untouched_outside():
    assert F.scaled_dot_product_attention is torch.nn.functional.scaled_dot_product_attention
    assert F.scaled_dot_product_attention.__module__ != "fastdit.attach.seam"
