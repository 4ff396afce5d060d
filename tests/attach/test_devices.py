"""Tensors on a GPU that is not the current one: kernels run where they lie, and give what they give on the current one."""

import contextlib

import pytest
import torch
from families import CASES
from torch.utils._pytree import tree_map_only

import fastdit
from fastdit import Config, Phase, Quant, Reuse, Window, ops
from fastdit.approx.remainder import REMAINDERS, attention
from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.planning.forward_plan import complete
from fastdit.policies import Antidiagonal, TopMass, scores
from fastdit.runs.clock import Stopwatch

SMALL = Layout((2, 9, 10), (1, 4, 5), text_len=7)
LARGE = Layout((8, 32, 32), (1, 8, 16))
"""Enough tiles of 128 tokens to fill a GPU without splitting lists: Hopper's own kernel, where there is one."""
QUANTS = [
    Quant(), Quant("fp8", "fp8"), Quant("fp8", "fp8", smooth_k=True, granularity="head"), Quant("int8", "int8", smooth_k=True),
    Quant("int4", "fp8", smooth_q=True, smooth_k=True, smooth_v=True), Quant("int4"),
]  # fmt: skip


def inputs(layout, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 8, layout.length, 64, generator=generator).to(dtype) for _ in range(3)]


def same_on_both(compute):
    """compute(device) on each GPU while the first is the current one."""
    with torch.cuda.device(0):
        first, second = (compute(f"cuda:{number}") for number in (0, 1))
        assert torch.cuda.current_device() == 0
    for x, y in zip(first, second, strict=True):
        assert y.device == torch.device("cuda:1")
        assert torch.equal(x.cpu(), y.cpu())


@pytest.mark.gpu(2)
@pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("quant", QUANTS, ids=str)
def test_every_format(quant, layout):
    def answers(device):
        q, k, v = (x.to(device) for x in inputs(layout))
        if refusal := ops.unsupported(q, quant):
            pytest.skip(refusal)
        mask = BlockMask.from_tile_map(complete(Window(size=(1, 3, 3)).select(layout).to(device), layout), layout)
        found = [x for remainder in REMAINDERS for x in attention(q, k, v, mask, quant, remainder=remainder)]
        return [*found, *ops.attention(q, k, v, quant=quant)]

    same_on_both(answers)


@pytest.mark.gpu(2)
def test_float32_and_biases():
    def answers(device):
        q, k, v = (x.to(device) for x in inputs(SMALL, torch.float32))
        bias = torch.arange(SMALL.length, dtype=torch.float32, device=device).view(1, 1, -1, 1) / 100
        return [*ops.attention(q, k, v, bias_k=bias), *ops.attention(q, k, v, bias_q=bias, bias_k=bias)]

    same_on_both(answers)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("layout", [SMALL, LARGE], ids=["small", "large"])
def test_tile_scores(layout):
    def answers(device):
        q, k, _ = (layout.to_tiles(x.to(device))[:, :, : layout.video_tiles] for x in inputs(layout))
        found = [scores.pooled(q, k, layout), scores.antidiagonal(q, k, layout, 5)]
        return [*found, *(policy.select(layout, q, k) for policy in (TopMass(density=0.5), Antidiagonal(density=0.5)))]

    same_on_both(answers)


@pytest.mark.gpu(2)
def test_stopwatch():
    """Its events are of the device that works: they say how long that took."""
    x = torch.randn(4096, 4096, device="cuda:1")
    with torch.cuda.device(0):
        watch = Stopwatch(x)
        for _ in range(50):
            x = x @ x
        start, end = watch.stop()
    torch.cuda.synchronize(1)
    assert start.device == end.device == torch.device("cuda:1")
    assert start.elapsed_time(end) > 1


WINDOW = Window(size=(1, 1, 1))
CONFIGS = {
    "window": Phase(policy=WINDOW),
    "fp8": Phase(policy=WINDOW, quant=Quant("fp8", "fp8")),
    "pooled": Phase(policy=WINDOW, remainder="pooled"),
    "scores": Phase(policy=TopMass(density=0.5)),
    "statistics": Phase(policy=WINDOW, reuse=Reuse("retention", refresh=2, store="fp8")),
    "host": Phase(policy=WINDOW, reuse=Reuse("residual", refresh=2, host=True)),
}


@pytest.mark.gpu(2)
@pytest.mark.parametrize("placed", ["cuda:1", "both"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_denoiser(name, placed):
    case = next(case for case in CASES if case.cls == "WanTransformer3DModel")
    config = Config((CONFIGS[name],), (1, 4, 4), min_tokens=0, max_density=1, error_budget=50.0)

    def answers(where):
        model = case.model().to("cuda:0" if where == "both" else where)
        if where == "both":
            on_another(model.blocks[1], "cuda:1", "cuda:0")
        fastdit.accelerate(model, config)
        call = {key: x.to("cuda:0" if where == "both" else where) for key, x in case.call().items()}
        found = [model(**call | {"timestep": torch.full_like(call["timestep"], 1000 * level)})[0] for level in (0.9, 0.8, 0.7)]
        assert fastdit.report(model).density < 1
        return [x.cpu() for x in found]

    with torch.cuda.device(0):
        expected = answers("cuda:0")
        assert all(map(torch.equal, answers(placed), expected))


def on_another(module, device, back):
    """A module on a GPU of its own, as `device_map` places it."""

    def to(tree, device):
        return tree_map_only(torch.Tensor, lambda x: x.to(device), tree)

    module.to(device)
    module.register_forward_pre_hook(lambda _, args, kwargs: (to(args, device), to(kwargs, device)), with_kwargs=True)
    module.register_forward_hook(lambda _, args, out: to(out, back))


def test_kernels_run_on_the_device_of_their_tensors(monkeypatch):
    """What a machine with two GPUs shows above: whatever the op computes, it computes within the guard."""
    inside = []

    @contextlib.contextmanager
    def guard(x):
        inside.append(x.shape)
        yield
        inside.pop()

    class Kernels:
        @staticmethod
        def dense_attention(q, *_):
            assert inside == [q.shape]
            return torch.zeros_like(q), torch.zeros(q.shape[:3])

        @staticmethod
        def block_sparse_attention(q, *_):
            return Kernels.dense_attention(q)

    monkeypatch.setattr(ops, "on_device", guard)
    monkeypatch.setattr(ops, "_kernels", lambda q: Kernels)
    q, k, v = inputs(SMALL)
    ops.attention(q, k, v)
    ops.attention(q, k, v, BlockMask.from_tile_map(complete(Window(size=(1, 1, 1)).select(SMALL), SMALL), SMALL))
    assert inside == []
