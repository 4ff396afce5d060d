"""Each policy against its paper, written a second time, and what all of them owe: knobs, batches, heads, NaN, dictionaries."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdit import Config, Phase, ops
from fastdit.approx import remainder
from fastdit.core.block_mask import BlockMask
from fastdit.core.layout import Layout
from fastdit.core.reference import attention, relative_error, token_mask
from fastdit.planning.forward_plan import complete, plan_call
from fastdit.policies import (
    LSH,
    POLICIES,
    Antidiagonal,
    Dense,
    HeadProfile,
    Intersect,
    PowerOfTwo,
    Radial,
    SpatialTemporal,
    Stripe,
    TopMass,
    Union,
    Window,
    policy_from_dict,
)  # fmt: skip
from fastdit.policies.lsh import buckets
from fastdit.policies.scores import antidiagonal, pooled, select_tiles, tile_coordinates
from fastdit.policies.spatial_temporal import permute
from fastdit.policies.top_mass import self_similarity

LAYOUT = Layout((5, 8, 12), (1, 4, 4))
RAGGED = Layout((5, 7, 10), (2, 3, 4))
ALL = [
    Dense(), Window(density=0.25), Radial(density=0.25), SpatialTemporal(density=0.25), Antidiagonal(tau=0.6),
    Antidiagonal(density=0.25, stride=3), TopMass(tau=0.6), TopMass(density=0.25, similarity=0.1), Stripe(theta=1.0),
    Stripe(theta=0.5, group=2), PowerOfTwo(), PowerOfTwo(window=(1, 3, 3), along="raster"), LSH(density=0.3),
    HeadProfile((Radial(density=0.2), TopMass(density=0.3)), (0, 1)), Union((Window(size=(1, 1, 1)), LSH(density=0.2))),
    Intersect((Window(size=(3, 1, 3)), Antidiagonal(tau=0.9))),
]  # fmt: skip


def video(layout, batch=2, heads=2, dim=16, seed=0, scale=1.0):
    """Tokens whose neighbours are alike, with zeros in padded slots, in tile order."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, layout.length, dim, generator=generator) * scale for _ in range(3))
    base = torch.randn(1, 1, layout.length, dim, generator=generator)
    return [layout.to_tiles(x)[:, :, : layout.video_tiles] for x in (q + base, k + base, v + base)]


def brute_mass(q, k, layout):
    """True attention mass of each tile pair, [B, H, tiles, tiles]."""
    real = (layout.order()[: layout.video_tiles] >= 0).flatten()
    logits = (q.flatten(2, 3) @ k.flatten(2, 3).mT * q.shape[-1] ** -0.5).masked_fill(~real, -math.inf)
    mass = logits.softmax(-1).unflatten(-1, (-1, layout.tile_tokens)).sum(-1)
    mass = (mass * real[:, None]).unflatten(2, (-1, layout.tile_tokens)).sum(3)
    return mass / layout.counts()[: layout.video_tiles, None]


SMALL = [Layout((1, 1, 1), (1, 1, 1)), Layout((3, 4, 4), (3, 4, 4)), Layout((2, 3, 3), (1, 1, 1))]


@pytest.mark.parametrize("layout", [LAYOUT, RAGGED, *SMALL], ids=str)
@pytest.mark.parametrize("policy", ALL, ids=str)
def test_map_of_any_layout(policy, layout):
    """Right shape, the same twice, batch elements and heads on their own, no empty row, and the dictionary gives it back."""
    q, k, v = video(layout)
    found = policy.select(layout, q, k, v)
    n = layout.video_tiles
    assert found.dtype == torch.bool
    assert found.shape[2:] == (n, n)
    assert found.shape[0] in (1, 2)
    assert torch.equal(found, policy.select(layout, q, k, v))
    if policy.static:
        assert torch.equal(found, policy.select(layout))
    if "head_profile" not in policy.name:
        swapped = policy.select(layout, *(x.flip(0, 1) for x in (q, k, v)))
        assert torch.equal(swapped.expand(2, 2, n, n), found.expand(2, 2, n, n).flip(0, 1))
    assert complete(found, layout).any(-1).all()
    again = policy_from_dict(json.loads(json.dumps(policy.to_dict())))
    assert again == policy
    assert hash(again) == hash(policy)
    assert POLICIES[policy.name] is type(policy)


@pytest.mark.parametrize("text", [(0, False), (5, False), (5, True)], ids=["none", "last", "first"])
@pytest.mark.parametrize("policy", ALL[1:], ids=str)
def test_attention_is_dense_attention_under_the_token_mask(policy, text):
    layout = Layout((3, 6, 7), (1, 3, 4), *text)
    x = [torch.randn(1, 2, layout.length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    tiled = [layout.to_tiles(t)[:, :, : layout.video_tiles] for t in x]
    kept = complete(policy.select(layout, *tiled), layout)
    out, lse = ops.attention(*x, BlockMask.from_tile_map(kept, layout))
    expected, expected_lse = attention(*x, token_mask(layout, kept))
    assert relative_error(out, expected) < 1e-12
    assert torch.allclose(lse, expected_lse, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: Antidiagonal(tau=x), lambda x: Antidiagonal(density=x), lambda x: TopMass(tau=x),
        lambda x: TopMass(density=x),
        lambda x: Stripe(theta=10 * x - 5), lambda x: Window(density=x), lambda x: Radial(density=x),
        lambda x: Radial(decay=4 * x), lambda x: SpatialTemporal(density=x).maps(LAYOUT)[0], lambda x: LSH(density=x),
        lambda x: PowerOfTwo((max(1, round(5 * x)), max(1, round(2 * x)), max(1, round(3 * x)))),
    ],
)  # fmt: skip
def test_more_is_more(make):
    """A larger knob keeps no tile fewer, and the largest keeps nearly all."""
    qkv = video(LAYOUT)
    kept = [p if isinstance(p := make(x), torch.Tensor) else p.select(LAYOUT, *qkv) for x in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)]
    shares = [x.float().mean().item() for x in kept]
    assert shares == sorted(shares)
    assert shares[0] < 0.6 < 0.7 < shares[-1]
    assert shares[0] < shares[-1]


@pytest.mark.parametrize("policy", [p for p in ALL if p.reads and "head_profile" not in p.name], ids=str)
def test_nan_never_empties_a_row(policy):
    """What a NaN spoils stays visible: the tiles that hold it, and rows that cannot be scored, are not left out."""
    q, k, v = video(LAYOUT)
    q[0, 1, 3, 2, 5] = math.nan
    found = policy.select(LAYOUT, q, k, v)
    if not isinstance(policy, Intersect):  # of which parts may have nothing in common
        assert found.any(-1).all()
    if isinstance(policy, (Antidiagonal, TopMass, LSH, Stripe)):
        assert found[0, 1, 3].all()
    out, _ = ops.attention(*(LAYOUT.from_tiles(x) for x in (q, k, v)), BlockMask.from_tile_map(complete(found, LAYOUT), LAYOUT))
    assert LAYOUT.to_tiles(out)[0, 1, 3, 2].isnan().all()
    assert out.isnan().sum() == 16


class Largest(TorchDispatchMode):
    """Bytes of the largest storage that anything inside made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(x.untyped_storage().nbytes() for x in tree_leaves(found) if isinstance(x, torch.Tensor))])
        return found


HUGE = [(p, "none") for p in ALL if p.name != "dense"] + [(Window(density=0.1), kind) for kind in remainder.REMAINDERS]


@pytest.mark.parametrize(("policy", "kind"), HUGE, ids=str)
def test_nothing_is_as_large_as_all_pairs_of_tokens(policy, kind):
    """At 9,216 tokens not even one byte for each pair: neither to choose, nor to attend to what was chosen."""
    grid = (9, 32, 32)
    q, k, v = (torch.randn(1, 2, math.prod(grid), 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    config = Config((Phase(policy=policy, remainder=kind),), (1, 8, 8), max_density=1)
    with Largest() as seen:
        plan = plan_call(config, 0.5, grid, q, k, v)
        if plan.density < 0.15:
            remainder.attention(q, k, v, plan.block_mask, remainder=kind)
    assert 0 < seen.most < math.prod(grid) ** 2


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Antidiagonal(tau=0), "tau"), (lambda: Antidiagonal(tau=1.5), "tau"), (lambda: Antidiagonal(), "exactly one"),
        (lambda: TopMass(tau=0.5, density=0.5), "exactly one"), (lambda: TopMass(density=0.5, similarity=2), "similarity"),
        (lambda: Stripe(theta=math.nan), "theta"), (lambda: Stripe(window=(0, 1, 1)), "window"),
        (lambda: Radial(), "exactly one"),
        (lambda: Radial(decay=-1), "decay"), (lambda: LSH(density=0), "density"), (lambda: LSH(planes=0), "planes"),
        (lambda: SpatialTemporal(rows=0), "rows"), (lambda: PowerOfTwo(along="time"), "along"), (lambda: Union(()), "union"),
        (lambda: HeadProfile((Dense(),), (0, 1)), "heads"), (lambda: Antidiagonal(tau=0.5, stride=0), "stride"),
        (lambda: policy_from_dict({"name": "windows"}), "unknown policy"), (lambda: policy_from_dict("window"), "table"),
        (lambda: policy_from_dict({"name": "lsh", "tau": 1}), "tau"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(make, named):
    with pytest.raises(ValueError, match=named):
        make()


def test_radial_is_the_papers_bands():
    """Frame distance d: a box of decay / 2^bit_length(d) of the frame; below one tile only every so manieth frame."""
    layout = Layout((9, 16, 16), (1, 2, 2))
    found = Radial(decay=1.0).select(layout)[0, 0].view(9, 8, 8, 9, 8, 8)
    for d, side in {0: 8, 1: 6, 2: 4, 3: 4, 4: 3, 8: 2}.items():  # √(1, ½, ¼, ⅛, 1/16) of 8 tiles
        assert found[0, 4, 4, d].sum() == side * side
        assert torch.equal(found[0, :, :, d], found[d, :, :, 0])
    thin = Radial(decay=1 / 16).select(layout)[0, 0].view(9, 8, 8, 9, 8, 8)
    shares = {d: 64 / 16 / 2 ** d.bit_length() for d in range(9)}  # in tiles
    for d, share in shares.items():
        assert thin[0, 4, 4, d].any() == (share >= 1 or d % math.ceil(1 / share) == 0)


@given(st.floats(0.05, 1))
@settings(deadline=None, max_examples=25)
def test_radial_density_is_at_most_what_was_asked(density):
    layout = Layout((9, 16, 16), (1, 4, 4))
    found = Radial(density=density).select(layout).float().mean()
    assert found <= density or found == Radial(decay=2.0**-12).select(layout).float().mean()
    assert found > density - 0.2


def test_temporal_map_is_the_spatial_one_on_permuted_tiles():
    spatial, temporal = SpatialTemporal(density=0.3).maps(LAYOUT)
    rank = permute(LAYOUT)
    order = rank.argsort()
    t, h, w = tile_coordinates(LAYOUT)
    assert [(int(h[i]), int(w[i]), int(t[i])) for i in order] == sorted(zip(h.tolist(), w.tolist(), t.tolist(), strict=True))
    assert torch.equal(temporal[order[:, None], order], spatial)
    assert spatial.float().mean() == pytest.approx(0.3, abs=0.06)


def test_heads_show_whether_they_look_along_space_or_time():
    """Planted heads are told apart, and the choice is the one with the smaller error when all rows are drawn."""
    layout = Layout((8, 8, 8), (1, 4, 4))
    t, h, w = (x.flatten() for x in torch.meshgrid(*(torch.arange(n) for n in layout.grid), indexing="ij"))
    frame, place = (torch.nn.functional.one_hot(x, 64).float() * 9 for x in (t, h * 8 + w))
    x = torch.stack([frame, place])[None]
    v = torch.randn(1, 2, layout.length, 64, generator=torch.Generator().manual_seed(0))
    q, k, v = (layout.to_tiles(y) for y in (x, x, v))
    policy = SpatialTemporal(density=0.3, rows=layout.length)
    found, maps = policy.select(layout, q, k, v), policy.maps(layout)
    assert torch.equal(found[0, 0], maps[0])
    assert torch.equal(found[0, 1], maps[1])
    assert torch.equal(SpatialTemporal(density=0.3, rows=8).select(layout, q, k, v), found)
    q, k, v = video(layout, seed=3)
    flat = [y.flatten(2, 3) for y in (q, k, v)]
    errors = []
    for kept in policy.maps(layout):
        wide = kept.repeat_interleave(16, 0).repeat_interleave(16, 1)
        errors.append((attention(*flat, wide)[0] - attention(*flat)[0]).square().sum((-1, -2)))
    assert torch.equal((policy.select(layout, q, k, v) == maps[0]).all(-1).all(-1), errors[0] <= errors[1])


def test_padding_has_no_part_in_the_choice_of_a_head():
    """Zeros in padded slots would outweigh all keys here."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 16, RAGGED.length, 8, generator=generator) for _ in range(3))
    q, k = q + 2, k - 2
    policy = SpatialTemporal(density=0.3, rows=RAGGED.length)
    errors = [
        (attention(q, k, v, token_mask(RAGGED, kept[None, None]))[0] - attention(q, k, v)[0]).square().sum((-1, -2))
        for kept in policy.maps(RAGGED)
    ]
    found = policy.select(RAGGED, *(RAGGED.to_tiles(x) for x in (q, k, v)))
    assert torch.equal((found == policy.maps(RAGGED)[0]).all(-1).all(-1), errors[0] <= errors[1])
    assert 0 < (errors[0] <= errors[1]).sum() < 16


@pytest.mark.parametrize(("layout", "stride"), [(LAYOUT, 8), (LAYOUT, 3), (RAGGED, 8), (RAGGED, 5)])
def test_antidiagonal_score_is_the_mean_over_antidiagonals(layout, stride):
    q, k, _ = video(layout, 1, 1)
    tokens = layout.tile_tokens
    cells = -(-tokens // stride)
    order = layout.order()[: layout.video_tiles]
    logits = torch.full((layout.video_tiles, cells, layout.video_tiles, cells), -math.inf)
    products = torch.einsum("ixd,jyd->ixjy", q[0, 0], k[0, 0])
    for a, j, b in itertools.product(range(cells), range(layout.video_tiles), range(cells)):
        if not (order[j, b * stride : (b + 1) * stride] >= 0).any():
            continue
        pairs = [(a * stride + stride - 1 - s, b * stride + s) for s in range(stride)]
        terms = [products[:, x, j, y] for x, y in pairs if x < tokens and y < tokens]
        logits[:, a, j, b] = sum(terms) / stride * 16**-0.5
    mass = logits.flatten(2).softmax(-1).view_as(logits).sum(-1)
    live = torch.stack([(order[:, a * stride : (a + 1) * stride] >= 0).any(-1) for a in range(cells)], 1)
    expected = (mass * live[:, :, None]).sum(1) / live.sum(1)[:, None]
    found = antidiagonal(q, k, layout, stride)[0, 0]
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(found.sum(-1), torch.ones(layout.video_tiles))


def test_antidiagonal_in_pieces(monkeypatch):
    q, k, _ = video(RAGGED)
    whole = antidiagonal(q, k, RAGGED, 8)
    monkeypatch.setattr("fastdit.policies.scores.ROWS_BYTES", 1)
    assert torch.allclose(antidiagonal(q, k, RAGGED, 8), whole, atol=1e-7)


def test_antidiagonal_sees_a_slash_that_means_miss():
    """Token i matches token i + 64 alone, and signs alternate, so that every mean is nothing."""
    layout = Layout((4, 8, 8), (1, 4, 4))
    sign = torch.tensor([1.0, -1.0]).repeat(8)[:, None]
    code = torch.randn(layout.video_tiles, 1, 32, generator=torch.Generator().manual_seed(1)) * sign * 3
    q = code[None, None].contiguous()
    k = q.roll(4, 2).flip(3) * torch.where(torch.arange(16) < 16, 1.0, 1.0)[:, None]
    seen = antidiagonal(q, k, layout, 8)[0, 0]
    meant = pooled(q, k, layout)[0, 0]
    partner = (torch.arange(16) + 4) % 16
    rows = torch.arange(16)
    assert (seen[rows, partner] > 0.9).all()
    assert (meant[rows, partner] < 0.2).all()


@given(st.floats(0.01, 1), st.integers(1, 40), st.integers(0, 10))
@settings(deadline=None, max_examples=60)
def test_prefix_is_minimal(tau, tiles, seed):
    mass = torch.rand(3, 2, 5, tiles, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    kept = select_tiles(mass, tau, None)
    inside = torch.where(kept, mass, 0.0)
    assert (inside.double().sum(-1) >= tau * mass.double().sum(-1) - 1e-6).all()
    if tau < 1:
        lightest = torch.where(kept, mass, math.inf).amin(-1)
        assert (inside.double().sum(-1) - lightest < tau * mass.double().sum(-1) + 1e-6).all()
        assert (torch.where(kept, 0.0, mass).amax(-1) <= lightest).all()


@pytest.mark.parametrize("policy", [LSH(density=0.3), SpatialTemporal(density=0.25)], ids=str)
def test_a_default_device_does_not_reach_the_draw(policy):
    """Under torch.set_default_device("cuda") a draw that names no device cannot use the CPU's generator."""
    tensors = video(RAGGED)[: len(policy.reads)]
    expected = policy.select(RAGGED, *tensors)
    with torch.device("meta"):
        assert torch.equal(policy.select(RAGGED, *tensors), expected)


def test_pooled_mass_is_true_where_tiles_are_flat():
    q, k, _ = video(RAGGED)
    real = (RAGGED.order()[: RAGGED.video_tiles] >= 0)[..., None]
    q, k = (x[:, :, :, :1].expand_as(x) * real for x in (q, k))
    assert torch.allclose(pooled(q, k, RAGGED), brute_mass(q, k, RAGGED), atol=1e-5)


def test_tiles_that_a_mean_cannot_stand_for_are_kept():
    q, _, v = video(LAYOUT)
    q[:, 1, 4] = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(5))
    alike = torch.nn.functional.normalize(q[0, 1, 4], dim=-1)
    assert self_similarity(q, LAYOUT)[0, 1, 4] == pytest.approx((alike @ alike.T).mean().item(), abs=1e-5)
    same = torch.randn(1, 1, LAYOUT.video_tiles, 1, 16, generator=torch.Generator().manual_seed(6)).expand_as(q)
    mixed = same.clone()
    mixed[:, :, 2] = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(5))
    found = TopMass(density=0.1, similarity=0.5).select(LAYOUT, mixed, same, v)
    assert found[:, :, 2].all()
    assert not found[:, :, 3].all()


@pytest.mark.parametrize("layout", [LAYOUT, RAGGED], ids=["whole", "ragged"])
@pytest.mark.parametrize("window", [(1, 1, 1), (1, 3, 3)])
def test_stripe_token_by_token(layout, window):
    q, k, v = (x.double() for x in video(layout))
    real = layout.order()[: layout.video_tiles] >= 0
    t, _, _ = tile_coordinates(layout)
    near = Window(size=window).select(layout)[0, 0] | (t == 0)
    found = Stripe(theta=1.5, window=window).select(layout, q.float(), k.float(), v.float())
    for b, h, i in itertools.product(range(2), range(2), range(0, layout.video_tiles, 3)):
        seen = k[b, h][near[i]][real[near[i]]]
        tops = [max(query @ key for key in seen) for query in q[b, h, i][real[i]]]
        mean = q[b, h, i][real[i]].mean(0)
        threshold = sum(tops) / len(tops) - 1.5 * q.shape[-1] ** 0.5
        for j in range(layout.video_tiles):
            passes = max(mean @ key for key in k[b, h, j][real[j]]) >= threshold
            assert found[b, h, i, j] == (near[i, j] or passes)


def test_stripe_limits_and_planted_column():
    q, k, v = video(LAYOUT)
    policy = Stripe(theta=-math.inf)
    t, _, _ = tile_coordinates(LAYOUT)
    near = Window(size=policy.window).select(LAYOUT)[0, 0] | (t == 0)
    assert torch.equal(policy.select(LAYOUT, q, k, v), near.expand(2, 2, -1, -1))
    assert Stripe(theta=math.inf).select(LAYOUT, q, k, v).all()
    direction = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(2)), dim=0)
    q, k = q * 0.1 + direction * 4, k * 0.1
    k[:, :, :6, 0] = direction * 20  # what the anchors see in the first frame
    k[:, :, 20, 7] = direction * 30  # one key that all queries want still more
    found = Stripe(theta=2.0).select(LAYOUT, q, k, v)
    assert found[..., 20].all()
    assert found.float().mean() < 0.6
    grouped = Stripe(theta=4.0, group=5).select(LAYOUT, *video(LAYOUT))
    single = Stripe(theta=4.0).select(LAYOUT, *video(LAYOUT))
    for start in range(0, LAYOUT.video_tiles, 5):
        rows = slice(start, start + 5)
        at_least = (single & ~near)[:, :, rows].any(2, keepdim=True) | near[rows]
        at_most = single[:, :, rows].any(2, keepdim=True) | near[rows]
        assert (grouped[:, :, rows] >= at_least).all()
        assert (grouped[:, :, rows] <= at_most).all()
    assert (grouped > single).any()


@given(st.tuples(*[st.integers(1, 9)] * 3), st.sampled_from(["axes", "raster"]))
@settings(deadline=None, max_examples=40)
def test_powers_of_two_reach_everything(grid, along):
    layout = Layout(grid, (1, 1, 1))
    n = layout.video_tiles
    found = PowerOfTwo(along=along).select(layout)[0, 0]
    lengths = grid if along == "axes" else (n,)
    depth = sum(math.ceil(math.log2(x)) for x in lengths if x > 1)
    assert found.sum(-1).max() <= 1 + 2 * sum(1 + math.ceil(math.log2(x)) for x in lengths)
    reach = torch.eye(n)
    for _ in range(depth):
        reach = ((reach @ found.float()) > 0).float()
    assert reach.all()


def test_neighbours_in_gray_order_differ_in_one_bit():
    planes = torch.eye(6)
    words = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)))
    rank = buckets(words, planes)
    assert sorted(rank.tolist()) == list(range(64))
    ordered = words[rank.argsort()]
    assert ((ordered[1:] != ordered[:-1]).sum(-1) == 1).all()


def test_lsh_blocks_are_equal_and_find_their_like():
    layout = Layout((4, 8, 8), (1, 4, 4))
    groups = torch.randn(4, 24, generator=torch.Generator().manual_seed(0)) * 5
    member = torch.arange(16) % 4
    q = groups[member][:, None].expand(16, 16, 24)[None, None] + 0.1
    k = q + 40 * torch.randn(24, generator=torch.Generator().manual_seed(1))  # a bias of all keys says nothing
    found = LSH(density=0.25, planes=10).select(layout, q, k, q)
    assert (found.sum(-1) == 4).all()
    assert found[0, 0][member[:, None] == member].float().mean() > 0.7


def test_composed_policies_keep_what_their_parts_keep():
    q, k, v = video(LAYOUT)
    a, b = Window(size=(3, 1, 1)), TopMass(density=0.2)
    left, right = (p.select(LAYOUT, q, k, v) for p in (a, b))
    assert torch.equal(Union((a, b)).select(LAYOUT, q, k, v), left | right)
    assert torch.equal(Intersect((a, b)).select(LAYOUT, q, k, v), left & right)
    both = HeadProfile((a, b), (1, 0)).select(LAYOUT, q, k, v)
    assert torch.equal(both[:, 0], right[:, 0])
    assert torch.equal(both[:, 1], left[:, 0].expand_as(both[:, 1]))
    assert HeadProfile((a, Radial(density=0.2)), (1, 0)).static
    assert not Union((a, b)).static
    with pytest.raises(ValueError, match="2 heads, this layer has 3"):
        HeadProfile((a, b), (0, 1)).select(LAYOUT, *video(LAYOUT, heads=3))
