import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdit.blockmask import BlockMask
from fastdit.layout import Layout
from fastdit.reference import token_mask


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
