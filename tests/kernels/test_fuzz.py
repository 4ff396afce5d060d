"""Random shapes, strides, masks, block maps and options through the CPU path and the Triton kernels, against float64.

Memory that nobody wrote is NaN here, so an answer that was never written, or a read outside of what was, shows. The long run
is `pytest -m slow tests/kernels/test_fuzz.py`.
"""

import pytest
import torch
from device import there
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.quant import Quant
from fastdit.core.reference import relative_error, token_mask
from fastdit.kernels import cpu
from fastdit.kernels import cuda as triton_kernels

PLAIN = [Quant()]
FORMATS = [
    Quant("fp8", "fp8"),
    Quant("int8", "fp8", smooth_k=True),
    Quant("int8", "int8", smooth_k=True, smooth_v=True, granularity="head"),
    Quant("int4", smooth_q=True, smooth_k=True),
    Quant("none", "int8", smooth_v=True),
]


@pytest.fixture(autouse=True, scope="module")
def poison():
    """torch.empty gives NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@st.composite
def problems(draw):
    """q, k, v of any strides, a tile map, and options."""
    side = st.integers(1, 4)
    layout = Layout(*(draw(st.tuples(side, side, side)) for _ in range(2)), draw(st.integers(0, 5)), draw(st.booleans()))
    batch, kv_heads, group, dim = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 20)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    heads = kv_heads * group

    def tensor(h):
        """A view [B, h, N, dim] of a larger buffer of NaN whose sides lie in any order."""
        sides, order = [batch, h, layout.length, dim], draw(st.permutations(range(4)))
        slack = draw(st.integers(0, 2))
        buffer = torch.full([sides[i] + slack for i in order], float("nan"))
        view = buffer.permute([order.index(i) for i in range(4)])[:batch, :h, : layout.length, slack : slack + dim]
        wide = draw(st.sampled_from([0.0, 1.0, 1.0, 1.0, 8.0]))
        return view.copy_(torch.randn(batch, h, layout.length, dim, generator=generator) * wide + draw(st.sampled_from([0, 2])))

    shape = (draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), layout.num_tiles, layout.num_tiles)
    tile_map = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    options, bias = {}, None
    kind = draw(st.sampled_from(["", "", "pooled", "low rank", "key"]))
    if kind == "pooled":
        options["pooled"] = True
    elif kind:
        right = torch.randn(draw(st.sampled_from([1, batch])), 1, layout.length, 1 if kind == "key" else 3, generator=generator)
        left = torch.randn(1, draw(st.sampled_from([1, heads])), layout.length, 3, generator=generator)
        if kind == "key":
            right[torch.rand(right.shape, generator=generator) < 0.2] = float("-inf")
            options, bias = {"bias_k": right}, right.mT.double()
        else:
            options, bias = {"bias_q": left, "bias_k": right}, (left @ right.mT).double()
    return layout, tensor(heads), tensor(kv_heads), tensor(kv_heads), tile_map, options, bias


def truth(layout, q, k, v, tile_map, bias, pooled, scale):
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = (q @ k.mT) * scale + (0 if bias is None else bias)
    logits = logits.masked_fill(~token_mask(layout, tile_map), float("-inf"))
    if pooled:
        order = layout.order()
        means = [torch.stack([x[:, :, tile[tile >= 0]].mean(2) for tile in order], 2) for x in (k, v)]
        far = (q @ means[0].mT) * scale + layout.counts().double().log()
        dropped = token_mask(layout, ~tile_map)[..., order[:, 0]]
        logits, v = torch.cat([logits, far.masked_fill(~dropped, float("-inf"))], -1), torch.cat([v, means[1]], 2)
    lse = logits.logsumexp(-1)
    return (logits - lse.masked_fill(lse.isneginf(), 0)[..., None]).exp() @ v, lse


def check(problem, quant, splits):
    layout, q, k, v, tile_map, options, bias = problem
    m = BlockMask.from_tile_map(tile_map, layout)
    arguments = (q, k, v, m.kv_num_blocks, m.kv_indices, m.q_order, m.k_order, 0.3, quant)
    expected, expected_lse = truth(layout, q, k, v, tile_map, bias, options.get("pooled", False), 0.3)
    seen = ~expected_lse.isneginf()
    emulated = cpu.block_sparse_attention(*arguments, **options)
    compiled = there(triton_kernels.block_sparse_attention)(*arguments, **options, splits=splits)
    for out, lse in (emulated, compiled):
        assert out.isfinite().all()
        assert not lse.isnan().any()
        assert torch.equal(lse.isneginf(), ~seen)
        assert not out[~seen].any()
    allowed = relative_error(emulated[0], expected)
    assert quant.is_none <= (allowed < 1e-4)
    # The emulation rounds P against a row's maximum over all keys, a part of a list against its own: never coarser.
    assert relative_error(compiled[0], expected) <= 2 * allowed + (1e-4 if quant.pv == "none" else 0.02)
    if seen.any():
        off = [float((lse - expected_lse)[seen].abs().max()) for _, lse in (emulated, compiled)]
        assert off[1] <= 2 * off[0] + 1e-3


few = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
many = settings(deadline=None, max_examples=1500, suppress_health_check=list(HealthCheck))
parts = st.sampled_from([1, 1, 1, 2, 3])


@given(problem=problems(), splits=parts)
@few
def test_any_problem(problem, splits):
    check(problem, Quant(), splits)


@given(problem=problems(), quant=st.sampled_from(FORMATS), splits=parts)
@few
def test_any_problem_in_any_format(problem, quant, splits):
    check(problem, quant, splits)


@pytest.mark.slow
@given(problem=problems(), quant=st.sampled_from(PLAIN + FORMATS), splits=parts)
@many
def test_thousands_of_problems(problem, quant, splits):
    check(problem, quant, splits)
