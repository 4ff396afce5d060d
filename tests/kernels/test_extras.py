"""The Triton kernel's options, interpreted or on a GPU, against float64: grouped heads, q_len ≠ kv_len, biases and key masks,
the pooled remainder, split lists, turns; and the tile scores of `kernels/tile_scores.py`."""

import pytest
import torch
from device import DEVICE, moved, there
from oracle import LAYOUT, SCALE, check, draw, exact, hurtful

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from triton_check import block_sparse_attention

from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.quant import Quant
from fastdit.core.reference import relative_error, token_mask
from fastdit.kernels import cuda as kernels
from fastdit.kernels import tile_scores
from fastdit.kernels.cuda import lists_of
from fastdit.kernels.pack import Rows, _launch
from fastdit.policies import scores

antidiagonal, pooled = there(tile_scores.antidiagonal), there(tile_scores.pooled)
FORMATS = [Quant(), Quant("int8", "fp8", smooth_k=True), Quant("int4", "fp8", smooth_q=True, smooth_k=True, smooth_v=True)]


@pytest.mark.parametrize("quant", FORMATS, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads(quant, kv_heads):
    q, k, v, tile_map, masks = draw(4, kv_heads)
    check(block_sparse_attention(q, k, v, *masks, SCALE, quant), quant, q, k, v, tile_map)


@pytest.mark.parametrize("quant", FORMATS, ids=str)
def test_more_keys_than_queries(quant):
    """Queries of text alone, against all keys: the orders of a mask need not be of one sequence."""
    q, k, v, *_ = draw()
    q = q[:, :, :10]
    q_order = torch.cat([torch.arange(10), torch.full((6,), -1)]).view(1, 16)
    kept = torch.arange(LAYOUT.num_tiles) % 3 != 1
    index = (~kept).to(torch.int8).argsort(stable=True).to(torch.int32).view(1, 1, 1, -1)
    num = kept.sum(dtype=torch.int32).view(1, 1, 1)
    got = block_sparse_attention(q, k, v, num, index, q_order, LAYOUT.order(), SCALE, quant)
    rows = token_mask(LAYOUT, kept.expand(1, 1, LAYOUT.num_tiles, -1))[:, :, :10]
    check(got, quant, q, k, v, rows, q_order=q_order)


@pytest.mark.parametrize("quant", FORMATS[:2], ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_low_rank_bias(quant, shared):
    q, k, v, tile_map, masks = draw()
    left, right = torch.randn(2, 1, 1 if shared else 2, LAYOUT.length, 3, generator=torch.Generator().manual_seed(3)).unbind()
    got = block_sparse_attention(q, k, v, *masks, SCALE, quant, bias_q=left, bias_k=right)
    check(got, quant, q, k, v, tile_map, bias=(left @ right.mT).double())


def test_bias_by_position_survives_sixteen_bits():
    """ALiBi at video lengths: positions that bfloat16 rounds by hundreds and float16 cannot hold."""
    q, k, v, tile_map, masks = draw(dtype=torch.float16, share=1)
    far = 70_000 + torch.arange(LAYOUT.length, dtype=torch.float32)
    left = torch.stack([far / 64, torch.full_like(far, 1 / 64)], -1)[None, None] * -1
    right = torch.stack([torch.full_like(far, -1), far], -1)[None, None]
    bias = (far.double()[:, None] - far.double()) / 64
    torch.testing.assert_close((left.double() @ right.double().mT)[0, 0], bias)
    out, _ = block_sparse_attention(q, k, v, *masks, SCALE, Quant(), bias_q=left, bias_k=right)
    assert relative_error(out, exact(q, k, v, token_mask(LAYOUT, tile_map), bias)[0]) < 2e-3


@pytest.mark.parametrize("quant", FORMATS, ids=str)
def test_bias_of_a_key_is_its_number_and_a_mask(quant):
    q, k, v, tile_map, masks = draw()
    bias = torch.rand(1, 1, LAYOUT.length, 1, generator=torch.Generator().manual_seed(4))
    bias[:, :, ::5] = float("-inf")
    got = block_sparse_attention(q, k, v, *masks, SCALE, quant, bias_k=bias)
    check(got, quant, q, k, v, tile_map, bias=bias.mT.double())


def test_log_n_equals_n_equal_keys():
    layout = Layout((1, 8, 8), (1, 8, 8))
    q, k, v = (x.clone() for x in hurtful(1, 1, 64, 32, torch.float32))
    k[:, :, 1:8], v[:, :, 1:8] = k[:, :, :1], v[:, :, :1]
    m = BlockMask.from_tile_map(torch.ones(1, 1, 1, 1, dtype=torch.bool), layout)
    whole = block_sparse_attention(q, k, v, m.kv_num_blocks, m.kv_indices, m.q_order, m.k_order, SCALE, Quant())
    one = torch.zeros(1, 1, 64, 1)
    one[:, :, 0], one[:, :, 1:8] = torch.tensor(8.0).log(), float("-inf")
    merged = block_sparse_attention(q, k, v, m.kv_num_blocks, m.kv_indices, m.q_order, m.k_order, SCALE, Quant(), bias_k=one)
    for got, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quant", FORMATS, ids=str)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_pooled_remainder(quant, share):
    q, k, v, tile_map, masks = draw(share=share)
    got = block_sparse_attention(q, k, v, *masks, SCALE, quant, pooled=True)
    check(got, quant, q, k, v, tile_map, pooled=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quant", [Quant(), Quant("int8", smooth_k=True)], ids=str)
def test_pooled_remainder_in_16_bits_keeps_what_keys_have_in_common(quant, dtype):
    """Channels with a mean of twenty times their spread: rounded with it, means of tiles would lose what tells them apart."""
    q, k, v, tile_map, masks = draw(share=0.13)
    k = k + 20 * torch.randn(k.shape[-1], generator=torch.Generator().manual_seed(7))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    out, lse = block_sparse_attention(q, k, v, *masks, SCALE, quant, pooled=True)
    expected, expected_lse = exact(q, k, v, token_mask(LAYOUT, tile_map), pooled=True)
    assert relative_error(out, expected) < (0.004 if quant.is_none else 0.02)
    assert (lse - expected_lse).abs().max() < (0.002 if quant.is_none else 0.01)


def test_pooled_remainder_of_equal_keys_is_exact():
    """Keys and values that are equal inside each tile: nothing is lost, whatever is dropped."""
    q, k, v, tile_map, masks = draw(share=0.3)
    tiles = LAYOUT.order()
    for x in (k, v):
        for tile in tiles:
            x[:, :, tile[tile >= 0]] = x[:, :, tile[:1]]
    got = block_sparse_attention(q, k, v, *masks, SCALE, Quant(), pooled=True)
    check(got, Quant(), q, k, v, torch.ones_like(tile_map))


@pytest.mark.parametrize("quant", FORMATS, ids=str)
@pytest.mark.parametrize(("splits", "pooled"), [(2, False), (3, True), (7, True)])
def test_split_lists_merge_exactly(quant, splits, pooled):
    q, k, v, _, masks = draw()
    whole = block_sparse_attention(q, k, v, *masks, SCALE, quant, pooled=pooled, splits=1)
    parts = block_sparse_attention(q, k, v, *masks, SCALE, quant, pooled=pooled, splits=splits)
    # P is rounded against another maximum in each part, so eight-bit answers agree to its rounding only.
    assert relative_error(parts[0], whole[0]) < (1e-6 if quant.is_none else 0.03)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-5, atol=1e-5)


def test_heads_take_turns_when_the_bias_of_tiles_is_too_large(monkeypatch):
    q, k, v, _, masks = draw(4, 2)
    quant = FORMATS[2]
    whole = block_sparse_attention(q, k, v, *masks, SCALE, quant)
    monkeypatch.setattr(kernels, "BIAS_BYTES", 1)
    calls = []
    monkeypatch.setattr(kernels, "lists_of", lambda *x: calls.append(x[5]) or lists_of(*x))
    for got, expected in zip(block_sparse_attention(q, k, v, *masks, SCALE, quant), whole, strict=True):
        torch.testing.assert_close(got, expected)
    assert calls == [2, 2]


def test_inference_mode():
    """Whose tensors count no versions."""
    expected = block_sparse_attention(*draw()[:3], *draw()[-1], SCALE, Quant())
    with torch.inference_mode():
        q, k, v, _, masks = draw()
        for _ in range(2):
            for got, exact in zip(block_sparse_attention(q, k, v, *masks, SCALE, Quant()), expected, strict=True):
                assert torch.equal(got, exact)


def test_lists_are_kept_and_never_stale():
    num, index, _, order = map(moved, draw()[-1])
    first = lists_of(num, index, order, 32, 1, 2, True)
    assert lists_of(num, index, order, 32, 1, 2, True) is first
    assert lists_of(num, index, order, 32, 2, 2, True) is not first
    num.fill_(1)
    again = lists_of(num, index, order, 32, 1, 2, True)
    assert (again.whole <= 1).all()
    count = (order >= 0).sum(-1)
    for row, whole, ordered in zip(num.flatten(), again.whole.flatten(), again.index.flatten(0, 2), strict=True):
        assert (count[ordered[:whole].long()] == 32).all()
        assert (count[ordered[whole:row].long()] < 32).all()
    entries = len(kernels._known)
    del index, first, again, ordered
    assert len(kernels._known) == entries - 1


def test_long_lists_first():
    num = moved(torch.tensor([[[1, 3]], [[2, 3]]], dtype=torch.int32))
    index = moved(torch.zeros(2, 1, 2, 4, dtype=torch.int32))
    lists = lists_of(num, index, moved(torch.zeros(4, 16, dtype=torch.long)), 16, 2, 1, False)
    assert lists.schedule.tolist() == [1, 3, 2, 0]


def brute_force(q, k, stride):
    """Antidiagonal mass of each pair of tiles, cell by cell."""
    layout = LAYOUT
    q, k = (layout.to_tiles(x.double()) for x in (q, k))
    B, H, T, n, D = q.shape
    cells = n // stride
    q, k = (x.reshape(B, H, T * cells, stride, D) for x in (q, k))
    logits = sum(q[:, :, :, stride - 1 - s] @ k[:, :, :, s].mT for s in range(stride)) * SCALE / stride
    live = (layout.order() >= 0).view(T * cells, stride).any(-1)
    p = logits.masked_fill(~live, float("-inf")).softmax(-1).view(B, H, T, cells, T, cells).sum(-1)
    return (p * live.view(T, cells, 1)).sum(3) / live.view(T, cells).sum(1)[:, None]


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_antidiagonal_scores(stride):
    q, k, *_ = draw()
    got = antidiagonal(LAYOUT.to_tiles(q), LAYOUT.to_tiles(k), LAYOUT.order() >= 0, stride, SCALE)
    torch.testing.assert_close(got, brute_force(q, k, stride).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.sum(-1), torch.ones(1, 2, LAYOUT.num_tiles))


def test_pooled_scores():
    q, k, *_ = draw()
    tiles, real = LAYOUT.order(), (LAYOUT.order() >= 0)[..., None]
    means = [(LAYOUT.to_tiles(x.double()) * real).sum(3) / LAYOUT.counts()[:, None] for x in (q, k)]
    expected = ((means[0] @ means[1].mT) * SCALE + LAYOUT.counts().log()).softmax(-1)
    got = pooled(q, k, tiles, tiles, SCALE)
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-6)


def test_a_policys_pooled_mass_is_the_kernels():
    """What `scores.pooled` calls on a GPU: on tensors in tile order already, it is what eager float32 says on the CPU."""
    layout = Layout((5, 7, 10), (2, 3, 4))
    q, k = torch.randn(2, 2, 3, layout.length, 32, generator=torch.Generator().manual_seed(4)).unbind()
    q, k = (layout.to_tiles(x)[:, :, : layout.video_tiles] for x in (q, k))
    flat = scores._flat(layout, q.device)
    expected = scores.pooled(q, k, layout)
    torch.testing.assert_close(pooled(q.flatten(2, 3), k.flatten(2, 3), flat, flat), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(scores.pooled(q.to(DEVICE), k.to(DEVICE), layout).cpu(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu  # the CPU's own path is eager
def test_pooled_mass_on_a_gpu_makes_no_wide_copy():
    layout = Layout((8, 32, 32), (2, 8, 8))
    q, k = torch.randn(2, 1, 8, layout.video_tiles, 128, 128, device=DEVICE, dtype=torch.bfloat16).unbind()
    scores.pooled(q, k, layout)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    scores.pooled(q, k, layout)
    assert torch.cuda.max_memory_allocated() - before < q.nbytes // 2


def test_measuring_writes_nothing():
    x = torch.randn(1, 2, LAYOUT.length, 32, device=DEVICE)
    rows = Rows.of(LAYOUT.order().shape[1])
    measured = _launch(x, LAYOUT.order(DEVICE), rows, "copy", "none", 32, None, None, "measure", True)
    assert measured.data.nbytes == 0
    expected = (LAYOUT.to_tiles(x)).sum(3) / LAYOUT.counts(x.device)[:, None]
    torch.testing.assert_close(measured.tile_mean.view_as(expected), expected, rtol=1e-4, atol=1e-5)


def test_scores_find_a_planted_tile():
    """An antidiagonal finds single keys that means wash out."""
    layout = Layout((1, 16, 16), (1, 8, 8))
    q, k = torch.randn(2, 1, 1, 256, 32, generator=torch.Generator().manual_seed(1)).unbind()
    tiles = layout.order()
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2))
    q[0, 0, tiles[0]] += 2 * direction
    k[0, 0, tiles[3, :8]] += 2 * direction
    k[0, 0, tiles[3, 8:]] -= 2 / 7 * direction
    assert pooled(q, k, tiles, tiles)[0, 0, 0, 3] < 0.5
    assert antidiagonal(layout.to_tiles(q), layout.to_tiles(k), tiles >= 0, 8)[0, 0, 0, 3] > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_nothing_depends_on_the_default_dtype(dtype):
    q, k, v, _, masks = draw()
    tiled = [LAYOUT.to_tiles(x) for x in (q, k)]

    def answers():
        found = [pooled(q, k, LAYOUT.order(), LAYOUT.order()), antidiagonal(*tiled, LAYOUT.order() >= 0, 4)]
        for quant in (FORMATS[2], Quant("fp8", "fp8", granularity="head")):
            found += block_sparse_attention(q, k, v, *masks, SCALE, quant)
        return [*found, *block_sparse_attention(q, k, v, *masks, SCALE, Quant(), pooled=True)]

    expected = answers()
    torch.set_default_dtype(dtype)
    try:
        found = answers()
    finally:
        torch.set_default_dtype(torch.float32)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)
