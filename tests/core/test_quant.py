"""The number formats: bounds of every cast, exactness under powers of two, and what smoothing takes out and puts back."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdit import ops
from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.quant import (
    LARGEST,
    Quant,
    Tiles,
    dequantize,
    emulate,
    pack_int4,
    quantize,
    rounded_attention,
    scale_of,
    unpack_int4,
)
from fastdit.core.reference import attention, relative_error, token_mask
from fastdit.policies import Window

FORMATS = ("fp8", "int8", "int4")
ALL = [
    Quant(qk, pv, *smooth, granularity)
    for qk, pv, granularity in itertools.product(("none", *FORMATS), ("none", "fp8", "int8"), ("tile", "head", "tensor"))
    for smooth in itertools.product((False, True), repeat=3)
    if (qk != "none" or not any(smooth[:2])) and (pv != "none" or not smooth[2]) and (qk, pv) != ("none", "none")
]

PER_TILE = [quant for quant in ALL if quant.granularity == "tile"]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qkv(tokens=512, dim=64, heads=2, dtype=torch.float64):
    return [normal(1, heads, tokens, dim, seed=seed, dtype=dtype) for seed in range(3)]


def error(quant, q, k, v):
    return relative_error(ops.attention(q, k, v, None, quant)[0], attention(q, k, v)[0])


@pytest.mark.parametrize("fmt", FORMATS)
@given(exponent=st.integers(-20, 20), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_every_element_is_within_its_cast_bound(fmt, exponent, seed):
    x = normal(8, 64, seed=seed) * 2.0**exponent
    scale = scale_of(x, fmt, (1,))
    off = (dequantize(quantize(x, fmt, scale), scale) - x).abs()
    # E4M3: three mantissa bits, subnormal step 2^-9; integers: half a step.
    bound = torch.maximum(x.abs() * 2**-4, scale * 2**-10) if fmt == "fp8" else scale.expand_as(x) / 2
    assert (off <= bound * (1 + 1e-9)).all()


@pytest.mark.parametrize("fmt", FORMATS)
def test_scaling_by_a_power_of_two_is_exact(fmt):
    x = normal(4, 64)
    one, eight = (scale_of(y, fmt, (1,)) for y in (x, 8 * x))
    assert torch.equal(dequantize(quantize(8 * x, fmt, eight), eight), 8 * dequantize(quantize(x, fmt, one), one))


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_largest_value_is_reached_and_zeros_stay_zero(fmt):
    x = normal(2, 64)
    x[1] = 0
    scale = scale_of(x, fmt, (1,))
    codes = quantize(x, fmt, scale)
    assert codes[0].double().abs().max() == LARGEST[fmt]
    assert torch.equal(dequantize(codes, scale)[1], x[1])
    assert quantize(x * 1e6, fmt, scale).double().isfinite().all()  # E4M3 has no infinity: saturate, never NaN


@pytest.mark.parametrize("quant", [Quant("int4", "int8"), Quant("fp8", "fp8"), Quant("int8", granularity="head")], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(quant, bad):
    q, k, v = qkv(64)
    k[0, 0, 3, 5] = bad
    assert ops.attention(q, k, v, None, quant)[0][0, 0].isnan().any()


@given(pairs=st.integers(1, 40), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_int4_packs_two_to_a_byte(pairs, seed):
    codes = torch.randint(-8, 8, (3, 2 * pairs), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, pairs)
    assert torch.equal(unpack_int4(packed), codes)


def test_int4_refuses_an_odd_row():
    with pytest.raises(ValueError, match="even"):
        pack_int4(torch.zeros(3, 5, dtype=torch.int8))


@pytest.mark.parametrize(
    ("quant", "expected"),
    [
        # FPSAttention's formats on N(0, 1) data with D = 64: Q·K, V, and P alone, then all of them.
        (Quant("fp8"), 0.040),
        (Quant("none", "fp8"), 0.037),
        (Quant("fp8", "fp8"), 0.054),
    ],
    ids=str,
)
def test_errors_on_normal_data_are_the_known_ones(quant, expected):
    q, k, v = qkv(1024)
    assert error(quant, q, k, v) == pytest.approx(expected, rel=0.1)


def test_p_uses_the_whole_range_of_fp8():
    """Unscaled, P of flat rows falls into E4M3's subnormals: 448 gains more than five-fold (papers: SageAttention2)."""
    q, k, v = qkv(4096, heads=1)
    q = q[:, :, :256] / 4  # each row is as flat as any
    v = v + 1
    exact = attention(q, k, v)[0]
    scaled = relative_error(rounded_attention(q, k, v, 0.125, "fp8")[0], exact)
    logits = q @ k.mT * 0.125
    p = logits.softmax(-1)
    unscaled = relative_error(p.to(torch.float8_e4m3fn).double() @ v, exact)
    assert scaled * 5 < unscaled


@pytest.mark.parametrize("quant", PER_TILE, ids=str)
def test_a_power_of_two_on_one_channel_of_v_passes_through(quant):
    q, k, v = qkv(96, 16)
    out = ops.attention(q, k, v, None, quant)[0]
    v[..., 3] *= 4
    changed = ops.attention(q, k, v, None, quant)[0]
    torch.testing.assert_close(changed[..., 3], 4 * out[..., 3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(changed[..., 4], out[..., 4], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("qk", FORMATS)
def test_smoothing_k_removes_a_channel_bias(qk):
    q, k, v = qkv()
    biased = k + 20 * normal(64, seed=9)
    smoothed, plain, unbiased = (
        error(Quant(qk, smooth_k=True), q, biased, v), error(Quant(qk), q, biased, v), error(Quant(qk), q, k, v)
    )  # fmt: skip
    assert smoothed < 1.5 * unbiased
    assert smoothed * (2 if qk == "fp8" else 5) < plain


def test_smoothing_q_removes_the_mean_of_a_tile():
    q, k, v = qkv()
    q = q + 20 * normal(64, seed=9)
    assert error(Quant("int4", smooth_q=True, smooth_k=True), q, k, v) * 3 < error(Quant("int4", smooth_k=True), q, k, v)


def test_smoothing_v_keeps_its_mean():
    q, k, v = qkv()
    v = v + 30
    assert error(Quant(pv="fp8", smooth_v=True), q, k, v) * 5 < error(Quant(pv="fp8"), q, k, v)


@pytest.mark.parametrize("quant", PER_TILE, ids=str)
def test_constant_data_is_exact_where_smoothing_leaves_nothing(quant):
    """With Q, K and V equal to their means, all that is quantized is zero: the whole answer is what was put back."""
    q, k, v = (normal(1, 2, 1, 16, seed=i).expand(1, 2, 80, 16) for i in range(3))
    out, lse = ops.attention(q, k, v, None, quant)
    expected, expected_lse = attention(q, k, v)
    if quant.smooth_v:
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    if quant.smooth_q and quant.smooth_k:
        torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("quant", PER_TILE, ids=str)
def test_lse_is_that_of_uncentred_logits(quant):
    q, k, v = qkv(128, 32)
    lse = ops.attention(q, k + 3, v, None, quant)[1]
    exact = attention(q, k + 3, v)[1]
    assert (lse - exact).abs().mean() < 0.4  # without what smoothing K took: about 2.4


@pytest.mark.parametrize("quant", PER_TILE, ids=str)
def test_sparse_equals_the_rounded_operands_under_the_token_mask(quant):
    """What the CPU kernel gathers is what `emulate` rounded, tile by tile; text, padding and no keys included."""
    layout = Layout((3, 5, 5), (2, 3, 3), text_len=5)
    q, k, v = qkv(layout.length, 16)
    tile_map = torch.rand(1, 2, layout.num_tiles, layout.num_tiles, generator=torch.Generator().manual_seed(3)) < 0.5
    tile_map[:, :, 1] = False
    block_mask = BlockMask.from_tile_map(tile_map, layout)
    out, lse = ops.attention(q, k, v, block_mask, quant)
    x = emulate(q, k, v, quant, block_mask.q_order, block_mask.k_order)
    mask = token_mask(layout, tile_map)
    logits = (x.q @ x.k.mT / 4).masked_fill(~mask, float("-inf"))
    top = logits.amax(-1, keepdim=True)
    p = (logits - top.masked_fill(top.isneginf(), 0)).exp()
    total = p.sum(-1, keepdim=True)
    if quant.pv == "fp8":
        p = (p * 448).to(torch.float8_e4m3fn).double() / 448
    elif quant.pv == "int8":
        p = (p * 127).round() / 127
    expected = torch.where(total > 0, p @ x.v / total.clamp(min=1e-300), 0)
    expected, expected_lse = x.finish(expected, logits.logsumexp(-1), 0.25)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-9, atol=1e-9)
    empty = block_mask.q_order[1][block_mask.q_order[1] >= 0]
    assert (out[:, :, empty] == 0).all()


def test_scaling_one_tile_leaves_the_others_alone():
    layout = Layout((1, 8, 8), (1, 4, 4))
    q, k, v = qkv(64, 16)
    block_mask = BlockMask.from_tile_map(Window(size=(1, 2, 2)).select(layout), layout)
    quant = Quant("int8")
    before = emulate(q, k, v, quant, block_mask.q_order, block_mask.k_order).k
    tile = layout.order()[2]
    k[:, :, tile] *= 2**20
    after = emulate(q, k, v, quant, block_mask.q_order, block_mask.k_order).k
    assert torch.equal(after[:, :, tile], before[:, :, tile] * 2**20)
    others = torch.ones(64, dtype=torch.bool)
    others[tile] = False
    assert torch.equal(after[:, :, others], before[:, :, others])


def test_finer_granularity_helps_where_tiles_differ_in_range():
    q, k, v = qkv()
    k = k * torch.logspace(0, 6, 4).repeat_interleave(128)[:, None] / 1e6
    fine, coarse = (emulate(q, k, v, Quant("int8", granularity=g)).k for g in ("tile", "tensor"))
    assert relative_error(fine[:, :, :128], k[:, :, :128]) < 0.02
    assert (coarse[:, :, :128] == 0).all()


def test_tiles_without_an_order_are_runs_of_128_tokens():
    x = torch.arange(130.0).view(1, 1, 130, 1)
    assert Tiles(130, None, x.device).mean(x)[0, 0, [0, 127, 128, 129], 0].tolist() == [63.5, 63.5, 128.5, 128.5]


@pytest.mark.parametrize("quant", [Quant(), *ALL], ids=str)
def test_text_and_dictionary_round_trip(quant):
    assert Quant.parse(str(quant)) == quant
    assert Quant.from_dict(quant.to_dict()) == quant


@pytest.mark.parametrize(
    "make",
    [
        lambda: Quant("fp4"),
        lambda: Quant("int8", "int4"),
        lambda: Quant(granularity="row"),
        lambda: Quant(smooth_k=True),
        lambda: Quant("int8", smooth_v=True),
        lambda: Quant.from_dict({"kq": "int8"}),
        lambda: Quant.parse("int8"),
        lambda: Quant.parse("int8/fp8+x"),
        lambda: Quant.parse("int8/fp8@row"),
    ],
)
def test_bad_formats_are_refused(make):
    with pytest.raises(ValueError, match="quant"):
        make()
