"""Who gets which form: sites that share a device's room by the byte, one after the other and in a whole pipeline."""

import pytest
import torch
from util import render, tiny_wan_pipeline, windows_reusing

import fastdit
from fastdit import Window
from fastdit.approx import placement, step_cache
from fastdit.approx.residual_store import Stored, bytes_of
from fastdit.approx.step_cache import Memory
from fastdit.config import Reuse
from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.reference import attention, relative_error
from fastdit.planning.forward_plan import CallPlan

AUTO = Reuse("residual", store="auto")
LAYOUT = Layout((8, 8, 8), (2, 4, 4))
MASK = BlockMask.from_tile_map(Window(size=(1, 1, 1)).select(LAYOUT), LAYOUT)
SHAPE = (1, 2, LAYOUT.length, 16)
FULL = bytes_of(SHAPE, "bfloat16")


def inputs(seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(SHAPE, generator=generator) * 1.5 for _ in range(3))
    return q, k, v * scale


def refresh(memory, sites, seed=0, reuse=AUTO, scale=1.0):
    qkv = inputs(seed, scale)
    plan = CallPlan(0, density=0.25, block_mask=MASK)
    dense = lambda: attention(*qkv)[0]  # noqa: E731
    held = lambda device: sum(site.bytes(device) for site in sites)  # noqa: E731
    return step_cache.attention(*qkv, plan, reuse, memory, None, dense, held, lambda: sites)


@pytest.fixture
def room(monkeypatch):
    """Sets how many bytes all together may take, from now on."""

    def limit(sites, size):
        monkeypatch.setattr(placement, "free_bytes", lambda device: 2 * size - sum(site.bytes(device) for site in sites))

    return limit


def test_with_room_it_is_bfloat16_to_the_bit(room):
    sites = [Memory(), Memory()]
    room(sites, 2 * FULL)
    plain = Memory()
    refresh(plain, [], reuse=Reuse("residual", store="bfloat16"))
    for memory in sites:
        assert refresh(memory, sites)[1] == "refresh"
        assert memory.form == "bfloat16"
        assert torch.equal(memory.kept.data, plain.kept.data)


@pytest.mark.parametrize("kind", ["residual", "retention", "broadcast"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.25, 0.1, 0.04])
def test_the_less_room_the_smaller_the_forms_and_nobody_stays_dense(room, kind, share):
    sites = [Memory() for _ in range(6)]
    ratios = 4 * 2 * LAYOUT.length * (kind == "retention")
    limit = int(share * 6 * FULL) + 6 * ratios
    room(sites, limit)
    reuse = Reuse(kind, store="auto")
    for seed, memory in enumerate(sites):
        assert refresh(memory, sites, seed, reuse)[1] == "refresh"
        assert sum(site.bytes() for site in sites) <= limit
    assert all(memory.no_room is None for memory in sites)
    assert any(memory.form != "bfloat16" for memory in sites)
    used = sum(memory.kept.bytes() for memory in sites)
    assert used > 0.6 * share * 6 * FULL or all(memory.form == "bfloat16" for memory in sites)  # what there is is used
    forms = [memory.form for memory in sites]
    for seed, memory in enumerate(sites):  # in place of a run: all reuse, and their next refresh keeps the form
        assert refresh(memory, sites, seed, reuse)[1] == "reuse"
        memory.uses = reuse.refresh
        assert refresh(memory, sites, seed, reuse)[1] == "refresh"
    assert forms == [memory.form for memory in sites]


def test_more_room_is_less_error(room):
    wrong = []
    for share in (0.05, 0.1, 0.2, 0.4, 1.0):
        sites = [Memory() for _ in range(4)]
        room(sites, int(share * 4 * FULL))
        for seed, memory in enumerate(sites):
            refresh(memory, sites, seed)
        found = [refresh(memory, sites, seed)[0] for seed, memory in enumerate(sites)]
        exact = [attention(*inputs(seed))[0] for seed in range(4)]
        wrong.append(sum(relative_error(a, b) ** 2 for a, b in zip(found, exact, strict=True)))
    assert wrong == sorted(wrong, reverse=True)
    assert wrong[-1] < 1e-4


def test_a_site_of_little_left_out_gives_way_to_one_of_much(room):
    """Relative to the answer: values that are alike leave little that is not in the window already."""
    sites = [Memory(), Memory()]
    room(sites, int(1.2 * FULL))
    qkv = inputs(0)
    flat = (qkv[0], qkv[1], torch.ones(SHAPE) + 0.01 * qkv[2])
    plan = CallPlan(0, density=0.25, block_mask=MASK)
    for memory, (q, k, v) in zip(sites, (flat, qkv), strict=True):
        held = lambda device: sum(site.bytes(device) for site in sites)  # noqa: E731
        step_cache.attention(q, k, v, plan, AUTO, memory, None, lambda: q, held, lambda: sites)  # noqa: B023
    assert sites[0].errors is not None
    assert sites[1].kept.bytes() > 4 * sites[0].kept.bytes()


def test_a_named_form_stays_what_it_is(room):
    sites = [Memory(), Memory()]
    room(sites, int(1.5 * FULL))
    assert [refresh(memory, sites, reuse=Reuse("residual", store="bfloat16"))[1] for memory in sites] == ["refresh", "dense"]
    assert "no room for" in sites[1].no_room
    auto = Memory()
    sites.append(auto)
    assert refresh(auto, sites)[1] == "refresh"
    assert sites[0].form == "bfloat16"
    assert auto.kept.bytes() <= 0.5 * FULL


def test_where_not_even_the_smallest_fits_it_is_dense(room):
    memory = Memory()
    least = min(bytes_of(SHAPE, form) for form in placement.FORMS)
    room([memory], least - 1)
    assert refresh(memory, [memory])[1] == "dense"
    assert "no room" in memory.no_room
    memory = Memory()
    room([memory], least)
    assert refresh(memory, [memory])[1] == "refresh"
    assert memory.kept.bytes() == least


def test_what_is_measured_is_what_it_costs():
    x = torch.randn(1, 2, 2000, 16, generator=torch.Generator().manual_seed(1)).cumsum(2)
    rows = placement.sample(2000, x.device)
    assert len(rows) == len(rows.unique()) == placement.RUNS * placement.RUN
    assert rows.min() == 0
    assert rows.max() == 1999
    found = placement.measure(x[:, :, rows], torch.tensor(4.0))
    for form, error in zip(placement.FORMS, found, strict=True):
        whole = (Stored.of(x, form).load(x) - x).square().mean() / 4
        assert error == pytest.approx(float(whole), rel=0.5)
    assert torch.equal(placement.sample(100, x.device), torch.arange(100))
    stored = Stored.of(x, "float32")
    assert torch.equal(placement._sampled(stored, x), x[:, :, rows])


@pytest.mark.parametrize("share", [0.6, 0.3])
def test_a_pipeline_whose_statistics_do_not_fit_has_them_smaller(monkeypatch, share):
    """Both branches of guidance and all layers: none is dense for want of room, and it says how each is kept."""
    pipe = tiny_wan_pipeline()
    fastdit.accelerate(pipe, windows_reusing("residual"))
    exact = render(pipe, size=96)
    whole = fastdit.report(pipe).memory
    fastdit.restore(pipe)
    with fastdit.accelerate(pipe, windows_reusing("residual", store="auto")) as handle:
        assert torch.equal(render(pipe, size=96), exact)

        def held():
            return handle.bytes()

        limit, most, forms = int(share * whole), [], set()
        monkeypatch.setattr(placement, "free_bytes", lambda device: max(0, 2 * limit - held()))

        def look(pipe, step, timestep, values):
            most.append(held())
            forms.update(memory.form for site in handle.sites for memory in site.memories.values())
            return values

        found = render(pipe, size=96, callback_on_step_end=look)
        assert not any("no room" in (site.reason or "") for site in fastdit.report(pipe).sites)
        assert all(ran.how in ("refresh", "reuse") for site in handle.sites for ran in site.calls)
        assert 0.5 * limit < max(most) <= limit
        assert forms - {"bfloat16", None}
        notes = [site.reason for site in fastdit.report(pipe).sites if site.reason]
        assert notes
        assert all("statistics kept in " in note for note in notes)
        assert relative_error(found, exact) < 0.05
    fastdit.accelerate(pipe, windows_reusing("residual"))
    monkeypatch.setattr(placement, "free_bytes", lambda device: 0)
    render(pipe, size=96)
    assert all("no room" in site.reason for site in fastdit.report(pipe).sites)
