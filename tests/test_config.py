import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdit import PRESETS, Config, Dense, Phase, Quant, Window, preset
from fastdit.policies import HeadProfile, PowerOfTwo, Stripe, Union

TWO = Config(
    phases=(
        Phase((1.0, 0.9)),
        Phase((0.9, 0.0), Window(size=(1, 3, 3)), Quant(qk="int8", smooth_k=True), layers=(1, -1)),
    ),
    tile=(2, 4, 4),
)


@pytest.mark.parametrize("config", [Config(), TWO, *PRESETS.values()])
def test_round_trip_through_json_and_hash(config):
    again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


@given(st.floats(0, 1), st.integers(0, 4))
def test_the_first_phase_that_holds_wins(sigma, layer):
    expected = 0 if sigma > 0.9 else 1 if 1 <= layer < 4 else None
    assert TWO.at(sigma, layer, 5) == expected


@pytest.mark.parametrize("sigma", [1.0, 0.0, 1.001])
def test_the_ends_of_the_noise_level_belong_to_a_phase(sigma):
    assert Config(phases=(Phase(),)).at(sigma) == 0


@pytest.mark.parametrize(
    ("sigmas", "gaps"),
    [
        ([], ()),
        ([(1.0, 0.0)], ()),
        ([(1.0, 0.5), (0.5, 0.0)], ()),
        ([(0.5, 0.0), (1.0, 0.5)], ()),
        ([(1.0, 0.2), (0.9, 0.8)], ((0.2, 0.0),)),
        ([(0.9, 0.5)], ((1.0, 0.9), (0.5, 0.0))),
        ([(1, 0.9), (0.8, 0.5), (0.6, 0.3), (0.1, 0)], ((0.9, 0.8), (0.3, 0.1))),
    ],
)
def test_gaps_between_phases(sigmas, gaps):
    """An explicit dense phase is none, and no phases at all are a dense configuration."""
    for layers in (None, (0, 2)):
        config = Config(tuple(Phase(sigma, layers=layers) for sigma in sigmas))
        assert config.gaps() == gaps
    for high, low in gaps:
        assert config.at((high + low) / 2) is None


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_has_a_gap(name):
    assert preset(name).gaps() == ()


def test_an_error_budget_alone_takes_the_default_preset():
    default = preset("balanced")
    config = Config(error_budget=0.1)
    assert config == replace(default, error_budget=0.1)
    assert Config.from_dict(config.to_dict()) == config
    assert Config(error_budget=0.1, tile=(2, 4, 4)).tile == (2, 4, 4)
    assert Config(TWO.phases, error_budget=0.1).phases == TWO.phases
    assert Config(strict=True).phases == ()  # dense, as ever


@pytest.mark.parametrize("name", ["balanced", "fast"])
def test_presets_cover_every_noise_level(name):
    config = preset(name)
    assert all(config.at(i / 1000) is not None for i in range(1001))
    assert isinstance(config.phases[0].policy, Dense)


def test_unknown_preset_lists_the_names():
    with pytest.raises(ValueError, match="'quick': choose one of exact, balanced, fast"):
        preset("quick")


@pytest.mark.parametrize(
    "make",
    [
        lambda: Phase(sigma=(0.0, 1.0)),
        lambda: Phase(sigma=(1.2, 0.0)),
        lambda: Phase(layers=(0.5, 1)),
        lambda: Phase(sigma=0.5),
        lambda: Phase(sigma=("1", "0")),
        lambda: Phase.from_dict({"sigma": ["high", "low"]}),
        lambda: Phase.from_dict({"sigma": 1}),
        lambda: Phase.from_dict({"layers": 3}),
        lambda: Phase(layers=(0, "x")),
        lambda: Phase(layers=(0, 1, 2)),
        lambda: Phase(policy="window"),
        lambda: Phase(quant="fp8"),
        lambda: Phase(reuse="residual"),
        lambda: Config("fast"),
        lambda: Config(error_budget="a"),
        lambda: Config(tile=(1, 2)),
        lambda: Config(tile_tokens=0),
        lambda: Config(max_density=0),
        lambda: Config.from_dict({"tiles": [1, 1, 1]}),
        lambda: Config.from_dict({"phases": [{"sgma": [1, 0]}]}),
    ],
)
def test_bad_settings_are_refused(make):
    with pytest.raises(ValueError, match="phase|config"):
        make()


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        (lambda: Phase([1.0, 0.5], layers=[0, None]), Phase((1.0, 0.5), layers=(0, None))),
        (lambda: Union([Window(density=0.5), Dense()]), Union((Window(density=0.5), Dense()))),
        (lambda: HeadProfile([Dense()], heads=[0, 0], grid=[1, 2, 3]), HeadProfile((Dense(),), heads=(0, 0), grid=(1, 2, 3))),
        (lambda: Stripe(window=[1, 3, 3]), Stripe(window=(1, 3, 3))),
        (lambda: PowerOfTwo(window=[1, 3, 3]), PowerOfTwo(window=(1, 3, 3))),
    ],
)  # fmt: skip
def test_lists_are_as_good_as_tuples(listed, expected):
    """Settings are keys of caches: a list in one would fail in the first denoising step."""
    assert listed() == expected
    assert hash(listed()) == hash(expected)
