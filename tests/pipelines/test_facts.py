"""No adapter takes a run down: what a call lacks leaves it dense, with the reason."""

import dataclasses
import inspect

import diffusers
import pytest
import torch
from chequer import SPARSE
from families import CASES, each_family, ltx2_coords, ltx_coords
from models import GRID, given

import fastdit
from fastdit import Facts
from fastdit.core.reference import relative_error
from fastdit.pipelines.ltx import _backwards, raster
from fastdit.pipelines.registry import ADAPTERS


def parameters(case):
    """Of the denoiser's forward, by name."""
    return dict(list(inspect.signature(getattr(diffusers, case.cls).forward).parameters.items())[1:])


def same(facts, others):
    def plain(value):
        return value.tolist() if isinstance(value, torch.Tensor) else value

    return list(map(plain, facts)) == list(map(plain, others))


@pytest.mark.parametrize("cls", [cls for cls in ADAPTERS if hasattr(diffusers, cls)])
def test_names_are_the_forward_s_own(cls):
    names = ADAPTERS[cls].names
    assert tuple(inspect.signature(getattr(diffusers, cls).forward).parameters)[1 : len(names) + 1] == names


@each_family
def test_arguments_by_position_or_by_name(case):
    model, call = case.model(), case.call()
    adapter = ADAPTERS[case.cls]
    facts = adapter.facts(model, (), call)
    assert facts.missing is None
    args = tuple(call.get(key, parameter.default) for key, parameter in parameters(case).items())
    assert same(adapter.facts(model, args, {}), facts)


@each_family
@torch.no_grad()
def test_optional_arguments_left_out(case):
    """One by one, and None given for them: nothing is raised, and what stock answers without them, we answer."""
    model, adapter = case.model(), ADAPTERS[case.cls]
    optional = [key for key, parameter in parameters(case).items() if parameter.default is not inspect.Parameter.empty]
    for key in optional:
        for how in ("left out", "None"):
            call = {k: v for k, v in case.call().items() if k != key} | ({key: None} if how == "None" else {})
            if key == "return_dict" and how == "None":
                continue
            facts = adapter.facts(model, (), call)
            assert 0 <= float(facts.sigma.amax()) <= 1
            try:
                stock = answer(model, call)
            except Exception:  # stock needs the argument
                continue
            with fastdit.accelerate(model, "exact"):
                assert relative_error(answer(model, call), stock) < 1e-5, (key, how)


def answer(model, call):
    out = model(**call | {"return_dict": False})[0]
    return torch.stack(list(out)) if isinstance(out, (list, tuple)) else out


@each_family
def test_every_argument_left_out(case):
    """Required ones as well: what reads them must not be what complains."""
    model, adapter = case.model(), ADAPTERS[case.cls]
    for key in case.call():
        facts = adapter.facts(model, (), {k: v for k, v in case.call().items() if k != key})
        if key == adapter.clock:
            assert facts.missing == f"the call gives no {key}"
            assert facts.sigma.shape == ()
            assert float(facts.sigma) == 0
    assert adapter.facts(model, (), {}).missing is not None


def ltx(cls="LTXVideoTransformer3DModel"):
    case = next(case for case in CASES if case.cls == cls)
    return case, ADAPTERS[cls], case.model()


@pytest.mark.parametrize("given", [{}, {"num_frames": None, "height": 8, "width": 8}], ids=["left out", "None"])
def test_what_is_missing_is_named_and_the_noise_level_still_read(given):
    case, adapter, model = ltx()
    call = {key: value for key, value in case.call().items() if key not in ("num_frames", "height", "width")}
    facts = adapter.facts(model, (), call | given)
    assert facts.grid == (0, 0, 0)
    assert facts.missing == "the call gives no num_frames"
    assert facts.sigma.tolist() == [0.5, 0.5]


def test_arguments_of_another_kind():
    case, adapter, model = ltx()
    facts = adapter.facts(model, (), case.call() | {"num_frames": "three"})
    assert "the call's arguments are not those of the model's own pipelines" in facts.missing
    assert adapter.facts(model, (), case.call() | {"timestep": "late"}).missing is not None
    case, adapter, model = ltx("LTX2VideoTransformer3DModel")
    call = case.call() | {"num_frames": None, "video_coords": ltx_coords((3, 8, 8))}
    assert "video_coords do not say where tokens end" in adapter.facts(model, (), call).missing


def test_compiled_whole_what_is_missing_is_the_same():
    case, adapter, model = ltx()

    def read(**call):
        facts = adapter.facts(model, (), call)
        return facts.sigma, facts.missing

    for left in ("num_frames", "timestep"):
        torch._dynamo.reset()
        call = {key: value for key, value in case.call().items() if key != left}
        sigma, missing = torch.compile(read, backend="eager", fullgraph=True)(**call)
        assert missing == f"the call gives no {left}"
        assert torch.equal(sigma, read(**call)[0])


SIDES = [(3, 8, 8), (1, 4, 6), (2, 1, 5), (4, 3, 1), (1, 1, 1), (5, 2, 2)]


@pytest.mark.parametrize("grid", SIDES, ids=str)
def test_the_grid_in_ltx_s_coordinates(grid):
    """Conditions at any frame, several of them, of several frames, also before the clip's first: none counts as the video."""
    _, h, w = grid
    video = ltx_coords(grid)
    for conditions in ([], [8], [1, 9], [9, 1], [16, 17, 18], [-1], [-8, 3]):
        for frames in (1, 2):
            before = [ltx_coords((frames, h, w), frame) for frame in conditions]
            assert raster(_backwards(torch.cat([*before, video], 2)[0])).tolist() == list(grid), (conditions, frames)
    for behind in ([], [(2, 0)], [(1, -1)], [(1, 0), (2, 1), (1, -8)]):
        after = [ltx_coords((frames, h, w), frame) for frames, frame in behind]
        assert raster(torch.cat([video, *after], 2)[0]).tolist() == list(grid), behind


@pytest.mark.parametrize("grid", SIDES, ids=str)
def test_the_grid_in_ltx2_s_coordinates(grid):
    """Keyframes of any frame, also the last, and references of another resolution, also of one frame."""
    t, h, w = grid
    video = ltx2_coords(grid)
    further = [ltx2_coords((1, h, w), frame) for frame in range(1, 8 * (t - 1) + 1)]
    further += [ltx2_coords((t, h, w), size=64), ltx2_coords((1, 1, 1)), video]
    for more in further:
        for start in (0.0, 7.0):  # tiles of a longer clip begin at a frame of their own
            begins, ends = (torch.cat([video, more], 2)[0] - start).unbind(-1)
            assert raster(begins, ends).tolist() == list(grid)


def test_the_coordinates_are_those_of_diffusers():
    pipeline = pytest.importorskip("diffusers.pipelines.ltx.pipeline_ltx_condition").LTXConditionPipeline
    for grid, frame in (((3, 8, 8), 0), ((2, 4, 6), 9)):
        found = pipeline._scale_video_ids(pipeline._prepare_video_ids(2, *grid), frame_index=frame).float()
        found[:, 0] = found[:, 0] / 25
        assert torch.allclose(found, ltx_coords(grid, frame))
    if (cls := getattr(diffusers, "LTX2VideoTransformer3DModel", None)) is not None:
        case = next(case for case in CASES if case.cls == cls.__name__)
        assert torch.allclose(case.model().rope.prepare_video_coords(2, 3, 8, 8, "cpu", fps=25.0), ltx2_coords((3, 8, 8)))


def broken(call):
    raise LookupError(f"no clip among {len(call)} arguments")


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (broken, "LookupError: no clip among 3 arguments"),
        (lambda call: Facts(call["clap"].shape, call["percent"] / 100), "KeyError: 'clap'"),
        (lambda call: GRID, "TypeError: it must give Facts"),
        (lambda call: Facts(GRID, 0.5), "TypeError: it must give Facts"),
        (lambda call: Facts(GRID[1:], call["percent"] / 100), "TypeError: it must give Facts"),
    ],
)
def test_an_own_layout_that_fails(mine, how, why):
    stock = mine(*given())
    fastdit.install(mine, how, SPARSE)
    assert torch.equal(mine(*given()), stock)
    for site in fastdit.report(mine).sites:
        assert site.reason.startswith(f"the layout function fails: {why}")
    fastdit.install(mine, how, dataclasses.replace(SPARSE, strict=True))
    with pytest.raises(RuntimeError, match="the layout function fails"):
        mine(*given())
