"""Answers whose flags are read later, as on a GPU: repaired at once; at the next forward their sites go up, and the report says
why. On the CPU, which could look at once, by telling it not to."""

import math

import pytest
import torch
from util import tiny_wan_pipeline

import fastdit
from fastdit import Config, Phase, Window
from fastdit.approx import remainder
from fastdit.approx.error_guard import DENSE
from fastdit.attach import site_call
from fastdit.core.reference import relative_error
from fastdit.policies import TopMass
from fastdit.runs.site_state import CallRecord, SiteState
from fastdit.runs.verdict import BROKEN, Verdict, settle

ALL = Phase(policy=Window(density=1.0))


def flag(bits=0):
    return torch.full((1,), bits, dtype=torch.int32)


def state(**record):
    return SiteState([CallRecord(**{"phase": 0, "density": 0.25, "how": "sparse", "sigma": 0.5} | record)])


@pytest.mark.parametrize(
    ("bits", "error", "level", "reason"),
    [
        (0, None, 0, None),
        (0, 0.01, 0, None),
        (1, 0.2, 1, "guard: error 0.2 over the budget of 0.1 at noise level 0.500"),
        (1, math.nan, DENSE, "guard: not finite at noise level 0.500"),
        (1, None, DENSE, "guard: not finite at noise level 0.500"),
        (1 | BROKEN, math.nan, 0, None),
    ],
)
def test_what_a_flag_means(bits, error, level, reason):
    site = state()
    settle([Verdict(site, 0, flag(bits), None if error is None else torch.tensor(error), budget=0.1)])
    record = site.calls[0]
    assert (site.level, record.rung, record.reason) == (level, level, reason)
    assert (record.how, record.density) == (("dense", 1.0) if reason else ("sparse", 0.25))
    assert record.error == (None if error is None or math.isnan(error) else pytest.approx(error))


def test_each_verdict_gets_its_own_values():
    sites = [state() for _ in range(4)]
    settle(
        [
            Verdict(sites[0], 0, flag(), density=torch.tensor(0.5, dtype=torch.float64)),
            Verdict(sites[1], 0, flag(), torch.tensor(0.03)),
            Verdict(sites[2], 0, flag(), torch.tensor(0.04), torch.tensor(0.9), max_density=0.75),
            Verdict(sites[3], 0, flag(1)),
        ]
    )
    assert [site.calls[0].density for site in sites] == [0.5, 0.25, pytest.approx(0.9), 1.0]
    assert [site.calls[0].error for site in sites[:3]] == [None, pytest.approx(0.03), pytest.approx(0.04)]
    assert [site.too_dense for site in sites[:3]] == [{}, {}, {0: "density 0.90 is above 0.75: dense is faster"}]
    assert [site.level for site in sites] == [0, 0, 0, DENSE]


@pytest.fixture
def unread(monkeypatch):
    """No flag is read before the next forward."""
    monkeypatch.setattr(site_call, "reads_at_once", lambda device: False)


def render(pipe, steps=4):
    call = {"num_frames": 9, "height": 64, "width": 64, "num_inference_steps": steps, "output_type": "latent"}
    return pipe("a b c", generator=torch.Generator().manual_seed(0), guidance_scale=1.0, **call).frames


def planted(monkeypatch, plant, nth):
    """remainder.attention with values that `plant` makes worse in its nth call."""
    original, calls = remainder.attention, []

    def attention(q, k, v, *args, **kwargs):
        calls.append(1)
        return original(q, k, plant(v) if len(calls) == nth else v, *args, **kwargs)

    monkeypatch.setattr("fastdit.approx.step_cache.attention.__defaults__", (attention, None))


def test_what_is_not_finite_is_repaired_before_anybody_reads_it(monkeypatch, unread):
    pipe, stock = tiny_wan_pipeline(), tiny_wan_pipeline()
    handle = fastdit.accelerate(pipe, Config((ALL,), (1, 2, 2), min_tokens=0, max_density=1))
    planted(monkeypatch, lambda v: v.index_fill(2, torch.tensor([5]), math.inf), nth=4)  # the second layer's, second step
    found = render(pipe)
    assert relative_error(found, render(stock)) < 1e-4
    hows = [[(call.how, call.rung) for call in site.calls] for site in handle.sites]
    assert hows == [[("sparse", 0)] * 4, [("sparse", 0), ("dense", DENSE), ("dense", DENSE), ("dense", DENSE)]]
    assert "not finite" in fastdit.report(pipe).sites[1].reason


def test_an_error_over_the_budget_is_repaired_and_the_next_step_denser(monkeypatch, unread):
    pipe, stock = tiny_wan_pipeline(), tiny_wan_pipeline()
    handle = fastdit.accelerate(pipe, Config((ALL,), (1, 2, 2), min_tokens=0, max_density=1, error_budget=0.05))
    planted(monkeypatch, lambda v: v * 40, nth=4)
    assert relative_error(render(pipe), render(stock)) < 1e-4
    assert [(call.how, call.rung) for call in handle.sites[1].calls] == [
        ("sparse", 0),
        ("dense", 1),
        ("sparse", 1),
        ("sparse", 1),
    ]
    assert handle.sites[1].calls[1].error > 0.05


def test_the_last_forward_is_read_by_the_report(monkeypatch, unread):
    pipe = tiny_wan_pipeline()
    fastdit.accelerate(pipe, Config((ALL,), (1, 2, 2), min_tokens=0, max_density=1))
    planted(monkeypatch, lambda v: v.index_fill(2, torch.tensor([5]), math.nan), nth=8)
    render(pipe)
    assert "not finite" in fastdit.report(pipe).sites[1].reason


def test_broken_inputs_are_the_models_own_affair(unread):
    pipe = tiny_wan_pipeline()
    fastdit.accelerate(pipe, Config((ALL,), (1, 2, 2), min_tokens=0, max_density=1))
    with torch.no_grad():
        pipe.transformer.blocks[0].attn1.to_q.weight[0, 0] = math.nan
    assert not render(pipe, steps=2).isfinite().all()
    assert {site.rung for site in fastdit.report(pipe).sites} == {"as configured"}


def test_a_density_that_is_read_later(monkeypatch, unread):
    """A dynamic policy keeps too many tiles: that call runs, and from the next step on the phase is dense."""
    monkeypatch.setattr("fastdit.planning.forward_plan.on_host", lambda share: share)
    pipe = tiny_wan_pipeline()
    handle = fastdit.accelerate(pipe, Config((Phase(policy=TopMass(density=0.9)),), (1, 2, 2), min_tokens=0, max_density=0.5))
    render(pipe)
    first, *rest = handle.sites[0].calls
    assert first.how == "sparse"
    assert first.density > 0.5
    assert {(call.how, call.density) for call in rest} == {("dense", 1.0)}
    assert all("is above 0.5: dense is faster" in call.reason for call in rest)
