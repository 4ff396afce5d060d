import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdit.core.layout import Layout, fit_tile

sides = st.integers(1, 9)
grids = st.tuples(sides, sides, sides)


@st.composite
def layouts(draw):
    return Layout(draw(grids), draw(grids), draw(st.integers(0, 40)), draw(st.booleans()))


@given(layouts())
@settings(deadline=None)
def test_every_token_has_exactly_one_slot(layout):
    order = layout.order()
    assert order.shape == (layout.num_tiles, layout.tile_tokens)
    assert sorted(order[order >= 0].tolist()) == list(range(layout.length))
    assert layout.counts().sum() == layout.length
    assert layout.is_padded == bool((order < 0).any())


@given(layouts())
@settings(deadline=None)
def test_padding_is_behind_the_real_tokens_of_a_tile(layout):
    real = (layout.order() >= 0).to(torch.int8)
    assert (real.diff(dim=1) <= 0).all()
    assert (layout.counts() > 0).all()


@given(layouts())
@settings(deadline=None)
def test_to_tiles_and_back_is_the_identity(layout):
    x = torch.randn(2, 1, layout.length, 3)
    tiles = layout.to_tiles(x)
    assert tiles.shape == (2, 1, layout.num_tiles, layout.tile_tokens, 3)
    assert torch.equal(layout.from_tiles(tiles), x)
    assert (tiles[:, :, layout.order() < 0] == 0).all()


def test_a_tile_is_a_brick_of_the_grid():
    layout = Layout((4, 6, 8), (2, 3, 4), text_len=5, text_first=True)
    coordinates = torch.stack(torch.meshgrid(*map(torch.arange, layout.grid), indexing="ij"), -1).flatten(0, 2)
    for tile, tokens in enumerate(layout.order()[: layout.video_tiles]):
        position = torch.tensor([tile // 4, tile // 2 % 2, tile % 2])
        inside = coordinates[tokens - 5] // torch.tensor(layout.tile)
        assert (inside == position).all()
    assert layout.order()[layout.video_tiles][:5].tolist() == [0, 1, 2, 3, 4]


def test_text_behind_the_video():
    order = Layout((1, 2, 2), (1, 1, 2), text_len=3).order()
    assert order.tolist() == [[0, 1], [2, 3], [4, 5], [6, -1]]


@pytest.mark.parametrize("bad", [((0, 2, 2), (1, 1, 1)), ((2, 2, 2), (1, 1)), ((2, 2, 2), (1, 0, 1)), ((2, 2.5, 2), (1, 1, 1))])
def test_a_bad_grid_or_tile_is_named(bad):
    with pytest.raises(ValueError, match="three positive whole numbers"):
        Layout(*bad)


def test_wrong_token_count_is_named():
    with pytest.raises(ValueError, match="expected 8 tokens"):
        Layout((2, 2, 2), (1, 2, 2)).to_tiles(torch.zeros(1, 1, 9, 4))


@pytest.mark.parametrize("grid", [(9, 32, 32), (21, 45, 80), (21, 30, 52), (9, 16, 16), (1, 64, 64), (33, 40, 64)])
@pytest.mark.parametrize("target", [64, 128])
def test_fitted_tiles_divide_common_grids(grid, target):
    tile = fit_tile(grid, target)
    assert all(g % s == 0 for g, s in zip(grid, tile, strict=True))
    assert target / 2 <= math.prod(tile) <= 2 * target


@pytest.mark.parametrize("grid", [(7, 31, 53), (1, 1, 1), (2, 3, 97), (13, 13, 13)])
def test_fitted_tiles_of_prime_grids_pad_little(grid):
    layout = Layout(grid, fit_tile(grid))
    assert layout.num_tiles * layout.tile_tokens <= 1.2 * layout.length
