"""The error measured while it runs: the probe, the rungs, and layers that break being caught in the step in which they do."""

import json
import math

import numpy as np
import pytest
import torch
from util import Largest, enter, tiny_wan_pipeline

import fastdit
from fastdit import Config, Phase, Window, ops
from fastdit.approx import error_guard, remainder
from fastdit.config import Reuse
from fastdit.core.quant import Quant
from fastdit.core.reference import attention, relative_error
from fastdit.policies import Antidiagonal, Dense, HeadProfile, PowerOfTwo, Radial, Stripe, Union
from fastdit.reporting.heatmap import VIRIDIS, colour, draw

SPARSE = Config((Phase(policy=Window(size=(1, 1, 1))),), (1, 2, 2), min_tokens=0, max_density=1)


def render(pipe, steps=4, seed=0):
    return pipe(
        "a b c", num_frames=9, height=64, width=64, num_inference_steps=steps, output_type="latent",
        generator=torch.Generator().manual_seed(seed),
    ).frames  # fmt: skip


def test_probe_is_the_error_when_all_rows_are_drawn():
    generator = torch.Generator().manual_seed(0)
    q, k, v, noise = (torch.randn(2, 3, 40, 16, generator=generator) for _ in range(4))
    exact = attention(q, k, v)[0]
    assert error_guard.probe(q, k, v, exact, None) < 1e-6
    out = exact + 0.1 * noise
    assert error_guard.probe(q, k, v, out, None, rows=40) == pytest.approx(relative_error(out, exact), rel=1e-4)
    assert error_guard.probe(q, k, v, out, None) == pytest.approx(relative_error(out, exact), rel=0.3)
    grouped = error_guard.probe(q, k[:, :1], v[:, :1], attention(q, k[:, :1], v[:, :1])[0], None)
    assert grouped < 1e-6


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Window(density=0.2), Window(density=0.4)),
        (Window(density=0.6), Window(density=1.0)),
        (Window(size=(1, 3, 3)), Window(size=(3, 5, 5))),
        (Radial(decay=1.0), Radial(decay=2.0)),
        (Antidiagonal(tau=0.8), Antidiagonal(tau=0.9)),
        (Stripe(theta=2.0), Stripe(theta=2.0 + math.log(16))),
        (Union((Window(density=0.1), Radial(density=0.1))), Union((Window(density=0.2), Radial(density=0.2)))),
        (HeadProfile((Window(density=0.1),), (0, 0)), HeadProfile((Window(density=0.2),), (0, 0))),
        (PowerOfTwo(), Dense()),
    ],
    ids=str,
)
def test_denser(policy, expected):
    assert error_guard.denser(policy) == expected


def test_rungs():
    config = Config((Phase((1, 0.5), Window(density=0.1), Quant("int8")), Phase((0.5, 0), Window(density=0.2))))
    assert error_guard.config_at_level(config, 0) is config
    first, second, top = (error_guard.config_at_level(config, rung).phases for rung in (1, 2, 3))
    assert [p.policy for p in first] == [p.policy for p in second] == [Window(density=0.2), Window(density=0.4)]
    assert first[0].quant == Quant("int8")
    assert second[0].quant.is_none
    assert all(isinstance(p.policy, Dense) and p.quant.is_none for p in top)
    assert [p.sigma for p in top] == [p.sigma for p in config.phases]


def test_an_impossible_budget_ends_dense_everywhere():
    pipe, stock = tiny_wan_pipeline(), tiny_wan_pipeline()
    fastdit.accelerate(pipe, Config(SPARSE.phases, SPARSE.tile, min_tokens=0, max_density=1, error_budget=1e-9))
    assert torch.equal(render(pipe), render(stock))
    report = fastdit.report(pipe)
    assert all(site.rung == "dense" and "over the budget of 1e-09" in site.reason for site in report.sites)
    assert "now dense" in str(report)


def test_a_generous_budget_changes_nothing_and_is_reported():
    pipe, free = tiny_wan_pipeline(), tiny_wan_pipeline()
    fastdit.accelerate(pipe, Config(SPARSE.phases, SPARSE.tile, min_tokens=0, max_density=1, error_budget=10.0))
    fastdit.accelerate(free, SPARSE)
    assert torch.equal(render(pipe), render(free))
    report = fastdit.report(pipe)
    assert all(site.rung == "as configured" and site.error > 0 for site in report.sites)
    assert report.phases[0].error > 0
    assert fastdit.report(free).phases[0].error is None
    assert report.phases[0].seconds > 0
    found = json.loads(json.dumps(report.to_dict(calls=True)))
    assert len(found["calls"]) == 4 * 2 * 2  # steps, branches, layers
    assert Config.from_dict(found["config"]) == report.config


def test_report_by_layer():
    """A row for each site with all that is known of it, and the columns of the phases' table."""
    pipe = tiny_wan_pipeline()
    phase = Phase(policy=Window(size=(1, 1, 1)), quant=Quant("int8"), layers=(1, 2), reuse=Reuse("residual", 2))
    fastdit.accelerate(pipe, Config((phase,), (1, 2, 2), min_tokens=0, error_budget=50.0))
    render(pipe)
    report = fastdit.report(pipe)
    head, first, second = report.layers().splitlines()
    assert head.split() == ["site", "ran", "quant", "density", "error", "seconds", "reused", "MB", "held", "guard", "reason"]
    assert first.split()[:4] == ["blocks.0.attn1", "dense", "none", "1.000"]
    assert first.endswith("no phase for noise level 1.000 and layer 0 of 2")
    name, ran, quant, density, error, _, reused, held, *guarded = second.split()
    assert (name, ran, quant, reused, guarded) == ("blocks.1.attn1", "sparse", "int8/none", "4", ["as", "configured"])
    site = report.sites[1]
    assert (float(density), float(error)) == (round(site.density, 3), float(f"{site.error:.2e}"))
    assert held == f"{site.memory / 2**20:.1f}"
    assert site.memory == 2 * 48 * 128 * 2  # branches, tokens, channels, bytes
    table = str(report).splitlines()
    columns = ["policy", "quant", "remainder", "reuse", "density", "error", "seconds", "calls", "reused"]
    assert table[0].startswith("1.3 × fewer pairs, 50% of calls in int8/none; 1 of 2 layers dense because no phase")
    assert table[1].split() == ["noise", "level", *columns]
    assert table[2].split()[-2:] == ["8", "4"]
    assert {"reused", "quant", "memory", "error", "seconds", "density", "reason"} <= set(report.to_dict()["sites"][1])


def test_a_layer_that_breaks_under_the_window_is_caught(monkeypatch):
    """From the third step on, sparse attention of the second layer is nonsense: that layer alone goes up, in that step."""
    pipe, stock = tiny_wan_pipeline(), tiny_wan_pipeline()
    original = remainder.attention

    def breaks(q, *args, **kwargs):
        out, lse = original(q, *args, **kwargs)
        layer = len(handle.sites[0].calls) - len(handle.sites[1].calls)
        return (out * 40 if layer == 1 and handle.clock.step >= 2 else out), lse

    kept_all = Config((Phase(policy=Window(density=1.0)),), (1, 2, 2), min_tokens=0, max_density=1, error_budget=0.05)
    handle = fastdit.accelerate(pipe, kept_all)
    monkeypatch.setattr("fastdit.approx.step_cache.attention.__defaults__", (breaks, None))
    found = render(pipe)
    first, second = fastdit.report(pipe).sites
    assert first.rung == "as configured"
    assert second.rung == "dense"
    assert next(ran.step for ran in handle.sites[1].calls if ran.rung > 0) == 2
    assert relative_error(found, render(stock)) < 1e-4
    render(pipe)
    assert fastdit.report(pipe).sites[0].rung == "as configured"


@pytest.mark.parametrize("group", [1, 2])
def test_probe_takes_some_heads_at_a_time(monkeypatch, group):
    """The same number, and nothing in float32 as large as all keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 300, 16, generator=generator).bfloat16() for n in (4 * group, 4, 4))
    out = ops.attention(q, k, v)[0] * 1.01
    whole = error_guard.probe(q, k, v, out, None)
    monkeypatch.setattr(error_guard, "WIDE_BYTES", 4 * 2 * group * k[:, 0].numel())
    with Largest() as largest:
        assert error_guard.probe(q, k, v, out, None) == whole > 0.005
    assert largest.seen == 2 * group * k[:, 0].numel() < k.numel() * group


def test_a_default_device_does_not_reach_what_is_drawn_on_the_cpu():
    """Under torch.set_default_device("cuda") a draw that names no device cannot use the CPU's generator."""
    q = torch.zeros(1, 1, 77, 8)
    with torch.device("meta"):
        assert error_guard._rows(77, 5, torch.device("cpu")).device.type == "cpu"
        assert error_guard.probe(q, q, q, q, None) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_layer_that_gives_nan_is_answered_dense(monkeypatch, bad):
    """Without any budget: what is not finite never leaves the site, and the report names it."""
    pipe, stock = tiny_wan_pipeline(), tiny_wan_pipeline()
    original = remainder.attention
    calls = []

    def breaks(q, k, v, *args, **kwargs):
        calls.append(1)
        return original(q, k, v.index_fill(2, torch.tensor([5]), bad) if len(calls) == 7 else v, *args, **kwargs)

    handle = fastdit.accelerate(pipe, Config((Phase(policy=Window(density=1.0)),), (1, 2, 2), min_tokens=0, max_density=1))
    monkeypatch.setattr("fastdit.approx.step_cache.attention.__defaults__", (breaks, None))
    found = render(pipe)
    assert found.isfinite().all()
    assert relative_error(found, render(stock)) < 1e-4
    site = fastdit.report(pipe).sites[0]
    assert "not finite" in site.reason
    assert site.rung == "dense"
    assert handle.sites[1].state.level == 0


def test_nan_of_the_models_own_is_left_to_it():
    pipe = tiny_wan_pipeline()
    fastdit.accelerate(pipe, SPARSE)
    with torch.no_grad():
        pipe.transformer.blocks[0].attn1.to_q.weight[0, 0] = math.nan
    assert not render(pipe, steps=1).isfinite().all()
    assert fastdit.report(pipe).sites[0].rung == "as configured"


def test_strict_raises_where_it_would_fall_back():
    pipe = tiny_wan_pipeline()
    model = pipe.transformer
    strict = Config(SPARSE.phases, SPARSE.tile, min_tokens=0, max_density=1, strict=True)
    handle = fastdit.accelerate(model, strict)
    attn, hidden = model.blocks[0].attn1, torch.randn(1, 48, 128)
    forward = enter(handle.denoisers[0], (3, 4, 4))
    with torch.no_grad():
        attn.processor(attn, hidden)
        with pytest.raises(RuntimeError, match="blocks.0.attn1: the mask hides more than whole keys"):
            attn.processor(attn, hidden, attention_mask=torch.rand(1, 1, 48, 48) < 0.5)
        assert forward.seen[0] == 2
        forward = enter(handle.denoisers[0], (3, 4, 5))
        with pytest.raises(RuntimeError, match="48 tokens where the denoiser's input makes 60"):
            attn.processor(attn, hidden)


def test_heat_map_shows_the_numbers():
    """Colours of the cells are those of the values, and the legend names the ends."""
    points = [(0, 0, 0.0), (1, 0, 1.0), (1, 1, 0.5), (1, 1, 0.5), (2, 1, None)]
    image = np.asarray(draw(points, "density", 2))
    assert tuple(image[58, 58]) == VIRIDIS[0]
    assert tuple(image[58, 58 + 14]) == VIRIDIS[-1]
    assert tuple(image[58 + 14, 58 + 14]) == colour(0.5) == VIRIDIS[4]
    assert tuple(image[58 + 14, 58 + 28]) == (225, 225, 225)
    luminance = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in VIRIDIS]
    assert luminance == sorted(luminance)  # readable without colour, too


def test_heat_map_of_errors_is_scaled_to_the_largest():
    image = np.asarray(draw([(0, 0, 0.02), (1, 0, 0.04)], "error", 1))
    assert tuple(image[58, 58]) == VIRIDIS[4]
    assert tuple(image[58, 58 + 14]) == VIRIDIS[-1]


def test_heat_map_of_a_run():
    pipe = tiny_wan_pipeline()
    fastdit.accelerate(pipe, Config(SPARSE.phases, SPARSE.tile, min_tokens=0, max_density=1, error_budget=5.0))
    render(pipe, steps=3)
    for what in ("density", "error", "seconds"):
        image = fastdit.report(pipe).heatmap(what)
        assert image.width > 3 * 14
        assert len(image.getcolors(maxcolors=1 << 16)) > 8
