"""The first line of a report: what ran, not what was configured."""

from __future__ import annotations

from typing import Any

import pytest
from util import render

import fastdit
from fastdit import Config, Dense, Phase, Quant, Window
from fastdit.reporting.report import short

NARROW = Window(size=(1, 1, 1))  # of 12 tiles: a density of 1/12


def config(*phases: Phase, **more: Any) -> Config:
    return Config(phases or (Phase(policy=NARROW),), (1, 2, 2), min_tokens=0, **more)


FAST = fastdit.PRESETS["fast"].phases
DENSE = "dense because the phase is dense"


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (config(), "12 × fewer pairs"),
        ("balanced", "nothing was accelerated: 48 tokens, this CPU needs 2,048"),
        (Config(FAST, min_tokens=96), "nothing was accelerated: 48 tokens, the configuration needs 96"),
        ("exact", "nothing was accelerated: the configuration is dense"),
        (config(Phase((1.0, 0.85), Dense()), Phase(policy=NARROW)), f"1.8 × fewer pairs; 50% of calls {DENSE}"),
        (config(Phase(policy=NARROW, layers=(0, 1)), Phase(policy=Dense())), f"1.8 × fewer pairs; 1 of 2 layers {DENSE}"),
        (config(Phase(policy=Dense(), quant=Quant("int8", "int8"))), "all pairs, 100% of calls in int8/int8"),
    ],
)
def test_the_first_line_says_what_ran(pipe: Any, given: Any, verdict: str) -> None:
    handle = fastdit.accelerate(pipe, given)
    assert str(handle).splitlines()[0] == "not called yet: nothing ran"
    render(pipe, steps=4)  # noise levels 1, .9, .75, .5
    report = fastdit.report(pipe)
    assert report.verdict == verdict
    assert str(report).splitlines()[0] == report.to_dict()["verdict"] == verdict
    assert str(handle) == str(report)


def test_the_measured_error_is_the_largest(pipe: Any) -> None:
    fastdit.accelerate(pipe, config(error_budget=100.0))
    render(pipe, steps=3)
    report = fastdit.report(pipe)
    largest = max(site.error for site in report.sites if site.error is not None)
    assert report.verdict == f"12 × fewer pairs; largest measured error {short(largest)}"


def test_short_numbers() -> None:
    assert [short(x) for x in (0.0, 0.04, 0.9961, 1.25, 3e-5, 0.123)] == ["0", ".04", "1", "1.2", "3e-05", ".12"]
