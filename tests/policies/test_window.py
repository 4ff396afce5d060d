import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdit.core.layout import Layout
from fastdit.policies import POLICIES, Dense, Policy, Window, policy_from_dict

sides = st.integers(1, 6)
boxes = st.tuples(sides, sides, sides)
short = st.integers(1, 4)


def box(layout, size, border):
    """The window written a second time, tile by tile, from the papers' words."""
    tiles = [
        (t, h, w) for t in range(layout.tile_grid[0]) for h in range(layout.tile_grid[1]) for w in range(layout.tile_grid[2])
    ]
    kept = torch.zeros(len(tiles), len(tiles), dtype=torch.bool)
    for row, query in enumerate(tiles):
        for column, key in enumerate(tiles):
            inside = []
            for i, j, w, n in zip(query, key, size, layout.tile_grid, strict=True):
                if border == "truncate":
                    inside.append(abs(i - j) <= w // 2)
                else:
                    start = min(max(i - w // 2, 0), max(n - w, 0))
                    inside.append(start <= j < start + w)
            kept[row, column] = all(inside)
    return kept


@given(st.tuples(short, short, short), boxes, st.sampled_from(["clamp", "truncate"]))
@settings(deadline=None, max_examples=60)
def test_select_is_the_papers_window(tile_grid, size, border):
    layout = Layout(tile_grid, (1, 1, 1))
    selected = Window(size=size, border=border).select(layout)
    assert selected.shape == (1, 1, layout.video_tiles, layout.video_tiles)
    assert torch.equal(selected[0, 0], box(layout, size, border))


@given(boxes, boxes)
@settings(deadline=None)
def test_a_clamped_window_gives_every_query_equally_many_tiles(tile_grid, size):
    counts = Window(size=size).select(Layout(tile_grid, (1, 1, 1))).sum(-1)
    expected = 1
    for n, w in zip(tile_grid, size, strict=True):
        expected *= min(n, w)
    assert (counts == expected).all()


@given(boxes, boxes, st.sampled_from(["clamp", "truncate"]))
@settings(deadline=None)
def test_the_own_tile_is_always_inside(tile_grid, size, border):
    assert Window(size=size, border=border).select(Layout(tile_grid, (1, 1, 1)))[0, 0].diagonal().all()


def test_the_two_forms_are_different_operators():
    layout = Layout((5, 6, 10), (1, 1, 1))
    clamp, truncate = (Window(size=(3, 3, 3), border=b).select(layout).float().mean() for b in ("clamp", "truncate"))
    assert float(clamp) == pytest.approx(0.090, abs=5e-4)
    assert float(truncate) == pytest.approx(0.065, abs=5e-4)


@pytest.mark.parametrize("grid", [(9, 32, 32), (21, 45, 80), (21, 30, 52), (9, 16, 16)])
@pytest.mark.parametrize("density", [0.5, 0.25, 0.125])
@pytest.mark.parametrize("border", ["clamp", "truncate"])
def test_a_window_by_density_comes_near_it(grid, density, border):
    from fastdit.core.layout import fit_tile

    layout = Layout(grid, fit_tile(grid, 64))
    got = float(Window(density=density, border=border).select(layout).float().mean())
    assert density / 1.5 < got < density * 1.5


def test_density_is_monotone():
    layout = Layout((9, 32, 32), (3, 4, 4))
    got = [float(Window(density=d).select(layout).float().mean()) for d in (0.05, 0.1, 0.2, 0.4, 0.8, 1.0)]
    assert got == sorted(got)
    assert got[-1] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"size": (1, 1, 1), "density": 0.5},
        {"size": (0, 1, 1)},
        {"size": (1, 1)},
        {"size": (1.5, 1, 1)},
        {"density": 0.0},
        {"density": 1.5},
        {"density": 0.5, "border": "wrap"},
    ],
)
def test_bad_windows_are_refused(arguments):
    with pytest.raises(ValueError, match="window"):
        Window(**arguments)


@pytest.mark.parametrize("policy", [Dense(), Window(size=(3, 1, 2)), Window(density=0.25, border="truncate")])
def test_policies_round_trip_and_hash(policy):
    assert isinstance(policy, Policy)
    assert policy_from_dict(policy.to_dict()) == policy
    assert hash(policy_from_dict(policy.to_dict())) == hash(policy)
    assert POLICIES[policy.name] is type(policy)


@pytest.mark.parametrize("bad", [{}, {"name": "no such"}, {"name": "window", "sise": [1, 1, 1]}])
def test_unknown_policies_and_fields_are_named(bad):
    with pytest.raises(ValueError, match="policy"):
        policy_from_dict(bad)
