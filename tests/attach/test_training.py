"""Training through the seam: dense configurations train as stock does, sparse ones as the masked model."""

import copy
import functools
import pickle

import pytest
import torch
from chequer import SPARSE, masked
from families import BY_NAME, run
from models import Mine, given, layout, state, wan, wan_inputs
from torch.utils.checkpoint import checkpoint
from util import tiny_wan_pipeline

import fastdit
from fastdit import Config, Phase, Quant, Reuse, Window
from fastdit.attach.recompute import Resumed
from fastdit.core.reference import relative_error
from fastdit.policies import Dense, HeadProfile, Radial, TopMass

TILE = (1, 4, 4)
FAMILIES = ["Wan", "HunyuanVideo", "CogVideoX", "SD3", "Flux", "LTXVideo", "UNet2DCondition"]


def of(policy=None, **more):
    return Config((Phase(policy=policy or Window(size=(1, 1, 1)), **more),), TILE, min_tokens=0, max_density=1)


def trained(model, call, recompute=False):
    """(answer, gradient of each parameter) of a fixed loss."""
    model.zero_grad(set_to_none=True)
    if recompute:
        model.enable_gradient_checkpointing()
    out = call(model)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (out * weight).mean().backward()
    if recompute:
        model.disable_gradient_checkpointing()
    return out.detach(), {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def apart(found, expected):
    """The largest relative error of any parameter's gradient, and of all of them together."""
    assert found.keys() == expected.keys()
    whole = torch.cat([x.flatten() for x in expected.values()]).norm()
    return max(float((found[name] - x).norm() / whole) for name, x in expected.items())


def equal(a, b):
    return torch.equal(a[0], b[0]) and a[1].keys() == b[1].keys() and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


def wan_call(model, **more):
    return model(**wan_inputs(**more))[0]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("config", ["exact", of(Dense())], ids=["exact", "Dense()"])
def test_dense_trains_as_stock_to_the_bit(config, train):
    model = wan().requires_grad_(True).train()
    stock = trained(model, wan_call)
    with fastdit.accelerate(model, config, train=train):
        assert equal(trained(model, wan_call), stock)
        assert equal(trained(model, wan_call, recompute=True), stock)
    assert equal(trained(model, wan_call), stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_train_exact_as_stock_and_sparse_as_the_masked_model(family):
    case = BY_NAME[family]
    model, call = case.model().requires_grad_(True).train(), functools.partial(run, case=case)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    stock = trained(model, call)
    with fastdit.accelerate(model, "exact"):
        exact, again = trained(model, call), trained(model, call, recompute=True)
    assert equal(exact, again)
    assert equal(exact, stock) if not case.trims else apart(exact[1], stock[1]) < 1e-5
    with masked(case):
        expected = trained(model, call)
    shows = apart(stock[1], expected[1])
    with fastdit.accelerate(model, SPARSE, train=True):
        sparse, again = trained(model, call), trained(model, call, recompute=True)
        ran = [site for site in fastdit.report(model).sites if site.ran == "sparse"]
    assert len(ran) == case.sites
    assert equal(sparse, again)
    assert relative_error(sparse[0], expected[0]) < 1e-4
    assert apart(sparse[1], expected[1]) < min(1e-4, shows / 3)


def test_inference_alone_has_no_gradient_and_says_how_to_get_one():
    model = wan().requires_grad_(True)
    fastdit.accelerate(model, SPARSE)
    with pytest.raises(RuntimeError, match="train=True"):
        wan_call(model).sum().backward()


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ("balanced", "reuse of residual"),
        ("fast", "phase 1"),
        (of(TopMass(density=0.3)), "top_mass"),
        (of(remainder="sampled"), "sampled"),
        (of(remainder="stripes"), "stripes"),
        (of(reuse=Reuse("broadcast", 2)), "broadcast"),
        (of(HeadProfile((Window(size=(1, 1, 1)), TopMass(density=0.3)), heads=(0, 1))), "head_profile"),
    ],
)
def test_what_cannot_train_says_so_before_the_first_step(config, why):
    model = wan()
    before = state(model)
    with pytest.raises(ValueError, match=why):
        fastdit.accelerate(model, config, train=True)
    assert state(model) == before


def test_a_device_without_a_backward_says_so():
    with pytest.raises(ValueError, match="meta"):
        fastdit.accelerate(wan().to("meta"), SPARSE, train=True)
    fastdit.accelerate(wan().to("meta"), "exact", train=True)


@pytest.mark.parametrize(
    "config",
    [
        "fps", of(Radial(density=0.3)), of(remainder="pooled"),
        of(HeadProfile((Window(size=(1, 1, 1)), Dense()), heads=(0, 1))),
        of(quant=Quant("int8", "fp8", smooth_k=True)), of(Dense(), quant=Quant("fp8", "fp8")),
    ],
    ids=["fps", "radial", "pooled", "heads", "int8", "dense fp8"],
)  # fmt: skip
def test_static_configurations_train_and_a_step_lowers_the_loss(config):
    """Towards the dense model's own answer, as a distillation does."""
    if config == "fps":
        config = Config(**vars(fastdit.preset("fps")) | {"min_tokens": 0, "tile": TILE, "max_density": 1.0})
    model = wan().requires_grad_(True).train()
    target = wan_call(model).detach()
    fastdit.accelerate(model, config, train=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (wan_call(model) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert 0 < losses[-1] < losses[0]
    assert all(site.ran == "sparse" for site in fastdit.report(model).sites)


def test_each_forward_has_its_own_plan_when_blocks_run_again():
    """Two noise levels in one loss: dense at one, sparse at the other. The backward runs the blocks of both again."""
    config = Config((Phase((1.0, 0.7), Dense()), Phase((0.7, 0.0), Window(size=(1, 1, 1)))), TILE, min_tokens=0, max_density=1)
    model = wan().requires_grad_(True).train()

    def both(model):
        return torch.cat([wan_call(model, sigma=0.9), wan_call(model, sigma=0.5, seed=1), wan_call(model, sigma=0.8, seed=2)])

    fastdit.accelerate(model, config, train=True)
    plain, again = trained(model, both), trained(model, both, recompute=True)
    assert equal(plain, again)
    fastdit.accelerate(model, "exact")
    assert apart(trained(model, both)[1], plain[1]) > 1e-4


def test_blocks_recomputed_behind_fastdits_back_are_refused():
    model = wan().requires_grad_(True).train()
    fastdit.accelerate(model, SPARSE, train=True)
    block = model.blocks[0]
    forward = block.forward
    block.forward = lambda *args: checkpoint(forward, *args, use_reentrant=False)
    with pytest.raises(RuntimeError, match="enable_gradient_checkpointing"):
        wan_call(model).sum().backward()


def test_reentrant_checkpoints_too():
    model = wan().requires_grad_(True).train()
    fastdit.accelerate(model, SPARSE, train=True)
    plain = trained(model, wan_call)
    model.enable_gradient_checkpointing(lambda block, *args: checkpoint(block, *args, use_reentrant=True))
    assert apart(trained(model, wan_call)[1], plain[1]) < 1e-6  # what blocks share is added up in another order


def test_nothing_is_remembered_or_measured(monkeypatch):
    monkeypatch.setattr("fastdit.approx.error_guard.probe", lambda *a, **k: pytest.fail("measured"))
    model = wan().requires_grad_(True).train()
    handle = fastdit.accelerate(model, Config(**vars(SPARSE) | {"error_budget": 1e-9}), train=True)
    for seed, sigma in enumerate((0.5, 0.9, 0.2, 0.2)):
        wan_call(model, sigma=sigma, seed=seed).sum().backward()
        with torch.no_grad():
            wan_call(model, sigma=sigma, seed=seed)
    assert handle.bytes() == 0
    assert handle.runs == 8
    assert [[call.how for call in site.calls] for site in handle.sites] == [["sparse"], ["sparse"]]


def test_recomputed_calls_are_not_counted_twice():
    model = wan().requires_grad_(True).train()
    handle = fastdit.accelerate(model, SPARSE, train=True)
    trained(model, wan_call, recompute=True)
    assert [len(site.calls) for site in handle.sites] == [1, 1]


def test_restore_and_copies_of_a_model_that_checkpoints():
    model = wan().requires_grad_(True).train()
    model.enable_gradient_checkpointing(checkpoint_blocks)
    before = state(model)
    fastdit.accelerate(model, SPARSE, train=True)
    first = trained(model, wan_call)
    assert isinstance(model._gradient_checkpointing_func, Resumed)
    twin = copy.deepcopy(model)
    assert twin._gradient_checkpointing_func.denoiser is not model._gradient_checkpointing_func.denoiser
    assert equal(trained(twin, wan_call), first)
    assert pickle.loads(pickle.dumps(model))._gradient_checkpointing_func is checkpoint_blocks
    fastdit.restore(model)
    assert state(model) == before
    assert model._gradient_checkpointing_func is checkpoint_blocks


def checkpoint_blocks(block, *args):
    return checkpoint(block, *args, use_reentrant=False)


@pytest.mark.parametrize("config", ["exact", SPARSE], ids=["exact", "sparse"])
def test_autocast(config):
    model = wan().requires_grad_(True).train()

    def call(model):
        with torch.autocast("cpu", torch.bfloat16):
            return wan_call(model).float()

    stock = trained(model, call)
    fastdit.accelerate(model, config, train=True)
    found = trained(model, call)
    assert equal(found, stock) if config == "exact" else 1e-4 < apart(found[1], stock[1]) < 1
    assert all(x.dtype == torch.float32 for x in found[1].values())


@pytest.mark.parametrize("config", ["exact", SPARSE], ids=["exact", "sparse"])
def test_compiled_to_one_graph(config):
    torch._dynamo.reset()
    model = wan(num_layers=1).requires_grad_(True).train()
    fastdit.accelerate(model, config, train=True)
    eager = trained(model, wan_call)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    out, grads = trained(compiled, lambda model: torch.cat([wan_call(model)]))
    assert relative_error(out, eager[0]) < 1e-6
    assert apart({name.removeprefix("_orig_mod."): x for name, x in grads.items()}, eager[1]) < 1e-6


def test_lora_of_peft_trains_alone():
    peft = pytest.importorskip("peft")
    model = wan().train()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights="gaussian"))
    fastdit.accelerate(model, SPARSE, train=True)
    grads = trained(model, wan_call)[1]
    assert grads
    assert all("lora" in name for name in grads)
    assert trained(model, wan_call, recompute=True)[1].keys() == grads.keys()


def test_a_described_model_trains():
    model = Mine().eval()
    call = lambda model: model(*given())  # noqa: E731
    fastdit.install(model, layout, "exact")
    exact = trained(model, call)
    fastdit.install(model, layout, SPARSE, train=True)
    sparse = trained(model, call)
    assert 1e-4 < apart(sparse[1], exact[1]) < 2
    with pytest.raises(ValueError, match="top_mass"):
        fastdit.install(model, layout, of(TopMass(density=0.3)), train=True)


def test_a_pipeline_draws_while_its_model_is_accelerated_for_training():
    """Samples between steps: what was trained is what is drawn, without statistics."""
    pipe = tiny_wan_pipeline()
    pipe.set_progress_bar_config(disable=True)
    given = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 2, "output_type": "latent"}
    images = []
    for train in (True, False):
        fastdit.accelerate(pipe, of(), train=train)
        images.append(pipe("a red circle", **given, generator=torch.Generator().manual_seed(0)).frames)
        assert any(site.ran == "sparse" for site in fastdit.report(pipe).sites)
    torch.testing.assert_close(torch.as_tensor(images[0]), torch.as_tensor(images[1]))
