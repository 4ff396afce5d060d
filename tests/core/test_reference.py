import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdit.core.layout import Layout
from fastdit.core.reference import attention, merge, relative_error, token_mask


def qkv(nq=5, nk=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, n, 4, dtype=dtype, generator=generator) for n in (nq, nk, nk)]


def test_equals_sdpa_and_its_lse():
    q, k, v = qkv()
    out, lse = attention(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(lse, torch.logsumexp(q @ k.mT / 2, -1))


def test_mask_and_empty_rows():
    q, k, v = qkv()
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    mask[3, 1:] = False
    out, lse = attention(q, k, v, mask, scale=0.3)
    assert (out[:, :, 2] == 0).all()
    assert lse[:, :, 2].isneginf().all()
    torch.testing.assert_close(out[:, :, 3], v[:, :, 0])


@given(st.lists(st.integers(0, 3), min_size=7, max_size=7), st.integers(0, 5))
@settings(deadline=None)
def test_any_partition_of_the_keys_merges_to_the_whole(part_of, seed):
    q, k, v = qkv(seed=seed)
    parts = [attention(q, k, v, torch.tensor([p == i for p in part_of]).expand(5, 7)) for i in range(4)]
    out, lse = merge(parts)
    whole, whole_lse = attention(q, k, v)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)


def test_merge_of_nothing_is_nothing():
    out, lse = merge([(torch.zeros(1, 2, 3), torch.full((1, 2), -math.inf))] * 2)
    assert (out == 0).all()
    assert lse.isneginf().all()


def test_token_mask_stands_for_the_tile_map():
    layout = Layout((2, 4, 3), (1, 3, 2), text_len=3)
    tile_map = torch.rand(2, 1, layout.num_tiles, layout.num_tiles, generator=torch.Generator().manual_seed(0)) < 0.4
    mask = token_mask(layout, tile_map)
    for i, queries in enumerate(layout.order()):
        for j, keys in enumerate(layout.order()):
            block = mask[:, :, queries[queries >= 0]][..., keys[keys >= 0]]
            assert (block == tile_map[:, :, i, j, None, None]).all()


@pytest.mark.parametrize(
    ("actual", "expected", "error"), [([3.0, 4.0], [0.0, 5.0], 10**0.5 / 5), ([0.0], [0.0], 0.0), ([2.0], [0.0], 2.0)]
)
def test_relative_error(actual, expected, error):
    assert relative_error(torch.tensor(actual), torch.tensor(expected)) == pytest.approx(error)
