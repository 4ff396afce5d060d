"""The kernel of `kernels/hopper.py` on a Hopper GPU against float64: Gluon has no interpreter, so nothing runs elsewhere.
What it compiles to is held everywhere, by test_compile.py."""

import pytest
import torch
from device import DEVICE
from oracle import ROUNDING, hurtful

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from triton_check import block_sparse_attention, check

from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.quant import Quant
from fastdit.core.reference import relative_error
from fastdit.kernels import cpu, launch
from fastdit.kernels import cuda as kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        DEVICE == "cuda" and torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU (H100, H200)"
    ),
]
FORMATS = [
    Quant(),
    Quant("fp8", "fp8"),
    Quant("int8", "fp8", smooth_k=True),
    Quant("int8", smooth_k=True, granularity="head"),
    Quant("fp8", "fp8", smooth_k=True, smooth_v=True),
    Quant("none", "fp8"),
]
LAYOUTS = [
    Layout((3, 16, 24), (1, 8, 8)),  # whole tiles of one warpgroup
    Layout((4, 16, 24), (2, 8, 8)),  # of two
    Layout((3, 20, 28), (1, 8, 8), text_len=9),  # ragged
    Layout((5, 17, 20), (2, 8, 8), text_len=40, text_first=True),
    Layout((6, 10, 16), (3, 5, 8)),  # no tile fills its block
    Layout((7, 17, 17), (6, 8, 8)),  # three blocks a tile
    Layout((3, 9, 17), (3, 8, 8)),  # three blocks of one warpgroup
]


@pytest.mark.parametrize("quant", FORMATS, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.grid}{layout.tile}")
def test_every_format_layout_and_head_dim(layout, dim, quant):
    assert launch.overlapped(dim, quant, layout.tile_tokens) is not None
    for share, seed in ((0.5, 0), (0.1, 1), (1.0, 2)):
        tile_map = torch.rand(2, 2, layout.num_tiles, layout.num_tiles, generator=torch.Generator().manual_seed(seed)) < share
        tile_map[:, 1, 1] = False  # rows that see nothing
        check(layout, tile_map, *hurtful(2, 2, layout.length, dim, torch.bfloat16, seed), quant, splits=1)


@pytest.mark.parametrize("quant", FORMATS, ids=str)
def test_float16_and_grouped_heads(quant):
    layout = Layout((4, 16, 24), (2, 8, 8))
    tile_map = torch.rand(1, 4, layout.num_tiles, layout.num_tiles, generator=torch.Generator().manual_seed(3)) < 0.5
    q, k, v = hurtful(1, 4, layout.length, 128, torch.float16)
    check(layout, tile_map, q, k, v, quant, splits=1)
    m = BlockMask.from_tile_map(tile_map, layout)
    masks = m.kv_num_blocks, m.kv_indices, m.q_order, m.k_order
    shared = block_sparse_attention(q, k[:, :2], v[:, :2], *masks, 0.1, quant, splits=1)
    spread = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
    for got, expected in zip(shared, block_sparse_attention(q, *spread, *masks, 0.1, quant, splits=1), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("quant", FORMATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[1:4], ids=lambda layout: f"{layout.grid}{layout.tile}")
def test_the_pooled_remainder_behind_it(layout, quant):
    """Against float64, twice the error of the format on the CPU; what pooled tiles change is more than that."""
    tile_map = torch.rand(1, 2, layout.num_tiles, layout.num_tiles, generator=torch.Generator().manual_seed(5)) < 0.2
    inputs = hurtful(1, 2, layout.length, 128, torch.bfloat16)
    assert launch.overlapped(128, quant, layout.tile_tokens) is not None
    m = BlockMask.from_tile_map(tile_map, layout)
    masks = m.kv_num_blocks, m.kv_indices, m.q_order, m.k_order
    exact, exact_lse = cpu.block_sparse_attention(*(x.double() for x in inputs), *masks, 0.1, Quant(), pooled=True)
    rough, rough_lse = cpu.block_sparse_attention(*(x.float() for x in inputs), *masks, 0.1, quant, pooled=True)
    out, lse = block_sparse_attention(*inputs, *masks, 0.1, quant, pooled=True, splits=1)
    kept, _ = block_sparse_attention(*inputs, *masks, 0.1, quant, splits=1)
    budget = 2 * relative_error(rough, exact) + ROUNDING[torch.bfloat16]
    assert relative_error(out, exact) <= budget < relative_error(kept, exact)
    assert (lse - exact_lse).abs().max() <= 2 * (rough_lse - exact_lse).abs().max() + 8 * ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("quant", FORMATS, ids=str)
def test_same_answer_every_time(quant):
    """A race moves: the same inputs, thirty times, to the bit."""
    layout = Layout((8, 32, 44), (2, 8, 8))
    tile_map = torch.rand(1, 4, layout.num_tiles, layout.num_tiles, generator=torch.Generator().manual_seed(4)) < 0.6
    inputs = [x.to(DEVICE) for x in hurtful(1, 4, layout.length, 128, torch.bfloat16)]
    m = BlockMask.from_tile_map(tile_map.to(DEVICE), layout)
    masks = m.kv_num_blocks, m.kv_indices, m.q_order, m.k_order
    first = block_sparse_attention(*inputs, *masks, 0.1, quant, splits=1)
    for _ in range(30):
        again = block_sparse_attention(*inputs, *masks, 0.1, quant, splits=1)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


@pytest.mark.parametrize("quant", FORMATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[2:4], ids=lambda layout: f"{layout.grid}{layout.tile}")
def test_the_flag_is_up_where_the_answer_is_not_finite(layout, quant):
    """One row of the first or last block of a head is broken, by its query: that alone raises the flag."""
    tile_map = torch.ones(1, 2, layout.num_tiles, layout.num_tiles, dtype=torch.bool, device=DEVICE)
    m = BlockMask.from_tile_map(tile_map, layout)
    masks = m.kv_num_blocks, m.kv_indices, m.q_order, m.k_order
    for token in (None, int(layout.order()[0, 0]), int(layout.order()[-1].max())):
        inputs = [x.to(DEVICE) for x in hurtful(1, 2, layout.length, 128, torch.bfloat16)]
        if token is not None:
            inputs[0][0, 1, token, 3] = float("nan")
        flags = torch.tensor([77, 0, 77], dtype=torch.int32, device=DEVICE)
        out, _ = kernels.block_sparse_attention(*inputs, *masks, 0.1, quant, fault=flags[1:2], splits=1)
        assert flags.tolist() == [77, int(token is not None), 77]
        assert bool(out.isfinite().all()) == (token is None)
