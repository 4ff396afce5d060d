"""Statistics kept from step to step: Re-ttention's properties, its limits, and what they may take of memory."""

from dataclasses import replace

import pytest
import torch
from util import Largest

from fastdit import Window, ops
from fastdit.approx import placement, residual_store, step_cache
from fastdit.approx.residual_store import Stored
from fastdit.approx.step_cache import Memory
from fastdit.config import KINDS, Reuse
from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.quant import Quant
from fastdit.core.reference import attention, relative_error, token_mask
from fastdit.planning.forward_plan import CallPlan

LAYOUT = Layout((4, 6, 6), (1, 3, 3))
KEPT = Window(size=(1, 3, 3)).select(LAYOUT)


def tensors(seed=0, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, LAYOUT.length, 16, dtype=torch.float64, generator=generator) * scale for _ in range(3)]


def plan_of(kept=KEPT):
    return CallPlan(0, density=0.25, block_mask=BlockMask.from_tile_map(kept, LAYOUT))


def call(reuse, held, q, k, v, plan=None):
    return step_cache.attention(q, k, v, plan or plan_of(), reuse, held, None, lambda: attention(q, k, v)[0])


def exactly(**fields):
    return Reuse(**{"store": "float32", "refresh": 100} | fields)


def test_refresh_is_dense_and_the_residual_is_what_was_dropped():
    q, k, v = tensors()
    held = Memory()
    out, how = call(exactly(kind="retention"), held, q, k, v)
    full, lse = attention(q, k, v)
    mask = token_mask(LAYOUT, KEPT)
    assert how == "refresh"
    assert relative_error(out, full) < 1e-12
    part, part_lse = attention(q, k, v, mask)
    ratio = (part_lse - lse).exp()
    assert torch.allclose(held.ratio, ratio, atol=1e-12)
    assert ((held.ratio > 0) & (held.ratio <= 1)).all()
    assert held.ratio.shape == q.shape[:3]
    weights = ((q @ k.mT) * 16**-0.5 - lse[..., None]).exp()
    assert torch.allclose(held.ratio, (weights * mask).sum(-1), atol=1e-12)  # the LSE formula is the ratio of sums
    dropped = (weights * ~mask) @ v
    assert relative_error(held.kept.load(q), dropped) < 1e-6  # kept in float32
    assert relative_error(full, ratio[..., None] * part + dropped) < 1e-12


def test_same_inputs_give_dense_again_and_the_ramp_adds_what_it_says():
    q, k, v = tensors(1)
    full, part = attention(q, k, v)[0], attention(q, k, v, token_mask(LAYOUT, KEPT))[0]
    held = Memory()
    call(exactly(kind="retention", ramp=0), held, q, k, v)
    for _ in range(5):
        out, how = call(exactly(kind="retention", ramp=0), held, q, k, v)
        assert how == "reuse"
        assert relative_error(out, full) < 1e-6
    held, ramp = Memory(), 0.01
    call(exactly(kind="retention", ramp=ramp), held, q, k, v)
    for n in range(4):
        out, _ = call(exactly(kind="retention", ramp=ramp), held, q, k, v)
        added = ((held.ratio + n * ramp).clamp(max=1) - held.ratio)[..., None] * part
        assert relative_error(out - full, added) < 1e-5 or n == 0
        assert n > 0 or relative_error(out, full) < 1e-6  # the first sparse step uses ρ itself


def test_a_ratio_is_never_above_one():
    """Neither where rounded logits say so, nor where the ramp leads there."""
    q, k, v = tensors(1)
    held, plan = Memory(), replace(plan_of(torch.ones_like(KEPT)), quant=Quant("int4"))
    call(exactly(kind="retention"), held, q, k, v, plan)
    assert held.ratio.max() == 1
    assert held.ratio.min() < 1
    held = Memory()
    call(exactly(kind="ratio", ramp=1), held, q, k, v)
    part = attention(q, k, v, token_mask(LAYOUT, KEPT))[0]
    assert relative_error(call(exactly(kind="ratio", ramp=1), held, q, k, v)[0], held.ratio[..., None] * part) < 1e-12
    assert relative_error(call(exactly(kind="ratio", ramp=1), held, q, k, v)[0], part) < 1e-12


def test_a_row_depends_on_its_own_query_alone():
    q, k, v = tensors(2)
    one, two = Memory(), Memory()
    call(exactly(kind="retention"), one, q, k, v)
    other = q.clone()
    other[:, :, 7] += 1
    call(exactly(kind="retention"), two, other, k, v)
    same = torch.arange(LAYOUT.length) != 7
    assert torch.equal(one.ratio[:, :, same], two.ratio[:, :, same])
    assert not torch.equal(one.ratio[:, :, 7], two.ratio[:, :, 7])


def test_nothing_dropped_nothing_remembered():
    q, k, v = tensors(3)
    held = Memory()
    call(exactly(kind="retention"), held, q, k, v, plan_of(torch.ones_like(KEPT)))
    assert torch.allclose(held.ratio, torch.ones(()).double())
    assert held.kept.load(q).abs().max() < 1e-6


def test_limits_are_the_baselines():
    """ρ = 1 is DiTFastAttn's O_sparse + (O_full − O_sparse); no window at all is the last dense output."""
    q, k, v = tensors(4)
    later = [x + 0.05 * y for x, y in zip((q, k, v), tensors(5), strict=True)]
    mask = token_mask(LAYOUT, KEPT)
    full, part, part_later = attention(q, k, v)[0], attention(q, k, v, mask)[0], attention(*later, mask)[0]
    for kind, expected in (("residual", part_later + full - part), ("broadcast", full)):
        held = Memory()
        call(exactly(kind=kind), held, q, k, v)
        assert relative_error(call(exactly(kind=kind), held, *later)[0], expected) < 1e-6
    held = Memory()
    call(exactly(kind="ratio"), held, q, k, v)
    assert held.kept is None
    assert relative_error(call(exactly(kind="ratio"), held, *later)[0], held.ratio[..., None] * part_later) < 1e-12


def test_order_of_errors_under_small_drift():
    """papers: at 5 % drift of random data, sparse alone > ratio > residual > Re-ttention (2.86, .95, .21, .08)."""
    q, k, v = tensors(6)
    later = [x + 0.05 * y for x, y in zip((q, k, v), tensors(7), strict=True)]
    truth = attention(*later)[0]
    errors = []
    for kind in ("none", "ratio", "residual", "retention"):
        held, reuse = Memory(), exactly(kind=kind, ramp=0)
        call(reuse, held, q, k, v)
        errors.append(relative_error(call(reuse, held, *later)[0], truth))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.15 < 0.5 < errors[1]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_refresh_comes_every_so_many_steps(kind):
    q, k, v = tensors(8)
    held = Memory()
    found = [call(Reuse(kind=kind, refresh=4), held, q, k, v)[1] for _ in range(9)]
    assert found == ["refresh", *["reuse"] * 3] * 2 + ["refresh"]


@pytest.mark.parametrize(("store", "error"), [("float32", 1e-6), ("bfloat16", 4e-3), ("fp8", 0.04)])
@pytest.mark.parametrize("host", [False, True])
def test_stores(store, error, host):
    x = torch.randn(2, 3, 50, 32) * torch.logspace(-6, 4, 50)[:, None]
    stored = Stored.of(x, store, host)
    back = stored.load(x)
    assert ((back - x).norm(dim=-1) / x.norm(dim=-1)).max() < error
    assert Memory(kept=stored).bytes() == x.numel() * {"float32": 4, "bfloat16": 2, "fp8": 1}[store] + (x.numel() // 32 * 4) * (
        store == "fp8"
    )
    assert Stored.of(torch.zeros(2, 8), store, host).load(x).eq(0).all()


@pytest.mark.gpu  # the host's memory is another one than the GPU's
def test_what_the_gpu_has_no_room_for_goes_to_the_host(monkeypatch):
    q, k, v = (x.float().cuda() for x in tensors(9))
    kept = BlockMask.from_tile_map(KEPT.cuda(), LAYOUT)
    for asked, room, expected in ((True, 1 << 40, "cpu"), (False, 1 << 40, "cuda"), (False, 0, "cpu")):
        monkeypatch.setattr(placement, "free_bytes", lambda device: room if device.type == "cuda" else 1 << 40)  # noqa: B023
        held = Memory()
        call(exactly(kind="residual", host=asked), held, q, k, v, replace(plan_of(), block_mask=kept))
        assert held.kept.data.device.type == expected
        assert held.kept.data.is_pinned() == (expected == "cpu")
        page_locked = 1 << (q.nbytes - 1).bit_length()  # what PyTorch takes for it
        assert held.bytes(torch.device("cpu")) == (page_locked if expected == "cpu" else 0)
        out, how = call(exactly(kind="residual", host=asked), held, q, k, v, replace(plan_of(), block_mask=kept))
        assert how == "reuse"
        assert relative_error(out, attention(q, k, v)[0]) < 1e-3


def test_what_does_not_fit_is_not_remembered(monkeypatch):
    q, k, v = tensors(9)
    held = Memory()
    monkeypatch.setattr(placement, "free_bytes", lambda device: 1000)
    out, how = call(Reuse(kind="retention"), held, q, k, v)
    assert how == "dense"
    assert "no room" in held.no_room
    assert held.bytes() == 0
    assert relative_error(out, attention(q, k, v)[0]) < 1e-12
    assert call(Reuse(kind="retention"), held, q, k, v)[1] == "dense"


def test_all_together_never_take_more_than_half_of_what_was_free(monkeypatch):
    """Sites that come first have their statistics, the others stay dense; R and its scales and ratios are all counted."""
    q, k, v = tensors(9)
    free, sites = 100_000, [Memory() for _ in range(8)]
    monkeypatch.setattr(placement, "free_bytes", lambda device: free - sum(site.bytes(device) for site in sites))

    def held(device):
        return sum(site.bytes(device) for site in sites)

    reuse = Reuse(kind="retention", store="fp8")
    hows = [step_cache.attention(q, k, v, plan_of(), reuse, site, None, lambda: q, held)[1] for site in sites]
    one = sites[0].bytes()
    assert one == q.numel() + q.numel() // 16 * (4 + 8)  # float64 has ratios of its own width
    assert hows == ["refresh"] * (free // 2 // one) + ["dense"] * (8 - free // 2 // one)
    assert held(None) == held(torch.device("cpu")) <= free // 2
    assert held(torch.device("meta")) == 0


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("store", ["bfloat16", "fp8"])
def test_in_pieces_it_is_the_same_to_the_bit_and_small(monkeypatch, kind, store):
    """One head at a time, of tensors that lie as [B, N, H, D] as the pipelines' do; nothing wide of all heads is ever made."""
    q, k, v = (x.bfloat16().transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(10))
    (full, lse_full), (less, lse) = (ops.attention(q, k, v, mask) for mask in (None, plan_of().block_mask))
    ratio = (lse - lse_full).exp().clamp(max=1)[..., None]
    residual = full.float() - (ratio if kind == "retention" else 1) * less.float()
    kept = full if kind == "broadcast" else residual
    if store == "fp8":
        scale = kept.abs().amax(-1, keepdim=True).float().div(448)
        kept = (kept / scale).to(torch.float8_e4m3fn).float() * scale
    kept = kept.bfloat16().float() if store == "bfloat16" else kept
    scaled = ratio * less.float()
    expected = {"retention": scaled + kept, "ratio": scaled, "residual": less.float() + kept, "broadcast": kept}[kind]
    part = q.shape[2] * q.shape[3]
    monkeypatch.setattr(residual_store, "PART_BYTES", 4 * part)
    assert len(list(residual_store.parts(q))) == 6
    held, reuse = Memory(), Reuse(kind, store=store, ramp=0)
    step_cache.attention(q, k, v, plan_of(), reuse, held, None, lambda: full)

    answer = torch.empty_like(less).copy_(less)
    with Largest() as largest:
        out, how = step_cache.attention(
            q, k, v, plan_of(), reuse, held, None, lambda: q, compute=lambda *_, **__: (answer, lse)
        )
    assert how == "reuse"
    assert torch.equal(out, expected.bfloat16())
    assert largest.seen <= part


def test_what_was_remembered_once_has_room_again(monkeypatch):
    """Page-locked memory stays with PyTorch when it is given back, so it does not look free."""
    q, k, v = tensors(9)
    held, reuse = Memory(), Reuse("residual", refresh=2)
    hows = [call(reuse, held, q, k, v)[1]]
    monkeypatch.setattr(placement, "free_bytes", lambda device: 1000)
    assert hows + [call(reuse, held, q, k, v)[1] for _ in range(3)] == ["refresh", "reuse"] * 2


def test_page_locked_memory_comes_in_powers_of_two():
    assert [residual_store.taken(size, True) for size in (0, 1, 2, 3, 4096, 4097)] == [0, 1, 2, 4, 4096, 8192]
    assert residual_store.taken(4097, False) == 4097


@pytest.mark.parametrize(
    ("kind", "refresh", "maps", "age"), [("none", 5, 3, 3), ("ratio", 5, 1, 5), ("ratio", 4, 6, 8), ("ratio", 3, 6, 6)]
)
def test_statistics_hold_for_one_map_only(kind, refresh, maps, age):
    assert Reuse(kind, refresh=refresh, maps=maps).map_age == age


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "magic"}, "kind"),
        ({"kind": "ratio", "refresh": 1}, "refresh=1"),
        ({"store": "int3"}, "store"),
        ({"refresh": 0}, "refresh"),
        ({"ramp": -1}, "ramp"),
        ({"drift": 0}, "drift"),
        ({"kind": "residual", "drift": -0.1}, "drift"),
    ],
)
def test_what_is_wrong_is_named(fields, named):
    with pytest.raises(ValueError, match=named):
        Reuse(**fields)
    with pytest.raises(ValueError, match="reuse"):
        Reuse.from_dict({"kinds": "ratio"})
