"""Schedules without a model: what each step does, and the noise levels that steps have."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from PIL import Image
from util import DOCS, call

from fastdit import Config, Phase, Window, preset
from fastdit.approx import remainder
from fastdit.apps.cli import show
from fastdit.config import Reuse
from fastdit.core.quant import Quant
from fastdit.core.reference import attention, relative_error
from fastdit.planning.forward_plan import plan_call
from fastdit.policies import Dense
from fastdit.schedule import noise_levels, schedule


@pytest.mark.parametrize(("steps", "shift"), [(4, 1.0), (20, 5.0), (50, 7.0)])
def test_noise_levels_are_the_scheduler_s(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / steps for i in range(steps)])
    assert torch.allclose(torch.tensor(noise_levels(steps, shift)), scheduler.sigmas[:-1], atol=1e-6)


@pytest.mark.parametrize("solver", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_noise_levels_are_nearly_those_of_other_solvers(solver):
    scheduler = solver(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    scheduler.set_timesteps(20)
    assert torch.allclose(torch.tensor(noise_levels(20, 5.0)), scheduler.timesteps / 1000, atol=3e-3)


@pytest.mark.parametrize(("steps", "warm", "last", "sparse"), [(50, 15, 45, 28), (50, 10, 45, 32), (20, 5, 15, 12)])
def test_re_ttentions_own_schedules_can_be_said(steps, warm, last, sparse):
    """arXiv 2505.22918's three: CogVideoX-2B, Hunyuan-DiT, PixArt. Full steps first, then one in five, and no other."""
    sigmas = noise_levels(steps, 1.0)
    edge = (sigmas[warm - 1] + sigmas[warm]) / 2
    config = Config((Phase((1.0, edge)), Phase((edge, 0.0), Window(density=1 / 32), reuse=Reuse("retention", refresh=5))))
    said = [entry.what for entry in schedule(config, sigmas)]
    assert [step for step, what in enumerate(said) if what == "dense"] == list(range(warm))
    assert [step for step, what in enumerate(said) if "statistics" in what] == list(range(warm, last + 1, 5))
    assert sum(what.startswith("window") for what in said) == sparse


def test_fps_is_sparse_then_dense_then_between_and_so_are_its_errors():
    """FPSAttention's regimes (arXiv 2506.04648 §3.3): scales coarse, fine, intermediate; the middle's error smallest."""
    config, grid = preset("fps"), (9, 24, 24)
    q, k, v = (torch.randn(1, 1, 5184, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    dense, density, error = attention(q, k, v)[0], [], []
    for sigma in (1.0, 0.9, 0.3):
        plan = plan_call(config, sigma, grid, q, k, v)
        density.append(plan.density)
        error.append(relative_error(remainder.attention(q, k, v, plan.block_mask, plan.quant)[0], dense))
    assert density[0] < density[2] < density[1]
    assert error[1] < error[2] < error[0]
    assert [phase.quant.granularity for phase in config.phases] == ["tensor", "tile", "head"]
    assert [config.at(sigma) for sigma in (1.0, 0.925, 0.926, 0.6, 0.61, 0.0)] == [0, 1, 0, 2, 1, 2]


def test_statistics_are_taken_every_so_many_steps_and_anew_in_a_new_phase():
    config = Config(
        (
            Phase((1.0, 0.9), Dense()),
            Phase((0.9, 0.5), Window(density=0.25), reuse=Reuse("retention", refresh=3)),
            Phase((0.5, 0.0), Window(density=0.125), Quant("fp8", "fp8"), remainder="pooled"),
        )
    )
    found = schedule(config, [1.0, 0.89, 0.8, 0.7, 0.6, 0.4, 0.2])
    assert [entry.phase for entry in found] == [0, 1, 1, 1, 1, 2, 2]
    taken = [entry.what.startswith("dense, statistics") for entry in found]
    assert taken == [False, True, False, False, True, False, False]
    assert found[0].what == "dense"
    assert "fp8/fp8" in found[-1].what
    assert "pooled" in found[-1].what


def test_layers_that_share_a_phase_are_told_together():
    config = Config((Phase(policy=Window(density=0.5), layers=(2, -1)),))
    found = schedule(config, [1.0], layers=6)
    assert [(entry.layers, entry.phase) for entry in found] == [((0, 2), None), ((2, 5), 0), ((5, 6), None)]


@pytest.mark.parametrize("kind", ["residual", "broadcast", "ratio"])
def test_the_schedule_foresees_what_runs(kind):
    """Against a run of the real denoiser: dense where it says dense, sparse where sparse."""
    from models import wan, wan_inputs

    import fastdit as package

    model = wan()
    config = Config(
        (Phase((1.0, 0.8), Dense()), Phase((0.8, 0.0), Window(density=0.3), reuse=Reuse(kind, refresh=3))),
        (1, 4, 4), min_tokens=0, max_density=1,
    )  # fmt: skip
    sigmas = noise_levels(8, 2.0)
    with torch.no_grad(), package.accelerate(model, config):
        for sigma in sigmas:
            model(**wan_inputs(sigma=sigma))
        ran = [call for index, call in package.report(model).calls if index == 0]
    names = {"refresh": "dense, statistics", "dense": "dense"}
    for each, entry in zip(ran, schedule(config, sigmas), strict=True):
        assert entry.what.startswith(names.get(each.how, "the last" if kind == "broadcast" else "window"))
        assert each.phase == entry.phase


@pytest.mark.parametrize("name", ["balanced", "fast", "fps", "exact"])
def test_the_command_prints_every_step(name, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "show", "schedule", name, "--steps", 8, "--layers", 3, "--out", tmp_path / "s.png") == 0
    assert capsys.readouterr().out.count("noise level") == 8
    assert Image.open(tmp_path / "s.png").width > 8


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["warp"], "unknown preset"),
        (["none.json"], "cannot read"),
        (["fast", "--steps", "0"], "steps >= 1"),
        (["fast", "--shift", "0"], "shift > 0"),
        (["fast", "--layers", "0"], "--layers"),
    ],
)
def test_bad_schedules_are_refused(arguments, named, monkeypatch, capsys):
    assert call(monkeypatch, "show", "schedule", *arguments) == 2
    assert named in capsys.readouterr().err


def test_the_page_holds_what_was_measured():
    assert show.statistics(DOCS / "results" / "reuse.json") in (DOCS / "statistics.md").read_text(encoding="utf-8")
    assert preset("balanced").phases[1].reuse.kind == "residual"
