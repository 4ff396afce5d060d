"""What stands in for dropped keys: nothing, the means of tiles, a sample."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit import ops
from fastdit.approx import remainder
from fastdit.config import Phase
from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.quant import Quant
from fastdit.core.reference import attention, merge, relative_error, token_mask
from fastdit.policies import Window

LAYOUT = Layout((4, 7, 9), (1, 4, 4), text_len=6)


def problem(seed=0, heads=2, kv_heads=2, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(2, n, LAYOUT.length, 16, dtype=torch.float64, generator=generator) * scale
        for n in (heads, kv_heads, kv_heads)
    )
    kept = torch.rand(2, heads, LAYOUT.num_tiles, LAYOUT.num_tiles, generator=generator) < 0.4
    kept |= torch.eye(LAYOUT.num_tiles, dtype=torch.bool)
    return q, k, v + 1, kept


def test_the_sample_is_right_on_average():
    """Over many draws the estimates of numerator and denominator of what was dropped meet the truth (both are unbiased)."""
    q, k, v, kept = problem()
    mask = BlockMask.from_tile_map(kept, LAYOUT)
    out, lse = attention(q, k, v, ~token_mask(LAYOUT, kept))
    top, bottom = torch.zeros_like(out), torch.zeros_like(lse)
    draws = 300
    for seed in range(draws):
        some, weight = remainder.sampled(q, k, v, mask, samples=64, seed=seed)
        bottom += weight.exp() / draws
        top += some * weight.exp()[..., None] / draws
    assert relative_error(bottom, lse.exp()) < 0.05
    assert relative_error(top, out * lse.exp()[..., None]) < 0.08


@pytest.mark.parametrize("quant", [Quant(), Quant("int8", "fp8", smooth_k=True)], ids=str)
def test_sample_merges_with_the_kept_tiles(quant):
    q, k, v, kept = problem(1)
    q, k, v = q.float(), k.float(), v.float()
    mask = BlockMask.from_tile_map(kept, LAYOUT)
    out, lse = remainder.attention(q, k, v, mask, quant, remainder="sampled")
    parts = [remainder.attention(q, k, v, mask, quant), remainder.sampled(q, k, v, mask)]
    expected, expected_lse = merge(parts)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    dense = attention(q, k, v)[0]
    assert relative_error(out, dense) < relative_error(parts[0][0], dense)
    assert torch.equal(out, remainder.attention(q, k, v, mask, quant, remainder="sampled")[0])  # one draw for a whole run


def test_keys_of_kept_tiles_are_not_counted_twice():
    """With everything kept the sample adds nothing; and no sampled key lies in a kept tile."""
    q, k, v, kept = problem(2)
    everything = BlockMask.from_tile_map(torch.ones_like(kept), LAYOUT)
    assert (remainder.sampled(q, k, v, everything)[1] == -math.inf).all()
    out, _ = remainder.attention(q, k, v, everything, remainder="sampled")
    assert relative_error(out, attention(q, k, v)[0]) < 1e-12
    seen = token_mask(LAYOUT, kept)
    spoiled = v.masked_fill(seen[:, :, 5, :, None], 1e30)  # what query 5 attends exactly
    out, _ = remainder.sampled(q, k, spoiled, BlockMask.from_tile_map(kept, LAYOUT))
    assert out[:, :, 5].abs().max() < 100


def test_sample_of_grouped_heads_and_in_pieces(monkeypatch):
    q, k, v, kept = problem(3, heads=4, kv_heads=2)
    mask = BlockMask.from_tile_map(kept, LAYOUT)
    out, lse = remainder.sampled(q, k, v, mask)
    monkeypatch.setattr(remainder, "LOGITS_BYTES", 1)
    again, lse_again = remainder.sampled(q, k, v, mask)
    assert torch.allclose(out, again, atol=1e-12)
    assert torch.allclose(lse, lse_again, atol=1e-12)


@pytest.mark.parametrize("quant", [Quant(), Quant("fp8", "fp8"), Quant("int8", smooth_k=True)], ids=str)
@pytest.mark.parametrize("kind", ["pooled", "sampled"])
def test_what_is_flat_is_stood_for_exactly(kind, quant):
    """Equal keys and values everywhere: means and samples both are the truth, whatever is dropped."""
    q, k, v, kept = problem(4)
    k, v = k[:, :, :1].expand_as(k).float(), v[:, :, :1].expand_as(v).float()
    mask = BlockMask.from_tile_map(kept, LAYOUT)
    out, _ = remainder.attention(q.float(), k, v, mask, quant, remainder=kind)
    dense, _ = remainder.attention(q.float(), k, v, None, quant, remainder=kind)
    assert relative_error(out, dense) < (0.02 if quant.pv == "fp8" else 2e-3)


@pytest.mark.parametrize("kind", remainder.REMAINDERS)
def test_every_remainder_on_triton(monkeypatch, kind):
    """The GPU's kernels, interpreted, behind the same door: what the CPU's say."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    from fastdit.kernels import cuda as triton_kernels

    layout, quant = Layout((2, 4, 5), (1, 4, 4), text_len=3), Quant("int8", smooth_k=True)
    q, k, v = (torch.randn(1, 1, layout.length, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    mask = BlockMask.from_tile_map(torch.eye(layout.num_tiles, dtype=torch.bool)[None, None], layout)
    expected, expected_lse = remainder.attention(q, k, v, mask, quant, remainder=kind)
    monkeypatch.setattr(ops, "_kernels", lambda q: triton_kernels)
    out, lse = remainder.attention(q, k, v, mask, quant, remainder=kind)
    assert relative_error(out, expected) < 1e-2
    assert relative_error(lse, expected_lse) < 1e-2


def test_unknown_remainder_is_named():
    with pytest.raises(ValueError, match="none, pooled, sampled"):
        Phase(policy=Window(density=0.2), remainder="guess")


def test_stripes_are_exact_where_they_hold_every_dropped_key():
    q, k, v, kept = problem(4)
    mask = BlockMask.from_tile_map(kept, LAYOUT)
    part = remainder.attention(q, k, v, mask)
    rest = remainder.stripes(q, k, v, mask, part[1], theta=math.inf, limit=LAYOUT.length)
    out, lse = merge([part, rest])
    dense, dense_lse = attention(q, k, v)
    assert relative_error(out, dense) < 1e-12
    assert relative_error(lse, dense_lse) < 1e-12


def test_a_stripe_finds_the_one_heavy_key_that_the_tiles_missed():
    """A key that all queries want, in a tile that nobody keeps: tiles alone miss it, one gathered key a group does not."""
    q, k, v, kept = problem(5, scale=0.1)
    heavy = 100
    q = q + 0.5
    k[:, :, heavy] += 4
    v[:, :, heavy] = 20
    layout_tile = (LAYOUT.order() == heavy).any(-1).nonzero().item()
    kept[..., layout_tile] = False
    mask = BlockMask.from_tile_map(kept, LAYOUT)
    dense = attention(q, k, v)[0]
    part = remainder.attention(q, k, v, mask)
    one = merge([part, remainder.stripes(q, k, v, mask, part[1], limit=1)])[0]
    assert relative_error(part[0], dense) > 0.1
    assert relative_error(one, dense) < relative_error(part[0], dense) / 3


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_stripes_of_some_heads_at_a_time(monkeypatch, kv_heads):
    """The same to the bit; keys are brought to float32 once, and never those of all heads."""
    q, k, v, kept = (x.bfloat16() if x.is_floating_point() else x for x in problem(5, heads=4, kv_heads=kv_heads))
    mask = BlockMask.from_tile_map(kept, LAYOUT)
    _, lse = ops.attention(q, k, v, mask)
    monkeypatch.setattr(remainder, "GROUP", 2)
    whole = remainder.stripes(q, k, v, mask, lse, limit=8)
    share = k[:, 0].numel()
    monkeypatch.setattr(remainder, "WIDE_BYTES", 4 * 4 // kv_heads * share)

    class Wide(TorchDispatchMode):
        made = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            if func is torch.ops.aten._to_copy.default and out.dtype == torch.float32 and out.shape[2:] == k.shape[2:]:
                assert out.numel() == 4 // kv_heads * share
                self.made += out.numel()
            return out

    with Wide() as wide:
        parts = remainder.stripes(q, k, v, mask, lse, limit=8)
    assert wide.made == 4 * share  # each query head's keys once, whatever the groups of tiles
    for found, expected in zip(parts, whole, strict=True):
        assert torch.equal(found, expected)


def test_a_default_device_does_not_reach_the_draw():
    q, k, v, kept = problem()
    mask = BlockMask.from_tile_map(kept, LAYOUT)
    expected = remainder.sampled(q, k, v, mask)
    with torch.device("meta"):
        found = remainder.sampled(q, k, v, mask)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_stripes_are_monotone_in_theta_and_never_count_a_kept_key_twice():
    q, k, v, kept = problem(6)
    mask = BlockMask.from_tile_map(kept, LAYOUT)
    lse = remainder.attention(q, k, v, mask)[1]
    masses = [
        remainder.stripes(q, k, v, mask, lse, theta=theta, limit=LAYOUT.length)[1].exp()
        for theta in (-9, -1, 0, 1, 3, math.inf)
    ]
    for less, more in itertools.pairwise(masses):
        assert bool((more >= less - 1e-12).all())
    assert not masses[0].any()
    dropped = attention(q, k, v, ~token_mask(LAYOUT, kept))[1].exp()
    assert relative_error(masses[-1], dropped) < 1e-12


def test_stripes_are_judged_beside_what_the_tiles_reach():
    """The same amount on all logits changes neither the stripes nor their share."""
    q, k, v, kept = problem(6)
    mask, ones = BlockMask.from_tile_map(kept, LAYOUT), torch.ones_like(q[..., :1])
    found = []
    for shift in (0.0, 30.0, -30.0):
        query, key = torch.cat([q, ones], -1), torch.cat([k, shift * ones], -1)
        value = torch.cat([v, ones], -1)
        lse = remainder.attention(query, key, value, mask, scale=0.25)[1]
        found.append(remainder.stripes(query, key, value, mask, lse, 0.25, theta=3.5)[1] - shift * 0.25)
    assert found[0].isfinite().any()
    assert found[0].isneginf().any()
    assert torch.allclose(found[0], found[1])
    assert torch.allclose(found[0], found[2])


@pytest.mark.parametrize("quant", [Quant(), Quant("int8", "fp8", smooth_k=True)], ids=str)
def test_stripes_through_the_door(quant):
    q, k, v, kept = problem(7, heads=4, kv_heads=2)
    q, k, v = q.float(), k.float(), v.float()
    mask = BlockMask.from_tile_map(kept, LAYOUT)
    out, lse = remainder.attention(q, k, v, mask, quant, remainder="stripes")
    part = remainder.attention(q, k, v, mask, quant)
    expected, expected_lse = merge([part, remainder.stripes(q, k, v, mask, part[1])])
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
