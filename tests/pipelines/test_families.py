"""Every family on its real class: exact is stock, sparse is masked dense attention, and the tokens sit where the facts say."""

import inspect
import math
import re

import diffusers
import pytest
import torch
from chequer import SPARSE, TILE, Chequer, masked, token_mask
from families import CASES, each_family, name, run

import fastdit
from fastdit.core.layout import Layout
from fastdit.core.reference import relative_error
from fastdit.pipelines.registry import ADAPTERS, HOPELESS


def test_every_family_has_a_case():
    there = {cls for cls in ADAPTERS if hasattr(diffusers, cls)}
    assert {case.cls for case in CASES} == there - {"ConsisIDTransformer3DModel"}  # CogVideoX's twin


def denoisers():
    """Classes of diffusers whose forward is told how noisy its input is. ControlNets are told as well, and denoise nothing."""
    for each in dir(diffusers):
        cls = getattr(diffusers, each)
        if (
            inspect.isclass(cls)
            and issubclass(cls, diffusers.ModelMixin)
            and not re.search("ControlNet(Union)?Model|MultiControl", each)
        ):
            names = inspect.signature(cls.forward).parameters
            if any(name == "t" or re.search("time(step|_|$)", name) for name in names):
                yield cls


def test_every_denoiser_of_diffusers_is_known():
    """A class that a new release of diffusers brings is named here, until it is accelerated, or hopeless with the reason."""
    known = ADAPTERS.keys() | HOPELESS.keys()
    unknown = [cls.__name__ for cls in denoisers() if not known & {base.__name__ for base in cls.__mro__}]
    assert not unknown, unknown
    assert not ADAPTERS.keys() & HOPELESS.keys()
    assert {"WanTransformer3DModel", "UNet2DConditionModel", "HiDreamImageTransformer2DModel"} <= {
        cls.__name__ for cls in denoisers()
    }


@each_family
@torch.no_grad()
def test_exact_is_stock_and_sparse_is_the_masked_model(case):
    model = case.model()
    stock = run(model, case)
    assert bool(stock.isfinite().all())
    with fastdit.accelerate(model, "exact"):
        exact = run(model, case)
    assert torch.equal(exact, stock) if not case.trims else relative_error(exact, stock) < 1e-5

    with masked(case):
        expected = run(model, case)
    shows = relative_error(stock, expected)
    assert shows > 2e-5
    with fastdit.accelerate(model, SPARSE):
        sparse = run(model, case)
        report = fastdit.report(model)
    ran = [site for site in report.sites if site.ran == "sparse"]
    assert len(ran) == case.sites, {site.name: site.reason for site in report.sites}
    assert all(site.density < 1 for site in ran)
    assert relative_error(sparse, expected) < min(1e-4, shows / 10)
    assert torch.equal(run(model, case), stock)


@pytest.mark.parametrize("case", [case for case in CASES if case.axes], ids=name)
@torch.no_grad()
def test_tokens_sit_where_the_latents_are(case):
    """Changing the latents of one patch changes the keys of one token of the first layer: the one at its place in the grid."""
    model = case.model()
    call = case.call()
    latents = call[case.latents][0] if isinstance(call[case.latents], list) else call[case.latents]
    keys = []
    for changed in (False, True):
        seen = []
        x = latents.clone()
        grid, front, _ = next(iter(case.places.values()))
        at = tuple(side - 2 if side > 1 else 0 for side in grid)
        if changed:
            if "N" in case.axes:
                others = front if x.shape[1] > math.prod(grid) else 0  # conditions, among the latents
                x[:, others + (at[0] * grid[1] + at[1]) * grid[2] + at[2]] += 1
            else:
                index = [slice(None)] * x.ndim
                for axis, place, side in zip("THW", at, grid, strict=True):
                    if axis in case.axes:
                        patch = x.shape[case.axes.index(axis)] // side
                        index[case.axes.index(axis)] = slice(place * patch, (place + 1) * patch)
                x[tuple(index)] += 1
        with masked(case, seen):
            run(model, case, **{case.latents: [x] if isinstance(call[case.latents], list) else x})
        keys.append(seen[0])
    moved = (keys[0] != keys[1]).any(-1).any(1)[0].nonzero().flatten().tolist()
    _, before, _ = case.places[keys[0].shape[-2]]
    assert moved == [before + (at[0] * grid[1] + at[1]) * grid[2] + at[2]]


DATA_DEPENDENT = ("HunyuanVideo15", "Lumina2", "HiDreamImage", "ZImage", "BriaFibo2")
"""Families whose own forward is no one graph: it asks tensors for lengths, or makes them on a device of its own."""


@each_family
def test_compiled_whole_without_recompiling(case):
    torch._dynamo.reset()
    model = case.model()
    if name(case) in DATA_DEPENDENT:
        with pytest.raises(torch._dynamo.exc.TorchDynamoException), torch.no_grad():
            run(torch.compile(model, backend="eager", fullgraph=True), case)
        return
    fastdit.accelerate(model, SPARSE)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    call = case.call()
    key = "timestep" if "timestep" in call else "timesteps" if "timesteps" in call else "t"
    with torch.no_grad():
        first = run(compiled, case)
        with torch.compiler.set_stance("fail_on_recompile"):
            assert torch.equal(run(compiled, case), first)
            later = run(compiled, case, **{key: call[key] * 0.7 if call[key].is_floating_point() else call[key] - 100})
    assert not torch.equal(later, first)
    assert relative_error(first, run(model, case)) < 1e-5


def test_linear_attention_says_so():
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, sample_size=8,
    )  # fmt: skip
    assert "SanaTransformer2DModel" in HOPELESS
    with pytest.raises(ValueError, match="linear"):
        fastdit.accelerate(model)


def test_layout_of_the_test_is_the_library_s():
    """The mask by tokens, written down above, against the library's own from tiles."""
    from fastdit.core.reference import token_mask as by_tiles
    from fastdit.planning.forward_plan import complete

    for grid, before, after in [((3, 8, 8), 0, 5), ((1, 12, 8), 7, 0)]:
        layout = Layout(grid, TILE, before + after, before > 0)
        kept = complete(Chequer().select(layout), layout)
        assert torch.equal(by_tiles(layout, kept)[0, 0], token_mask(grid, before, after))
