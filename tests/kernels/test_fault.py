"""The flag that a kernel raises when it stores something not finite, and the dense launch that repairs the answer, interpreted
or on a GPU, against float64."""

import pytest
import torch
from device import DEVICE, moved
from oracle import ROUNDING, hurtful

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.quant import Quant
from fastdit.core.reference import attention, merge, relative_error
from fastdit.kernels import cpu, parts
from fastdit.kernels import cuda as kernels

LAYOUT = Layout((2, 4, 8), (1, 4, 8), text_len=5)  # two whole tiles, and one that lacks tokens
SCALE = 0.2
FORMATS = [
    Quant(),
    Quant("fp8", "fp8"),
    Quant("int4", "fp8", smooth_q=True, smooth_k=True, smooth_v=True),
    Quant("int8", "int8", smooth_k=True, smooth_v=True, granularity="head"),
]
OPTIONS = {"plain": {}, "pooled": {"pooled": True}, "split": {"splits": 2}}
"""Each has another kernel that writes the answer."""
FIRST = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)[None, None]
"""All attend the first tile, one the second, none the text."""
every = pytest.mark.parametrize("quant", FORMATS, ids=str), pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def masks_of(tile_map, at=None):
    m = BlockMask.from_tile_map(tile_map, LAYOUT)
    m = m if at is None else m.for_queries(at)
    return tuple(map(moved, (m.kv_num_blocks, m.kv_indices, m.q_order, m.k_order)))


def flag(value=0):
    """One of three flags: the others must stay as they are, and it does not lie at a multiple of 16 bytes."""
    return torch.tensor([77, value, 77], dtype=torch.int32, device=DEVICE)


def run(q, k, v, masks, quant, **options):
    """(out, lse, flag) on the tests' device."""
    flags = flag()
    out, lse = kernels.block_sparse_attention(q, k, v, *masks, SCALE, quant, fault=flags[1:2], **options)
    assert flags[::2].tolist() == [77, 77]
    return out, lse, int(flags[1])


def finite(out, lse):
    return bool(out.isfinite().all()) and bool((lse < float("inf")).all())


def repaired(q, k, v, out, lse, value, scale=SCALE):
    """The answer after the repair, written into a view with NaN around it, [B, N, H, D] in memory."""
    B, H, N, D = out.shape
    memory = torch.full((B, N + 1, H, D + 3), float("nan"), dtype=out.dtype, device=DEVICE)
    view = memory[:, 1:, :, :D].transpose(1, 2).copy_(out)
    flags, lse = flag(value), lse.clone()
    kernels.repair(q, k, v, view, scale, flags[1:2], lse)
    assert flags[::2].tolist() == [77, 77]
    assert memory[:, 0].isnan().all()
    assert memory[..., D:].isnan().all()
    return view, lse, int(flags[1])


def check(got, q, k, v, scale=SCALE):
    out, lse = (x.cpu() for x in got[:2])
    q, k, v = (x.cpu().double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.mT * scale
    exact, exact_lse = logits.softmax(-1) @ v, logits.logsumexp(-1)  # not `attention`: at 10³⁵ its LSE swallows the sum
    rounding = ROUNDING[out.dtype]
    assert relative_error(out, exact) <= rounding
    assert abs(float(out.double().norm() / exact.norm()) - 1) <= rounding
    # Products of 16 bits are exact and added up in float32, those of float32 are to 2⁻²⁰ of the largest score.
    assert (lse - exact_lse).abs().max() <= 2**-18 * (1 + exact_lse.abs().max())


def draw(dtype=torch.float16, dim=32, heads=2, seed=0):
    return [moved(x) for x in hurtful(1, heads, LAYOUT.length, dim, dtype, seed)]


PLANTS = {
    "nothing": lambda q, k, v: None,
    "inf in V": lambda q, k, v: v[0, 1, LAYOUT.order()[0, 3], 5].fill_(float("inf")),
    "NaN in V": lambda q, k, v: v[0, 0, LAYOUT.order()[1, 2], 7].fill_(float("nan")),
    "inf in V of the text": lambda q, k, v: v[0, 1, LAYOUT.order()[2, 1], 0].fill_(float("inf")),
    "NaN in a channel of K": lambda q, k, v: k[0, 1, LAYOUT.order()[0, 0], 9].fill_(float("nan")),
    "NaN in Q": lambda q, k, v: q[0, 0, LAYOUT.order()[2, 0], 0].fill_(float("nan")),
}


@every[0]
@every[1]
def test_the_flag_is_up_where_the_answer_is_not_finite_and_only_there(quant, options):
    masks, up = masks_of(FIRST), {}
    for name, plant in PLANTS.items():
        q, k, v = draw()
        plant(q, k, v)
        out, lse, raised = run(q, k, v, masks, quant, **options)
        assert raised == (0 if finite(out, lse) else 1), name
        up[name] = raised
    nobody = 0 if quant.pv == "none" and "pooled" not in options else 1  # a scale, and a mean, are of all that there is
    assert up == dict.fromkeys(PLANTS, 1) | {"nothing": 0, "inf in V of the text": nobody}


def test_a_flag_is_of_some_queries_as_of_all():
    """A rank of a ring has every other token; only head 1 of it sees what is wrong, and what is wrong is in the last row."""
    q, k, v = draw()
    at = torch.arange(1, LAYOUT.length, 2)
    q[0, 1, at[-1]] = float("nan")
    for some, expected in ((at, 1), (at[:-1], 0)):
        out, lse, raised = run(q[:, :, some], k, v, masks_of(FIRST, some), Quant())
        assert (raised, finite(out, lse)) == (expected, not expected)


@every[0]
@every[1]
def test_what_went_wrong_inside_is_repaired(quant, options, monkeypatch):
    """Inputs are sound and the packed keys of a tile are not: in 16 bits a NaN, in eight a scale of infinity."""
    pack, calls = kernels.pack, []

    def broken(x, order, *rest, **more):
        packed = pack(x, order, *rest, **more)
        calls.append(packed)
        if len(calls) == 1:  # K
            (packed.data[0, 0] if packed.scale is None else packed.scale[0]).fill_(float("inf"))
        return packed

    monkeypatch.setattr(kernels, "pack", broken)
    q, k, v = draw(torch.bfloat16)
    out, lse, raised = run(q, k, v, masks_of(FIRST), quant, **options)
    assert calls
    assert (raised, finite(out, lse)) == (1, False)
    got = repaired(q, k, v, out, lse, raised)
    assert got[2] == 1
    check(got, q, k, v)


OVERFLOWS = {
    "mean of K": (Quant("int8", smooth_k=True), torch.bfloat16),
    "sum of V": (Quant("none", "fp8"), torch.bfloat16),
    "rounding of P": (Quant("none", "fp8"), torch.float16),
}


@pytest.mark.parametrize("name", OVERFLOWS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_overflows_of_a_format_are_repaired(name, options):
    """Finite inputs of which the format makes infinities, and the inputs' own type does not."""
    quant, dtype = OVERFLOWS[name]
    q, k, v = draw(dtype)
    if name == "mean of K":  # where no query looks
        k[..., 4], q[..., 4] = 2e38, 0
    elif name == "sum of V":
        v[..., :8, 3] = 6e37
        q *= 0.1
        q[..., 1], k[..., 1], k[..., 20, 1] = 1, 0, 20  # the eight are not what is attended most
    else:
        v[..., 6] = 65504
    out, lse, raised = run(q, k, v, masks_of(torch.ones_like(FIRST)), quant, **options)
    assert (raised, finite(out, lse)) == (1, False)
    if name == "rounding of P":
        v[..., 6] = 65000  # a half-precision P may round up to infinity as well
    got = repaired(q, k, v, out, lse, raised)
    assert got[2] == 1
    check(got, q, k, v)


@pytest.mark.parametrize("quant", FORMATS, ids=str)
def test_broken_inputs_stay_broken_and_say_so(quant):
    q, k, v = draw()
    v[0, 1, 3, 5] = float("inf")
    out, lse, raised = run(q, k, v, masks_of(FIRST), quant)
    got, _, value = repaired(q, k, v, out, lse, raised)
    assert value == 3
    assert not got[0, 1, :, 5].isfinite().any()
    assert got[0, 0].isfinite().all()


@pytest.mark.parametrize("value", [0, 2])
def test_a_flag_that_is_down_leaves_the_answer_to_the_bit(value):
    q, k, v = draw()
    out = torch.randn(q.shape, device=DEVICE).half()
    out[0, 0, 3, 4], out[0, 1, 5, 6] = float("nan"), float("inf")
    lse = torch.randn(q.shape[:3], device=DEVICE)
    got, total, after = repaired(q, k, v, out, lse, value)
    assert torch.equal(got.contiguous().view(torch.int16), out.view(torch.int16))
    assert torch.equal(total, lse)
    assert after == value


@pytest.mark.parametrize("dtype", ROUNDING, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    ("dim", "heads", "kv_heads", "n_q", "n_k"),
    [(16, 1, 1, 69, 69), (40, 4, 2, 7, 130), (128, 2, 1, 67, 9)],
)
def test_repair_of_any_shape(dtype, dim, heads, kv_heads, n_q, n_k):
    """Grouped heads, more keys than queries and fewer, numbers that fill no block; what was there before is NaN throughout."""
    q, k, v = (moved(x) for x in hurtful(2, heads, max(n_q, n_k), dim, dtype))
    q, k, v = q[:, :, :n_q], k[:, :kv_heads, :n_k], v[:, :kv_heads, -n_k:]
    got = repaired(q, k, v, torch.full_like(q, float("nan")), q.new_full(q.shape[:3], float("nan"), dtype=torch.float32), 1)
    assert got[2] == 1
    check(got, q, k, v)


def test_repair_of_channels_that_do_not_lie_together():
    q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in draw(torch.float32))
    out = torch.full_like(q, float("nan"))
    assert q.stride(-1) == out.stride(-1) == LAYOUT.length
    kernels.repair(q, k, v, out, SCALE, flags := flag(1)[1:2])
    assert int(flags) == 1
    assert relative_error(out, attention(q.double(), k.double(), v.double(), scale=SCALE)[0]) <= ROUNDING[torch.float32]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_beyond_sixteen_bits(dtype, sign):
    """Scores of 10⁵, in bfloat16 of 10³⁴, all of one sign: below any finite floor, and float16 could hold none."""
    q, k, v = draw(dtype)
    large = 1e3 if dtype == torch.float16 else 2.0**58
    q[..., 0], k[..., 0] = large, sign * large
    q[..., 1:] = 0
    k[..., ::2, 0] *= 0.5  # their scores are half as large: half of the keys has all the weight
    out, lse = torch.full_like(q, float("nan")), q.new_full(q.shape[:3], float("nan"), dtype=torch.float32)
    got = repaired(q, k, v, out, lse, 1)
    assert got[2] == 1
    check(got, q, k, v)


def test_parts_are_joined_as_the_reference_does():
    generator = torch.Generator().manual_seed(0)
    found, lses = torch.randn(3, 2, 2, 37, 24, generator=generator), 4 * torch.randn(3, 2, 2, 37, generator=generator)
    lses[0, :, :, :9] = lses[1:, :, :, 5:7] = float("-inf")  # rows that one part, and that none has seen
    found[lses.isneginf()] = 0
    expected, total = merge(list(zip(found.double(), lses.double(), strict=True)))
    out = torch.full((2, 37, 2, 24), float("nan"), device=DEVICE).transpose(1, 2)
    lse = torch.full((2, 2, 37), float("nan"), device=DEVICE)
    parts.merge(moved(found), moved(lses), out, lse, flags := flag()[1:2])
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse.cpu().double(), total, rtol=1e-6, atol=1e-6)
    assert int(flags) == 0
    for x, bad in ((found, float("nan")), (found, float("inf")), (lses, float("nan"))):
        x = x.clone().index_put_((torch.tensor(1), torch.tensor(1), torch.tensor(0), torch.tensor(36)), torch.tensor(bad))
        broken = (x, lses) if x.ndim == 5 else (found, x)
        parts.merge(*map(moved, broken), out, lse, flags := flag()[1:2])
        assert int(flags) == 1
        assert not finite(out[1, 0, 36], lse[1, 0, 36])
        assert finite(out[0], lse[0])


@pytest.mark.parametrize("quant", FORMATS[:2], ids=str)
def test_the_cpu_raises_and_repairs_alike(quant):
    def down():
        return torch.zeros((), dtype=torch.int32)

    for dtype in (torch.float32, torch.float64):
        q, k, v = (x.cpu() for x in draw(torch.float32))
        q, k, v = (x.to(dtype) for x in (q, k, v))
        for broken in (False, True):
            if broken:
                q[0, 0, 3, 2] = float("nan")
            for pooled in (False, True):
                masks = tuple(x.cpu() for x in masks_of(FIRST))
                out, lse = cpu.block_sparse_attention(q, k, v, *masks, SCALE, quant, pooled=pooled, fault=(raised := down()))
                assert int(raised) == (0 if finite(out, lse) else 1) == broken
            out, lse = cpu.dense_attention(q, k, v, SCALE, quant, fault=(raised := down()))
            assert int(raised) == broken
            cpu.repair(q, k, v, out, SCALE, raised, lse)
            assert int(raised) == 3 * broken
        q = q.nan_to_num(0.5)
        out, lse, raised = torch.full_like(q, float("nan")), torch.zeros(q.shape[:3], dtype=dtype), down() + 1
        cpu.repair(q, k, v, out, SCALE, raised, lse)
        assert int(raised) == 1
        for got, exact in zip((out, lse), attention(q.double(), k.double(), v.double(), scale=SCALE), strict=True):
            assert relative_error(got, exact) <= ROUNDING[torch.float32]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("quant", FORMATS, ids=str)
def test_nobody_waits_and_a_graph_captures_it(quant):
    """Captured once, replayed with inputs that are sound, that break the format, and that are broken."""
    masks, flags = masks_of(torch.ones_like(FIRST)), flag()[1:2]
    inputs = draw(torch.bfloat16)
    fresh = [x.clone() for x in inputs]

    def call():
        flags.zero_()
        out, lse = kernels.block_sparse_attention(*inputs, *masks, SCALE, quant, fault=flags)
        kernels.repair(*inputs, out, SCALE, flags, lse)
        return out, lse

    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = call()
    graph.replay()
    assert int(flags) == 0
    assert out.isfinite().all()
    inputs[2][0, 0, 3, 5] = float("nan")
    graph.replay()
    assert int(flags) == 3
    for x, y in zip(inputs, fresh, strict=True):
        x.copy_(y)
    if quant.smooth_k:
        inputs[1][..., 4], inputs[0][..., 4] = 2e38, 0
        graph.replay()
        assert int(flags) == 1
        assert out.isfinite().all()
