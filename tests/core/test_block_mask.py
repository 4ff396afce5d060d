import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.reference import token_mask


@given(
    st.integers(0, 1000),
    st.floats(0, 1),
    st.sampled_from([((3, 5, 4), (2, 2, 3), 0), ((1, 1, 1), (1, 1, 1), 0), ((2, 4, 4), (2, 2, 2), 9)]),
)
@settings(deadline=None)
def test_round_trip_and_density(seed, share, shape):
    layout = Layout(*shape)
    tile_map = torch.rand(2, 3, layout.num_tiles, layout.num_tiles, generator=torch.Generator().manual_seed(seed)) < share
    block_mask = BlockMask.from_tile_map(tile_map, layout)
    assert torch.equal(block_mask.to_tile_map(), tile_map)
    assert block_mask.density() == pytest.approx(float(token_mask(layout, tile_map).double().mean()))
    assert torch.equal(block_mask.kv_num_blocks, tile_map.sum(-1, dtype=torch.int32))
    for count, indices in zip(block_mask.kv_num_blocks.flatten(), block_mask.kv_indices.flatten(0, 2), strict=True):
        assert indices[:count].tolist() == sorted(indices[:count].tolist())


@pytest.mark.parametrize(
    "bad", [torch.ones(1, 1, 4, 4), torch.ones(4, 4, dtype=torch.bool), torch.ones(1, 1, 4, 3, dtype=torch.bool)]
)
def test_a_map_that_does_not_fit_is_refused(bad):
    with pytest.raises(ValueError, match=r"bool \[b, h, 4, 4\]"):
        BlockMask.from_tile_map(bad, Layout((1, 4, 4), (1, 2, 2)))


def test_some_of_the_queries():
    """Of tokens 2, 3 and 7, all rolled by two: rows of the map of the tiles that 4, 5 and 1 lie in, asked once."""
    layout = Layout((1, 2, 4), (1, 2, 2))
    mask = BlockMask.from_tile_map(torch.eye(2, dtype=torch.bool)[None, None], layout)
    at = torch.tensor([2, 3, 7])
    some = mask.for_queries(at, 2)
    order = layout.order().tolist()
    tiles = [next(tile for tile, slots in enumerate(order) if token in slots) for token in (4, 5, 1)]
    found = {int(slot): tile for tile, slots in enumerate(some.q_order) for slot in slots if slot >= 0}
    rows = some.to_tile_map()[0, 0]
    assert [rows[found[query]].nonzero().flatten().tolist() for query in range(3)] == [[tile] for tile in tiles]
    assert mask.for_queries(at, 2) is some
    assert mask.for_queries(at.clone(), 2) is not some
    assert mask.for_queries(at, 0) is not some
