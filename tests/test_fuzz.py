"""Random layouts, policies, remainders and runs against attention written a second time from token coordinates, in float64.

Nothing here asks the code under test where a token sits or which tokens a tile map stands for. The long run is
`pytest -m slow tests/test_fuzz.py`.
"""

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import wan, wan_inputs

import fastdit
import fastdit.runs.run
from fastdit import Config, Phase
from fastdit.approx import error_guard, remainder, step_cache
from fastdit.approx.residual_store import FORMS
from fastdit.approx.step_cache import Memory
from fastdit.config import AUTO, KINDS, Reuse
from fastdit.core.quant import Quant
from fastdit.core.reference import relative_error
from fastdit.planning.forward_plan import layout_of, plan_call
from fastdit.policies import (
    LSH,
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
)

sides = st.integers(1, 5)
boxes = st.tuples(sides, sides, sides)
shares = st.floats(0.02, 1)
borders = st.sampled_from(["clamp", "truncate"])
SIMPLE = st.one_of(
    st.just(Dense()),
    st.builds(Window, size=boxes, border=borders),
    st.builds(Window, density=shares, border=borders),
    st.builds(Radial, decay=st.floats(0.01, 8)),
    st.builds(Radial, density=shares),
    st.builds(SpatialTemporal, density=shares, rows=st.integers(1, 40), seed=st.integers(0, 9)),
    st.builds(Antidiagonal, tau=shares, stride=st.integers(1, 9)),
    st.builds(Antidiagonal, density=shares, stride=st.integers(1, 9)),
    st.builds(TopMass, tau=shares, similarity=st.floats(-1, 1)),
    st.builds(TopMass, density=shares, similarity=st.floats(-1, 1)),
    st.builds(
        Stripe, theta=st.one_of(st.floats(-9, 9), st.sampled_from([-math.inf, math.inf])), window=boxes, group=st.integers(1, 4)
    ),
    st.builds(PowerOfTwo, window=boxes, along=st.sampled_from(["axes", "raster"])),
    st.builds(LSH, density=shares, planes=st.integers(1, 9), seed=st.integers(0, 9)),
)
SEVERAL = st.lists(SIMPLE, min_size=1, max_size=3).map(tuple)


def policies(heads):
    profiles = SEVERAL.flatmap(lambda p: st.builds(HeadProfile, st.just(p), st.tuples(*[st.integers(0, len(p) - 1)] * heads)))
    return st.one_of(SIMPLE, SIMPLE, st.builds(Union, SEVERAL), st.builds(Intersect, SEVERAL), profiles)


@st.composite
def problems(draw):
    """A configuration of one phase, grid and text of a call, and its q, k and v: wide and narrow logits, a biased K, zeros."""
    grid, tile = draw(boxes), draw(boxes)
    text, text_first = draw(st.integers(0, 9)), draw(st.booleans())
    batch, heads, dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 9))
    phase = Phase(policy=draw(policies(heads)), remainder=draw(st.sampled_from(remainder.REMAINDERS)))
    config = Config((phase,), tile, min_tokens=0, max_density=1, first_frame=draw(st.booleans()))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    shape = (batch, heads, math.prod(grid) + text, dim)
    q, k, v = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(3))
    q, k = q * draw(st.sampled_from([0.0, 0.3, 1.0, 6.0])), k + draw(st.sampled_from([0.0, 5.0]))
    return config, grid, text, text_first, q, k, v + draw(st.sampled_from([0.0, 3.0]))


def tile_of(grid, tile, text, text_first):
    """Tile of every token from its coordinates, int64 [N]; text behind the video's; and how many the video has."""
    tile = tuple(map(min, tile, grid))
    across = [math.ceil(g / s) for g, s in zip(grid, tile, strict=True)]
    found = []
    for token in range(math.prod(grid) + text):
        place = token - text * text_first
        if 0 <= place < math.prod(grid):
            t, h, w = place // (grid[1] * grid[2]), place // grid[2] % grid[1], place % grid[2]
            found.append((t // tile[0] * across[1] + h // tile[1]) * across[2] + w // tile[2])
        else:
            found.append(math.prod(across) + (token if text_first else place - math.prod(grid)) // math.prod(tile))
    return torch.tensor(found), math.prod(across), across[0]


def token_mask(config, grid, text, text_first, q, k, v):
    """What a policy's own answer and the rules of the plan mean for tokens: bool [b, h, N, N], and the tile of each token."""
    tile, tiles, frames = tile_of(grid, config.tile, text, text_first)
    layout = layout_of(config, grid, text, text_first)
    tensors = []
    for x in (q, k, v):  # tile order, padding behind
        bricks = x.new_zeros(*x.shape[:2], tiles, layout.tile_tokens, x.shape[3])
        for i in range(tiles):
            bricks[:, :, i, : int((tile == i).sum())] = x[:, :, tile == i]
        tensors.append(bricks)
    video = config.phases[0].policy.select(layout, *tensors)
    row, column = tile[:, None], tile[None]
    always = (row >= tiles) | (column >= tiles) | (row == column)
    if config.first_frame:
        always = always | (column < tiles // frames)
    return always | video[:, :, row.clamp(max=tiles - 1), column.clamp(max=tiles - 1)], tile


def softmax(logits, v):
    lse = logits.logsumexp(-1)
    return (logits - lse[..., None]).exp() @ v, lse


def pooled(q, k, v, mask, tile):
    """Tiles that a query drops as one key and value each, log n heavier."""
    count = int(tile.max()) + 1
    members = torch.nn.functional.one_hot(tile, count).T.double()
    n = members.sum(-1)
    means = [members @ x / n[:, None] for x in (k, v)]
    kept = torch.stack([mask[..., tile == i].any(-1) for i in range(count)], -1)
    near = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -math.inf)
    far = (q @ means[0].mT * q.shape[-1] ** -0.5 + n.log()).masked_fill(kept, -math.inf)
    return softmax(torch.cat([near, far], -1), torch.cat([v, means[1]], 2))


def fuzz(strategy, examples, check):
    """Run check on so many examples; on fewer by default than in the long run."""
    hush = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings(max_examples=examples, deadline=None, suppress_health_check=hush)(given(strategy)(check))()


def lengths(short, long):
    return pytest.mark.parametrize("examples", [short, pytest.param(long, marks=pytest.mark.slow)])


@lengths(60, 6000)
def test_any_configuration_is_attention_under_its_token_mask(examples):
    def check(problem):
        config, grid, text, text_first, q, k, v = problem
        mask, tile = token_mask(*problem)
        plan = plan_call(config, 0.5, grid, q, k, v, **{"before" if text_first else "after": text})
        kind = config.phases[0].remainder
        if plan.reason is None:
            out, lse = remainder.attention(q, k, v, plan.block_mask, plan.quant, None, plan.remainder)
        else:
            assert isinstance(config.phases[0].policy, Dense)
            out, lse = remainder.attention(q, k, v, None)
        assert 0 < plan.density <= 1
        assert plan.density == pytest.approx(float(mask.double().mean()), abs=1e-9)
        assert out.isfinite().all()
        logits = q @ k.mT * q.shape[-1] ** -0.5
        sparse, dense = softmax(logits.masked_fill(~mask, -math.inf), v), softmax(logits, v)
        if kind in ("none", "pooled"):
            expected = sparse if kind == "none" else pooled(q, k, v, mask.expand(q.shape[0], q.shape[1], -1, -1), tile)
            assert relative_error(out, expected[0]) < 1e-11
            assert relative_error(lse, expected[1]) < 1e-11
        else:  # more keys than the sparse answer has: exact ones that the tiles lack, or a sample of them
            assert (lse >= sparse[1] - 1e-9).all()
            assert ((out <= v.amax(2, keepdim=True) + 1e-9) & (out >= v.amin(2, keepdim=True) - 1e-9)).all()
        if kind == "stripes":
            assert (lse <= dense[1] + 1e-9).all()
        if mask.all():
            assert relative_error(out, dense[0]) < 1e-11

    fuzz(problems(), examples, check)


@lengths(25, 1500)
def test_stripes_of_everything_are_dense_attention(examples):
    def check(problem):
        config, grid, text, text_first, q, k, v = problem
        mask = plan_call(config, 0.5, grid, q, k, v, **{"before" if text_first else "after": text}).block_mask
        if mask is not None:
            kept = remainder.attention(q, k, v, mask)
            rest = remainder.stripes(q, k, v, mask, kept[1], theta=math.inf, limit=q.shape[2])
            out, lse = remainder.merge([kept, rest])
            expected = softmax(q @ k.mT * q.shape[-1] ** -0.5, v)
            assert relative_error(out, expected[0]) < 1e-11
            assert relative_error(lse, expected[1]) < 1e-11

    fuzz(problems(), examples, check)


@lengths(25, 1500)
def test_statistics_are_what_their_formulas_say(examples):
    """Step after step with drifting inputs, against the formulas on masked logits."""
    reuses = st.builds(
        Reuse,
        st.sampled_from(KINDS),
        st.integers(2, 4),
        st.floats(0, 1),
        st.sampled_from((*FORMS, AUTO)),
        st.booleans(),
        st.integers(1, 6),
    )

    def check(drawn):
        (config, grid, text, text_first, *first), reuse, steps = drawn
        plan = plan_call(config, 0.5, grid, *first, **{"before" if text_first else "after": text})
        if plan.reason is not None or plan.remainder not in ("none", "pooled"):
            return
        mask, tile = token_mask(config, grid, text, text_first, *first)
        mask, held = mask.expand(*first[0].shape[:2], -1, -1), Memory()
        for step in range(steps):
            q, k, v = (x + 0.1 * step * x.roll(1, 2) for x in first)
            logits = q @ k.mT * q.shape[-1] ** -0.5
            dense = softmax(logits, v)
            out, how = step_cache.attention(q, k, v, plan, reuse, held, None, lambda: dense[0])  # noqa: B023
            part = softmax(logits.masked_fill(~mask, -math.inf), v) if plan.remainder == "none" else pooled(q, k, v, mask, tile)
            if step % reuse.refresh == 0:
                ratio = (part[1] - dense[1]).exp().clamp(max=1)[..., None]
                by_kind = {"ratio": 0 * dense[0], "residual": dense[0] - part[0], "broadcast": dense[0]}
                rest = by_kind.get(reuse.kind, dense[0] - ratio * part[0])
            scaled = (ratio + (step % reuse.refresh - 1) * reuse.ramp).clamp(max=1) * part[0]
            reused = {"residual": part[0] + rest, "broadcast": rest}.get(reuse.kind, scaled + rest)
            fresh = step % reuse.refresh == 0
            expected = part[0] if reuse.kind == "none" else dense[0] if fresh else reused
            assert how == ("sparse" if reuse.kind == "none" else "refresh" if fresh else "reuse")
            rounding = {"float32": 1e-6, "bfloat16": 2**-8, "fp8": 2**-4, "int4": 0.4}.get(reuse.store, 1.2) * rest.norm()
            assert (out - expected).norm() <= 1e-9 * expected.norm() + (
                0 if fresh or reuse.kind in ("none", "ratio") else rounding
            )

    fuzz(st.tuples(problems(), reuses, st.integers(1, 8)), examples, check)


GRIDS = [(2, 3, 4), (3, 4, 2)]


@st.composite
def runs(draw):
    """Runs of steps of calls: each run begins at the top, each step falls, each call has a size, a batch and an input."""
    call = st.tuples(st.integers(0, 1), st.integers(1, 2), st.integers(0, 1))
    # At least two: a bare model knows a run by the noise level that rises, and after a single step another call at its level is
    # another branch. (A pipeline's runs are known by their list of timesteps as well.)
    levels = st.lists(st.sampled_from([0.9, 0.8, 0.6, 0.5, 0.4, 0.3, 0.1]), unique=True, min_size=1, max_size=5)
    steps = levels.map(lambda found: [0.98, *sorted(found, reverse=True)])
    run = steps.flatmap(
        lambda found: st.tuples(*[st.tuples(st.just(s), st.lists(call, min_size=1, max_size=3)) for s in found])
    )
    phases = []
    for span in ((1.0, 0.5), (0.5, 0.0)):
        policy = draw(st.one_of(st.builds(Window, size=boxes), st.builds(TopMass, density=shares), st.just(Dense())))
        quant = draw(st.sampled_from([Quant(), Quant("int8")]))
        reuse = Reuse(
            draw(st.sampled_from(KINDS)),
            draw(st.integers(2, 3)),
            store="float32",
            maps=draw(st.integers(1, 3)),
            drift=draw(st.sampled_from([None, 1e-3, 0.2])),
        )
        phases.append(Phase(span, policy, quant, reuse=reuse, remainder=draw(st.sampled_from(["none", "pooled"]))))
    return Config(tuple(phases), (1, 2, 2), min_tokens=0, max_density=1), draw(st.lists(run, min_size=1, max_size=2))


@lengths(6, 400)
def test_every_stream_of_calls_is_as_if_it_were_alone(examples, monkeypatch):
    """Runs, branches, sizes and batches in any order, through a real denoiser: each answers as it does without the others.

    A stream is of one input, told by what it is; calls alike at one noise level are told by their order.
    """
    monkeypatch.setattr(fastdit.runs.run, "STALE", 9)  # alone, a stream does not see the noise levels at which it rests
    model = wan(num_layers=1, num_attention_heads=1, attention_head_dim=12, ffn_dim=8)

    def answer(sigma, call):
        size, batch, seed = call
        return model(**wan_inputs(GRIDS[size], sigma, batch, seed))[0]

    def check(drawn):
        config, found = drawn
        streams = {}
        with torch.no_grad():
            with fastdit.accelerate(model, config):
                for number, run in enumerate(found):
                    for sigma, calls in run:
                        for i, call in enumerate(calls):
                            alike = calls[:i].count(call)
                            streams.setdefault((number, alike, call), []).append((sigma, call, answer(sigma, call)))
            for stream in streams.values():
                with fastdit.accelerate(model, config):
                    assert all(torch.equal(answer(sigma, call), together) for sigma, call, together in stream)

    fuzz(runs(), examples, check)


@lengths(30, 3000)
def test_a_rung_higher_is_no_fewer_tiles(examples):
    def check(drawn):
        policy, (_, grid, _, _, q, k, v) = drawn
        layout = layout_of(Config(tile=(1, 2, 2)), grid)
        n = math.prod(grid)
        tiles = [layout.to_tiles(x[:, :, :n]) for x in (q, k, v)]
        more, less = (p.select(layout, *tiles).double().mean() for p in (error_guard.denser(policy), policy))
        assert more >= less

    fuzz(st.tuples(SIMPLE, problems()), examples, check)


@lengths(30, 2000)
def test_configurations_survive_their_dictionaries(examples):
    def check(problem):
        config = problem[0]
        again = Config.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert hash(again) == hash(config)

    fuzz(problems(), examples, check)
