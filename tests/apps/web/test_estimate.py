"""What is told of a clip before it is drawn, at what cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdit import PRESETS, Config, Phase, Window
from fastdit.apps.web import estimate
from fastdit.core.layout import Layout
from fastdit.planning.forward_plan import complete
from fastdit.policies import Radial


def test_prediction(pipe: Any) -> None:
    known = estimate.facts(pipe)
    assert known.grid(33, 256, 256) == (9, 16, 16)
    dense = estimate.predict(known, PRESETS["exact"], 33, 256, 256, 20)
    assert (dense.tokens, dense.ratio) == (9 * 16 * 16, 1)
    assert "2,048" in str(estimate.predict(known, PRESETS["fast"], 17, 256, 256, 20).why)  # 1,280 tokens
    balanced, fast = (estimate.predict(known, PRESETS[name], 33, 512, 512, 20) for name in ("balanced", "fast"))
    assert balanced.density is not None
    assert balanced.ratio is not None
    assert fast.density is not None
    assert fast.ratio is not None
    assert 1 > balanced.density > fast.density > 0
    assert 1 < balanced.ratio < fast.ratio < 1 / fast.density
    with pytest.raises(ValueError, match="a clip needs"):
        estimate.predict(known, PRESETS["fast"], 1, 0, 64, 20)


@pytest.mark.parametrize("border", ["clamp", "truncate"])
def test_density_of_a_window_needs_no_map(border: Any) -> None:
    for grid, window in (((9, 16, 16), Window(density=0.2, border=border)), ((7, 13, 19), Window((3, 1, 2), border=border))):
        layout = Layout(grid, (1, 4, 4))
        counted = complete(window.select(layout), layout).double().mean().item()
        assert estimate.density_of(window, layout) == pytest.approx(counted, abs=1e-6)
    with torch.profiler.profile(profile_memory=True) as seen:
        found = estimate.density_of(Window(density=0.2, border=border), Layout((61, 90, 160), (1, 8, 8)))
    assert found == pytest.approx(0.2, abs=0.02)
    assert max(event.self_cpu_memory_usage for event in seen.events()) < 2**20  # the map of 14,640 tiles has 214 MB


def test_maps_that_are_too_large_are_not_made(pipe: Any) -> None:
    radial = Config((Phase(policy=Radial(density=0.2)),), tile=(1, 4, 4))
    told = estimate.predict(estimate.facts(pipe), radial, 33, 1408, 1408, 20)  # 4,356 tiles
    assert told.density is None
    assert "too many tiles" in str(told.why)
