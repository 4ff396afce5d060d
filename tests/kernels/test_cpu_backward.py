"""Gradients of `ops.attention` on CPU: by finite differences, and against autograd of every pair written out in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import LAYOUT, SCALE, draw, exact

from fastdit import ops
from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.quant import Quant, emulate
from fastdit.core.reference import relative_error, token_mask

FORMATS = [
    Quant("fp8", "fp8"),
    Quant("int8", smooth_k=True),
    Quant("int8", "int8", smooth_k=True, smooth_v=True, granularity="head"),
    Quant("int4", "fp8", smooth_q=True, smooth_k=True, smooth_v=True),
    Quant("none", "fp8"),
]
SMALL = Layout((1, 3, 2), (1, 2, 2), text_len=2)  # a tile that overhangs, and text


def seen(x):
    """The LSE with a number in place of −∞, so that sums of it have one."""
    return x.masked_fill(x.isneginf(), 0)


def mask_of(tile_map, layout=LAYOUT):
    return BlockMask.from_tile_map(tile_map, layout)


def leaves(*tensors):
    return [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in tensors]


def plain(q, k, v, kept, scale):
    """(out, lse), every pair written out, with no −∞ on the way, of which autograd would make NaN in rows without keys."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.mT * scale
    logits = logits.masked_fill(~kept, -1e4)
    some = kept.any(-1).expand(logits.shape[:-1])
    out = logits.softmax(-1) @ v * some[..., None]
    return out, logits.logsumexp(-1).masked_fill(~some, float("-inf"))


def weights(out, lse, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in (out, lse)]


def gradients(answer, inputs, of_lse=True):
    """Of a fixed random sum of the answer, in the inputs."""
    out, lse = answer
    of_out, of_total = weights(out, lse)
    loss = (out.double() * of_out).sum() + (seen(lse).double() * of_total).sum() * of_lse
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("remainder", ["none", "pooled"])
@pytest.mark.parametrize("sparse", [True, False])
def test_gradcheck(remainder, sparse):
    """Text, padding, grouped heads, a map per head and a query tile that sees nothing; of out and of lse."""
    generator = torch.Generator().manual_seed(0)
    tile_map = torch.rand(1, 2, SMALL.num_tiles, SMALL.num_tiles, generator=generator) < 0.5
    tile_map[:, 1, 1] = False
    q, k, v = (torch.randn(2, n, SMALL.length, 3, dtype=torch.float64, generator=generator).requires_grad_() for n in (2, 1, 1))
    mask = mask_of(tile_map, SMALL) if sparse else None

    def answer(q, k, v):
        out, lse = ops.attention(q, k, v, mask, scale=0.7, remainder=remainder)
        return out, seen(lse)

    assert torch.autograd.gradcheck(answer, (q, k, v))


sides = st.integers(1, 4)
grids = st.tuples(sides, sides, sides)


@given(
    grid=grids, tile=grids, text=st.integers(0, 5), first=st.booleans(), share=st.floats(0, 1),
    shared=st.tuples(st.booleans(), st.booleans()), of_lse=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_any_grid_tile_text_and_map_equals_autograd(grid, tile, text, first, share, shared, of_lse, seed):
    layout, generator = Layout(grid, tile, text, first), torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, layout.length, 3, 8, dtype=torch.float64, generator=generator) for _ in range(3))
    q, k, v = leaves(*(x.transpose(1, 2) for x in (q, k, v)))
    shape = (1 if shared[0] else 2, 1 if shared[1] else 3, layout.num_tiles, layout.num_tiles)
    tile_map = torch.rand(shape, generator=generator) < share
    got = gradients(ops.attention(q, k, v, mask_of(tile_map, layout), scale=0.4), (q, k, v), of_lse)
    expected = gradients(plain(q, k, v, token_mask(layout, tile_map), 0.4), (q, k, v), of_lse)
    for ours, right in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-11)
    assert got[0].stride() == q.stride()


# Budget: twice the error of autograd through an eager computation in the same dtype, plus one rounding of the gradient.
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2**-20), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_every_dtype_is_within_its_rounding(dtype, rounding, heads):
    q, k, v, tile_map, _ = draw(*heads, dtype)
    kept = token_mask(LAYOUT, tile_map)
    q, k, v = leaves(q, k, v)
    got = gradients(ops.attention(q, k, v, mask_of(tile_map), scale=SCALE), (q, k, v), of_lse=False)
    wide = leaves(*(x.double() for x in (q, k, v)))
    expected = gradients(plain(*wide, kept, SCALE), wide, of_lse=False)
    narrow = leaves(q, k, v)
    eager = gradients(plain(*narrow, kept, SCALE), narrow, of_lse=False)
    for ours, right, rough in zip(got, expected, eager, strict=True):
        assert ours.dtype == dtype
        assert relative_error(ours, right) <= 2 * relative_error(rough, right) + rounding
        assert abs(float(ours.double().norm() / right.norm()) - 1) <= 2 * relative_error(rough, right) + rounding


def straight_through(q, k, v, kept, quant, pooled):
    """Every pair written out: autograd of exact attention whose operands and logits have the rounded values."""
    group = q.shape[1] // k.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (k, v))
    with torch.no_grad():
        x = emulate(q, key, value, quant, LAYOUT.order(), LAYOUT.order())
        logits = x.q @ x.k.mT * SCALE + (0 if x.shift is None else SCALE * x.shift[..., None])
        centre = key.mean(2, keepdim=True) if quant.smooth_k else 0
        halves = (sum(x.q.tensor_split(2, -1)), x.k[..., : q.shape[-1]]) if quant.smooth_q else (x.q, x.k)
        changes = halves[0] - q, halves[1] + centre - key, x.v + (0 if x.mean is None else x.mean) - value
    query, key_, value_ = (y + change for y, change in zip((q, key, value), changes, strict=True))
    far = None
    if pooled:
        real, counts = (LAYOUT.order() >= 0)[..., None], LAYOUT.counts()[:, None]
        means = [(LAYOUT.to_tiles(y) * real).sum(3) / counts for y in (key, value)]
        far = (q @ means[0].mT) * SCALE + LAYOUT.counts().to(q.dtype).log()
        far = far.masked_fill(kept[..., LAYOUT.order()[:, 0]], -1e30)
    near = query @ key_.mT * SCALE
    near = (near + (logits - near).detach()).masked_fill(~kept, -1e30)
    if far is None:
        some = kept.any(-1)[..., None]
        return near.softmax(-1) @ value_ * some
    return torch.cat([near, far], -1).softmax(-1) @ torch.cat([value_, means[1]], 2)


@pytest.mark.parametrize("quant", FORMATS, ids=str)
@pytest.mark.parametrize("remainder", ["none", "pooled"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_formats_are_trained_straight_through(quant, remainder, dtype):
    """Rounding has the derivative one: equal to autograd through the rounded values, which are the forward's own."""
    q, k, v, tile_map, _ = draw(4, 2, dtype)
    tile_map[:, 1, 2] = False
    q, k, v = leaves(q, k, v)
    out, _ = ops.attention(q, k, v, mask_of(tile_map), quant, SCALE, remainder)
    assert torch.equal(out, ops.run(q, k, v, mask_of(tile_map), quant, SCALE, remainder)[0])
    of_out = weights(out, out[..., 0])[0].to(dtype)
    got = torch.autograd.grad((out * of_out).sum(), (q, k, v))
    kept = token_mask(LAYOUT, tile_map)
    expected = torch.autograd.grad((straight_through(q, k, v, kept, quant, remainder == "pooled") * of_out).sum(), (q, k, v))
    unrounded = torch.autograd.grad((plain(q, k, v, kept, SCALE)[0] * of_out).sum(), (q, k, v))
    for ours, right, other in zip(got, expected, unrounded, strict=True):
        assert relative_error(ours, right) < (1e-9 if dtype == torch.float64 else 1e-4)
        assert relative_error(other, right) > 1e-3 or (quant.qk == "none" and ours is got[2])  # the test can fail


@pytest.mark.parametrize("quant", [Quant("int8", smooth_k=True), Quant("int4", "fp8", smooth_q=True, smooth_k=True)], ids=str)
def test_the_lse_of_a_format_has_a_gradient(quant):
    q, k, v, tile_map, _ = draw(2, 2, torch.float64)
    q, k, v = leaves(q, k, v)
    answer = ops.attention(q, k, v, mask_of(tile_map), quant, SCALE)
    got = torch.autograd.grad(seen(answer[1]).sum(), (q, k))
    expected = torch.autograd.grad(seen(exact(q, k, v, token_mask(LAYOUT, tile_map))[1]).sum(), (q, k))
    for ours, right, most in zip(got, expected, (0.02, 0.02) if quant.qk == "int8" else (0.3, 0.3), strict=True):
        assert relative_error(ours, right) < most


def test_dense_in_a_format():
    q, k, v = leaves(*draw(2, 2, torch.float64)[:3])
    quant = Quant("int8", "fp8", smooth_k=True)
    got = gradients(ops.attention(q, k, v, None, quant, SCALE), (q, k, v), of_lse=False)
    kept = torch.ones(1, 1, LAYOUT.length, LAYOUT.length, dtype=torch.bool)
    expected = gradients(plain(q, k, v, kept, SCALE), (q, k, v), of_lse=False)
    assert all(1e-4 < relative_error(a, b) < 0.1 for a, b in zip(got, expected, strict=True))


def test_the_same_to_the_bit_each_time():
    q, k, v, tile_map, _ = draw(4, 2)
    q, k, v = leaves(q, k, v)
    first, second = (gradients(ops.attention(q, k, v, mask_of(tile_map), remainder="pooled"), (q, k, v)) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_dropped_keys_have_no_gradient_and_are_never_read():
    layout = Layout((1, 4, 8), (1, 4, 4))
    q, k, v = leaves(*torch.randn(3, 1, 2, 32, 8, generator=torch.Generator().manual_seed(0)))
    away = layout.order()[1]
    with torch.no_grad():
        k[:, :, away] = v[:, :, away] = float("nan")
    kept = torch.tensor([[True, False], [False, False]])[None, None]
    got = gradients(ops.attention(q, k, v, mask_of(kept, layout)), (q, k, v))
    assert all(x.isfinite().all() for x in got)
    assert all((x[:, :, away] == 0).all() for x in got)
    assert all((x[:, :, layout.order()[0]] != 0).any() for x in got)
