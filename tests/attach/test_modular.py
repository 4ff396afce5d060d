"""Modular pipelines, which are no DiffusionPipelines: the one line, restore, report, and whose scheduler a run goes by."""

import diffusers
import pytest
import torch
from diffusers import guiders, modular_pipelines
from families import CASES
from util import modular, render_modular

import fastdit
from fastdit import Config, FastAttnProcessor, Phase, Window
from fastdit.api import denoisers_of
from fastdit.core.reference import relative_error

WHOLE = Config((Phase(policy=Window(size=(99, 99, 99))),), (1, 2, 2), min_tokens=0, max_density=1)
NARROW = Config((Phase(policy=Window(size=(1, 1, 1))),), (1, 2, 2), min_tokens=0, max_density=1)


def wan():
    return modular(guiders.ClassifierFreeGuidance(guidance_scale=4.0))


def of(cls):
    return next(case for case in CASES if case.cls == cls).model()


def test_one_line():
    pipe = wan()
    stock = render_modular(pipe, 4)
    pipe.set_attn_processor(FastAttnProcessor("exact"))
    assert torch.equal(render_modular(pipe, 4), stock)
    pipe.set_attn_processor(FastAttnProcessor(WHOLE))
    assert relative_error(render_modular(pipe, 4), stock) < 1e-5
    report = fastdit.report(pipe)
    assert {site.ran for site in report.sites} == {"sparse"}
    assert len({ran.sigma for _, ran in report.calls}) == 4
    fastdit.restore(pipe)
    with pytest.raises(ValueError, match="is not accelerated"):
        fastdit.report(pipe)
    with fastdit.accelerate(pipe, NARROW):
        assert not torch.equal(render_modular(pipe, 4), stock)
    assert torch.equal(render_modular(pipe, 4), stock)


def test_a_processor_of_diffusers_goes_where_it_always_went():
    pipe = wan()
    other = type(pipe.transformer.blocks[0].attn1.processor)()
    pipe.set_attn_processor(other)
    assert pipe.transformer.blocks[0].attn1.processor is other


def test_two_pipelines_on_one_model_each_go_by_their_own_scheduler():
    first, second = wan(), wan()
    second.update_components(transformer=first.transformer)
    alone = render_modular(second, 6)
    handle = fastdit.accelerate(first, "exact")
    for pipe, steps in ((first, 4), (second, 6), (first, 4)):
        out = render_modular(pipe, steps)
        assert handle.latest.pipeline is pipe
        assert torch.equal(out, alone) if pipe is second else bool(out.isfinite().all())
        assert len({ran.step for _, ran in fastdit.report(pipe).calls}) == steps
    assert len({ran.step for _, ran in fastdit.report(second).calls}) == 6


def test_a_failed_call_leaves_no_pipeline_behind():
    from fastdit.pipelines.modular import _running

    with pytest.raises(TypeError, match="NoneType"):
        wan()(no_such_input=1, output="no_such_output")
    assert _running.pipelines == []


class Parts:
    """Whatever holds components, as pipelines do."""

    def __init__(self, **parts):
        self.__dict__.update(parts)


def test_denoisers_are_found_by_what_they_are():
    case = "MiniMaxH3Transformer3DModel"
    if not hasattr(diffusers, case):
        pytest.skip("this diffusers has no MiniMax-H3")
    one, two, text = of(case), of(case), torch.nn.Linear(2, 2)
    pipe = Parts(text_encoder=text, transformer=one, transformer_ref=torch.compile(two), scheduler=None, _old=of(case))
    assert [name for name, _ in denoisers_of(pipe)] == ["transformer", "transformer_ref"]
    handle = fastdit.accelerate(pipe, "exact")
    assert [denoiser.name for denoiser in handle.denoisers] == ["transformer", "transformer_ref"]
    fastdit.restore(pipe)
    assert [name for name, _ in denoisers_of(Parts(transformer=one, unconditional_transformer=two))][1:] == [
        "unconditional_transformer"
    ]
    mine = torch.nn.Linear(2, 2)
    assert denoisers_of(Parts(drawer=mine)) == []
    assert denoisers_of(Parts(transformer=mine)) == [("transformer", mine)]  # to be named as unknown
    with pytest.raises(ValueError, match="no other component is of a class that fastdit knows"):
        fastdit.accelerate(Parts(drawer=mine), "exact")


@pytest.mark.parametrize("pipeline", ["FluxBlocks", "WanBlocks"])
def test_the_line_is_there_for_every_modular_pipeline(pipeline):
    if (blocks := getattr(modular_pipelines, pipeline, None)) is None:
        blocks = getattr(modular_pipelines, "FluxAutoBlocks", None)
    if blocks is None:
        pytest.skip("this diffusers has no such blocks")
    pipe = blocks().init_pipeline()
    with pytest.raises(ValueError, match="has no denoiser"):
        pipe.set_attn_processor(FastAttnProcessor())
