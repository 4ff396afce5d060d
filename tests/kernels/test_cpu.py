"""Block-sparse attention on CPU against the eager reference with the token mask that the tile map stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdit import ops
from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.quant import Quant
from fastdit.core.reference import attention, relative_error, token_mask
from fastdit.kernels import cpu
from fastdit.policies import Window

sides = st.integers(1, 6)
grids = st.tuples(sides, sides, sides)


def qkv(batch, heads, tokens, dim=16, dtype=torch.float64, seed=0, diffusers_strides=True):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, heads, dim) if diffusers_strides else (batch, heads, tokens, dim)
    x = [torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for _ in range(3)]
    return [y.transpose(1, 2) for y in x] if diffusers_strides else x


def random_map(layout, b, h, share, seed=0):
    return torch.rand(b, h, layout.num_tiles, layout.num_tiles, generator=torch.Generator().manual_seed(seed)) < share


@given(
    grid=grids, tile=grids, text=st.integers(0, 9), first=st.booleans(), share=st.floats(0, 1),
    shared=st.tuples(st.booleans(), st.booleans()),
    strides=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_any_grid_tile_text_and_map_equals_the_reference(grid, tile, text, first, share, shared, strides, seed):
    layout = Layout(grid, tile, text, first)
    q, k, v = qkv(2, 3, layout.length, seed=seed, diffusers_strides=strides)
    tile_map = random_map(layout, 1 if shared[0] else 2, 1 if shared[1] else 3, share, seed)
    out, lse = ops.attention(q, k, v, BlockMask.from_tile_map(tile_map, layout), scale=0.4)
    expected, expected_lse = attention(q, k, v, token_mask(layout, tile_map), scale=0.4)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-12)


# Budget: twice what the same rounding of the inputs costs in an eager computation, plus one rounding of the output.
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2**-23), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("border", ["clamp", "truncate"])
def test_every_dtype_is_within_its_rounding(dtype, rounding, border):
    layout = Layout((5, 9, 8), (2, 4, 4))
    q, k, v = qkv(1, 2, layout.length, 64, dtype)
    k = k + 4 * torch.randn(64, generator=torch.Generator().manual_seed(1)).to(dtype)  # channel bias, as in real keys
    tile_map = Window(size=(1, 3, 1), border=border).select(layout)
    out, lse = ops.attention(q, k, v, BlockMask.from_tile_map(tile_map, layout))
    mask = token_mask(layout, tile_map)
    exact, exact_lse = attention(q.double(), k.double(), v.double(), mask)
    eager = attention(q, k, v, mask)[0]
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert relative_error(out, exact) <= 2 * relative_error(eager, exact) + rounding
    assert abs(float(out.double().norm() / exact.norm()) - 1) <= rounding
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=64 * rounding)


def test_a_full_map_equals_dense_and_no_map():
    layout = Layout((2, 6, 6), (1, 4, 4))
    q, k, v = qkv(1, 2, layout.length, 64, torch.float32)
    full = BlockMask.from_tile_map(torch.ones(1, 1, layout.num_tiles, layout.num_tiles, dtype=torch.bool), layout)
    for got, expected in zip(ops.attention(q, k, v, full), ops.attention(q, k, v), strict=True):
        torch.testing.assert_close(got, expected)


def test_wide_logits_and_zeros_stay_finite():
    layout = Layout((1, 8, 8), (1, 4, 4))
    q, k, v = (x * 60 for x in qkv(1, 1, layout.length, 64, torch.float32))
    block_mask = BlockMask.from_tile_map(torch.eye(4, dtype=torch.bool)[None, None], layout)
    assert all(x.isfinite().all() for x in ops.attention(q, k, v, block_mask))
    out, lse = ops.attention(*(torch.zeros_like(q),) * 3, block_mask)
    assert (out == 0).all()
    torch.testing.assert_close(lse, torch.full_like(lse, 16.0).log())


def test_dropped_keys_are_never_read():
    """Poison: a NaN in a tile nobody attends must not show."""
    layout = Layout((1, 4, 8), (1, 4, 4))
    q, k, v = qkv(1, 2, layout.length, dtype=torch.float32)
    v[:, :, layout.order()[1]] = float("nan")
    k[:, :, layout.order()[1]] = float("nan")
    kept = torch.tensor([[True, False], [True, False]])[None, None]
    assert ops.attention(q, k, v, BlockMask.from_tile_map(kept, layout))[0].isfinite().all()


def test_stacks_of_any_size_give_the_same(monkeypatch):
    layout = Layout((3, 6, 6), (1, 2, 3))
    q, k, v = qkv(2, 2, layout.length, dtype=torch.float32)
    block_mask = BlockMask.from_tile_map(random_map(layout, 2, 2, 0.5), layout)
    whole = ops.attention(q, k, v, block_mask)
    monkeypatch.setattr("fastdit.kernels.cpu.CHUNK_BYTES", 1)
    for got, expected in zip(ops.attention(q, k, v, block_mask), whole, strict=True):
        torch.testing.assert_close(got, expected)


def test_quantized_dense_equals_quantized_full_map():
    layout = Layout((2, 4, 4), (2, 4, 4))
    q, k, v = qkv(1, 2, layout.length, 64, torch.float32)
    full = BlockMask.from_tile_map(torch.ones(1, 1, 1, 1, dtype=torch.bool), layout)
    quant = Quant(qk="int8", smooth_k=True)
    got, plain = ops.attention(q, k, v, full, quant)[0], ops.attention(q, k, v)[0]
    assert 1e-4 < relative_error(got, plain) < 0.05
    torch.testing.assert_close(got, ops.attention(q, k, v, None, quant)[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("keys", [1, 3, 4, 16, 40])
def test_a_query_that_is_not_finite_shows(bad, keys):
    """ATen's kernel answers a NaN query with numbers where there are few keys; a tile may have as few."""
    q, k, v = torch.randn(1, 2, 20, 16), torch.randn(1, 2, keys, 16), torch.randn(1, 2, keys, 16)
    q[0, 1, 3, 5] = bad
    out, lse = cpu.attend(q, k, v, 0.25)
    assert not out[0, 1, 3].isfinite().any()
    assert not lse[0, 1, 3].isfinite()
    rest = torch.ones(1, 2, 20, dtype=torch.bool)
    rest[0, 1, 3] = False
    assert out[rest].isfinite().all()
    assert lse[rest].isfinite().all()
