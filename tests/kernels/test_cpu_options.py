"""Options of `ops.attention` on CPU against float64: grouped heads, biases and key masks, the pooled remainder."""

import pytest
import torch
from oracle import LAYOUT, SCALE, attend, check, draw, exact

from fastdit import ops
from fastdit.core.block_mask import BlockMask
from fastdit.core.quant import Quant
from fastdit.core.reference import token_mask

FORMATS = [Quant(), Quant("int8", "fp8", smooth_k=True)]


def mask_of(tile_map):
    return BlockMask.from_tile_map(tile_map, LAYOUT)


@pytest.mark.parametrize("quant", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grouped_heads_and_pooled_remainder(quant, dtype):
    q, k, v, tile_map, _ = draw(4, 2, dtype=dtype)
    for remainder in ("none", "pooled"):
        got = ops.attention(q, k, v, mask_of(tile_map), quant, SCALE, remainder=remainder)
        assert got[0].dtype == got[1].dtype == dtype
        check(got, quant, q, k, v, tile_map, pooled=remainder == "pooled")


def test_pooled_remainder_with_nothing_dropped_changes_nothing():
    q, k, v, tile_map, _ = draw(share=1)
    for mask in (None, mask_of(tile_map)):
        for got, expected in zip(ops.attention(q, k, v, mask, remainder="pooled"), ops.attention(q, k, v, mask), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("quant", FORMATS, ids=str)
@pytest.mark.parametrize("sparse", [True, False])
def test_biases(quant, sparse):
    q, k, v, tile_map, _ = draw(share=0.5 if sparse else 1)
    mask = mask_of(tile_map) if sparse else None
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(2, 1, 2, LAYOUT.length, 3, generator=generator).unbind()
    orders = {} if sparse else {"q_order": None}
    if sparse or quant.is_none:
        got = ops.attention(q, k, v, mask, quant, SCALE, bias_q=left, bias_k=right)
        check(got, quant, q, k, v, tile_map, bias=(left @ right.mT).double(), **orders)
        key = torch.rand(1, 1, LAYOUT.length, 1, generator=generator)
        key[:, :, ::5] = float("-inf")
        got = ops.attention(q, k, v, mask, quant, SCALE, bias_k=key)
        check(got, quant, q, k, v, tile_map, bias=key.mT.double(), **orders)
    else:
        got = ops.attention(q, k, v, mask, quant, SCALE, bias_q=left, bias_k=right)[0]
        expected = exact(q, k, v, token_mask(LAYOUT, tile_map), (left @ right.mT).double())[0]
        assert (got - expected).norm() / expected.norm() < 0.08


def test_a_query_whose_keys_are_all_masked_sees_nothing():
    q, k, v, tile_map, _ = draw()
    hide = torch.full((1, 1, LAYOUT.length, 1), float("-inf"))
    out, lse = ops.attention(q, k, v, mask_of(tile_map), bias_k=hide)
    assert not out.any()
    assert lse.isneginf().all()


def test_what_the_remainder_of_one_tile_is():
    """Two queries' worth, by hand: the kept tile's keys and the mean of the other's, log n heavier."""
    q, k, v, _, _ = draw()
    kept = torch.eye(LAYOUT.num_tiles, dtype=torch.bool)[None, None].clone()
    kept[..., 2:] |= True
    kept[0, 0, 0, 1] = False
    first, second = (LAYOUT.order()[i] for i in (0, 1))
    rest = torch.cat([LAYOUT.order()[i] for i in (0, *range(2, LAYOUT.num_tiles))])
    near = rest[rest >= 0]
    far = second[second >= 0]
    logits = torch.cat([q[:, :, first[:1]] @ k[:, :, near].mT, q[:, :, first[:1]] @ k[:, :, far].mean(2, True).mT], -1) * SCALE
    logits[..., -1] += torch.tensor(float(len(far))).log()
    expected = attend(logits.double(), torch.cat([v[:, :, near], v[:, :, far].mean(2, True)], 2).double())
    got = ops.attention(q, k, v, mask_of(kept), scale=SCALE, remainder="pooled")
    torch.testing.assert_close(got[0][:, :, first[:1]].double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1][:, :, first[:1]].double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remainder": "mean"}, "none or pooled"),
        ({"bias_q": torch.zeros(1, 1, LAYOUT.length, 2)}, "needs a bias_k"),
        ({"bias_k": torch.zeros(1, 1, LAYOUT.length, 2)}, "bias_k must be"),
        ({"bias_k": torch.zeros(1, 1, 5, 1)}, "bias_k must be"),
        ({"bias_k": torch.zeros(1, 1, LAYOUT.length, 1), "remainder": "pooled"}, "beside a bias"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    q, k, v, tile_map, _ = draw()
    with pytest.raises(ValueError, match=message):
        ops.attention(q, k, v, mask_of(tile_map), **options)
    with pytest.raises(ValueError, match="multiple of the 2 key heads"):
        ops.attention(q[:, :1].expand(-1, 3, -1, -1), k, v)
