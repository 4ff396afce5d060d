"""CUDA graphs, several GPUs, and a GPU that is not the current one."""

import subprocess
import sys

import pytest
import torch
from models import wan, wan_inputs
from util import environment

import fastdit
from fastdit import Config, Phase, Quant, Window
from fastdit.attach.cuda_graphs import STAYS_OUT
from fastdit.config import Reuse
from fastdit.core.reference import relative_error
from fastdit.policies import TopMass

WINDOW = Window(size=(1, 1, 3))
CONFIGS = {
    "exact": Config(),
    "window": Config((Phase(policy=WINDOW),), (1, 4, 4), min_tokens=0, max_density=1),
    "fp8": Config((Phase(policy=WINDOW, quant=Quant("fp8", "fp8")),), (1, 4, 4), min_tokens=0, max_density=1),
    "int8": Config((Phase(policy=WINDOW, quant=Quant("int8")),), (1, 4, 4), min_tokens=0, max_density=1),
    "pooled": Config((Phase(policy=WINDOW, remainder="pooled"),), (1, 4, 4), min_tokens=0, max_density=1),
    "sampled": Config((Phase(policy=WINDOW, remainder="sampled"),), (1, 4, 4), min_tokens=0, max_density=1),
    "top mass": Config((Phase(policy=TopMass(density=0.3)),), (1, 4, 4), min_tokens=0, max_density=1),
    "residual": Config((Phase(policy=WINDOW, reuse=Reuse("residual", 2)),), (1, 4, 4), min_tokens=0, max_density=1),
    "host": Config((Phase(policy=WINDOW, reuse=Reuse("residual", 2, host=True)),), (1, 4, 4), min_tokens=0, max_density=1),
    "budget": Config((Phase(policy=WINDOW),), (1, 4, 4), min_tokens=0, max_density=1, error_budget=5.0),
}
STEPS = Config(
    (Phase((1.0, 0.85)), Phase((0.85, 0.65), WINDOW, reuse=Reuse("residual", 2)), Phase((0.65, 0.0), TopMass(density=0.3))),
    (1, 4, 4), min_tokens=0, max_density=1,
)  # fmt: skip
LEVELS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def model_on(device):
    return wan().to(device, torch.bfloat16)


@torch.no_grad()
def run(model, device, sigma=0.5):
    call = {
        name: x.to(device, torch.bfloat16 if name != "timestep" else None) if isinstance(x, torch.Tensor) else x
        for name, x in wan_inputs(sigma=sigma).items()
    }
    return model(**call)[0].float().cpu()


@pytest.mark.gpu(2)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_gpu_that_is_not_the_current_one(name):
    """Two steps, so that statistics are read as well."""
    found = {}
    with torch.cuda.device(0):
        for device in ("cuda:0", "cuda:1"):
            model = model_on(device)
            fastdit.accelerate(model, CONFIGS[name])
            found[device] = torch.cat([run(model, device, sigma) for sigma in (0.6, 0.5)])
            assert {site.ran for site in fastdit.report(model).sites} == {"dense" if name == "exact" else "sparse"}
        assert torch.cuda.current_device() == 0
    assert torch.equal(found["cuda:1"], found["cuda:0"])


@pytest.mark.gpu(2)
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_on_two_gpus(name):
    from accelerate import dispatch_model

    whole = model_on("cuda:0")
    fastdit.accelerate(whole, CONFIGS[name])
    expected = torch.cat([run(whole, "cuda:0", sigma) for sigma in (0.6, 0.5)])
    split = model_on("cpu")
    places = dict.fromkeys((part for part, _ in split.named_children() if part != "blocks"), 0)
    places |= {"blocks.0": 0, "blocks.1": 1, "norm_out": 1, "proj_out": 1, "scale_shift_table": 0}
    split = dispatch_model(split, places)
    fastdit.accelerate(split, CONFIGS[name])
    found = torch.cat([run(split, "cuda:0", sigma) for sigma in (0.6, 0.5)])
    assert relative_error(found, expected) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_every_phase_under_cuda_graphs(mode):
    """What is captured between the sites is replayed; the sites themselves decide anew at every step."""
    torch._dynamo.reset()
    eager, model = model_on("cuda"), model_on("cuda")
    fastdit.accelerate(eager, STEPS)
    fastdit.accelerate(model, STEPS)
    compiled = torch.compile(model, mode=mode)
    for _ in range(2):
        for sigma in LEVELS:
            torch.compiler.cudagraph_mark_step_begin()
            assert relative_error(run(compiled, "cuda", sigma), run(eager, "cuda", sigma)) < 0.02
    found = [[ran.how for ran in site.calls] for site in fastdit.attach.processor.installed(model).sites]
    assert found == [["dense", "dense", "refresh", "reuse", "sparse", "sparse", "sparse"]] * 2


@pytest.mark.gpu
def test_cuda_graphs_are_in_use():
    """Or the test above would prove nothing: fewer launches by the host than without."""
    from torch._inductor.cudagraph_trees import get_container

    torch._dynamo.reset()
    model = model_on("cuda")
    fastdit.accelerate(model, STEPS)
    compiled = torch.compile(model, mode="reduce-overhead")
    for sigma in LEVELS:
        torch.compiler.cudagraph_mark_step_begin()
        run(compiled, "cuda", sigma)
    assert get_container(torch.cuda.current_device()).tree_manager is not None


def test_without_a_way_out_graphs_are_refused_before_the_run():
    """In a process of its own: the tag is read when the op is made."""
    code = """
import sys
sys.path.insert(0, "tests")
import torch, fastdit
from fastdit.attach import cuda_graphs
from models import wan, wan_inputs
cuda_graphs.STAYS_OUT.clear()
model = wan()
fastdit.accelerate(model, "balanced")
import torch._inductor.config
torch._inductor.config.triton.cudagraphs = True
torch.compile(model)(**wan_inputs())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, env=environment())
    assert done.returncode != 0
    assert "a CUDA graph would replay as it was captured" in done.stderr


def test_this_pytorch_can_leave_an_op_out():
    assert bool(STAYS_OUT) == hasattr(torch.Tag, "cudagraph_unsafe")
