"""The Triton kernels, interpreted or on a GPU, against float64: every format, ragged shapes, hurtful inputs.

Budget of an error: twice what the same format costs in eager emulation, plus a rounding of the output's type. bfloat16 runs
through the interpreter's repair (`interpreter.py`): what is tested of it is the kernel's arithmetic, not the hardware's.
"""

import pytest
import torch
from device import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import hurtful

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from triton_check import block_sparse_attention, check, dense_attention

from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.quant import Quant
from fastdit.core.reference import relative_error
from fastdit.kernels import cpu
from fastdit.kernels.cuda import unsupported
from fastdit.kernels.pack import Rows

FORMATS = [
    Quant(),
    Quant("fp8", "fp8"),
    Quant("int8", "fp8", smooth_k=True),
    Quant("int8", smooth_k=True, granularity="head"),
    Quant("int4", "fp8", smooth_q=True, smooth_k=True, smooth_v=True),
    Quant("int4", smooth_k=True),
    Quant("fp8", "fp8", smooth_v=True, granularity="tensor"),
    Quant("none", "fp8"),
    Quant("int8", "int8", smooth_k=True, smooth_v=True),
]


@pytest.mark.parametrize("quant", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_every_format_and_dtype(quant, dtype):
    layout = Layout((1, 12, 8), (1, 8, 8), text_len=9)
    tile_map = torch.rand(1, 2, layout.num_tiles, layout.num_tiles, generator=torch.Generator().manual_seed(1)) < 0.5
    tile_map[:, 1, 1] = False  # rows that see nothing
    check(layout, tile_map, *hurtful(1, 2, layout.length, 64, dtype), quant)


@pytest.mark.parametrize("dim", [16, 40, 64, 72, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("quant", [Quant(), Quant("int4", "fp8", smooth_q=True, smooth_k=True)], ids=str)
def test_every_head_dim(dim, quant):
    layout = Layout((1, 7, 8), (1, 4, 8))
    tile_map = torch.tensor([[1, 0], [1, 1]], dtype=torch.bool)[None, None]
    check(layout, tile_map, *hurtful(1, 1, layout.length, dim, torch.float16), quant)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [16, 40, 64, 72, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("quant", FORMATS, ids=str)
@pytest.mark.parametrize("dense", [True, False])
def test_every_head_dim_in_every_format(dim, quant, dense):
    layout = Layout((1, 7, 8), (1, 4, 8), text_len=3)
    tile_map = torch.tensor([[1, dense, dense], [1, 1, dense], [dense, dense, 1]]).bool()[None, None]
    check(layout, tile_map, *hurtful(1, 2, layout.length, dim, torch.float16), quant)


@pytest.mark.parametrize("tile", [(2, 3, 3), (2, 8, 8), (3, 8, 8), (2, 9, 8), (6, 8, 8)])
def test_tiles_of_any_size(tile):
    layout = Layout((3, 10, 9), tile)
    tile_map = torch.rand(1, 1, layout.num_tiles, layout.num_tiles, generator=torch.Generator().manual_seed(2)) < 0.6
    check(layout, tile_map, *hurtful(1, 1, layout.length, 32, torch.float16), Quant("fp8", "fp8"))


side = st.integers(1, 3)


@given(
    grid=st.tuples(side, side, side), tile=st.tuples(side, side, side), text=st.integers(0, 5), first=st.booleans(),
    share=st.floats(0, 1), seed=st.integers(0, 99), quant=st.sampled_from(FORMATS),
    shared=st.tuples(st.booleans(), st.booleans()),
)  # fmt: skip
@settings(deadline=None, max_examples=30)
def test_any_grid_tile_and_map(grid, tile, text, first, share, quant, shared, seed):
    layout = Layout(grid, tile, text, first)
    shape = (1 if shared[0] else 2, 1 if shared[1] else 2, layout.num_tiles, layout.num_tiles)
    tile_map = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share
    check(layout, tile_map, *hurtful(2, 2, layout.length, 16, torch.float32, seed), quant, scale=0.3)


@pytest.mark.parametrize("quant", FORMATS, ids=str)
def test_dense_is_tiles_of_consecutive_tokens(quant):
    q, k, v = hurtful(1, 2, 150, 32, torch.float32)
    out, lse = dense_attention(q, k, v, 0.2, quant)
    expected, expected_lse = cpu.dense_attention(q, k, v, 0.2, quant)
    assert relative_error(out, expected) < {"none": 1e-5, "int8": 0.005, "fp8": 0.03}[quant.pv]  # P is rounded block by block
    # An FP8 product on Hopper keeps some 13 bits of what it adds up: a few thousandths of logits of this size
    imprecise = quant.qk == "fp8" and DEVICE == "cuda"
    torch.testing.assert_close(lse, expected_lse, atol=4e-3 if imprecise else 1e-4, rtol=1e-5)


def test_nan_is_not_hidden():
    layout = Layout((1, 8, 8), (1, 8, 8))
    for quant in FORMATS:
        q, k, v = (x.clone() for x in hurtful(1, 1, 64, 32, torch.float32))
        k[0, 0, 5, 3] = float("nan")
        m = BlockMask.from_tile_map(torch.ones(1, 1, 1, 1, dtype=torch.bool), layout)
        out, _ = block_sparse_attention(q, k, v, m.kv_num_blocks, m.kv_indices, m.q_order, m.k_order, 0.2, quant)
        assert out.isnan().any(), str(quant)


@pytest.mark.parametrize(
    ("slots", "block", "parts"), [(64, 64, 1), (60, 64, 1), (16, 32, 1), (384, 128, 3), (144, 32, 5), (512, 128, 4)]
)
def test_blocks_pad_least(slots, block, parts):
    assert Rows.of(slots) == Rows(slots, block, parts)


@pytest.mark.parametrize(
    ("capability", "quant", "dtype", "dim", "reason"),
    [
        ((7, 5), Quant(), torch.float16, 64, "8.0"),
        ((8, 6), Quant("fp8"), torch.float16, 64, "FP8"),
        ((8, 6), Quant("int8", smooth_k=True), torch.float16, 64, None),
        ((8, 0), Quant("int8", "int8"), torch.float16, 64, None),
        ((8, 0), Quant("int8", "fp8"), torch.float16, 64, "FP8"),
        ((9, 0), Quant(), torch.float64, 64, "float64"),
        ((9, 0), Quant(), torch.float16, 320, "256"),
        ((9, 0), Quant(), torch.float32, 160, "128"),
        ((9, 0), Quant("fp8", "fp8"), torch.float32, 160, None),
        ((12, 0), Quant("fp8", "fp8"), torch.bfloat16, 128, None),
    ],
)
def test_what_a_gpu_cannot_do_is_named(capability, quant, dtype, dim, reason):
    got = unsupported(torch.empty(1, 1, 1, dim, dtype=dtype), quant, capability)
    assert got is None if reason is None else reason in got
