import gc
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from models import wan, wan_inputs

import fastdit
from fastdit import Config, FastAttnProcessor, Phase, Window
from fastdit.attach.handle import Handle, _handles
from fastdit.attach.processor import BoundProcessor, installed

SPARSE = Config(phases=(Phase(policy=Window(size=(1, 1, 1))),), tile=(1, 4, 4), min_tokens=0)


def pipeline(two=False):
    """A WanPipeline around `wan()`; text encoder and decoder are not needed to move processors about."""
    parts = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True]),
    }
    return WanPipeline(
        transformer=wan(),
        transformer_2=wan() if two else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        **parts,
    )


def state(model):
    """Everything an installation could leave behind, by identity."""
    return (
        [(name, id(module.processor)) for name, module in model.named_modules() if hasattr(module, "processor")],
        list(model._forward_pre_hooks.values()),
        list(model._forward_pre_hooks_with_kwargs),
        sorted(vars(model)),
    )


@pytest.mark.parametrize(
    "install",
    [
        lambda pipe: pipe.set_attn_processor(FastAttnProcessor()),
        lambda pipe: pipe.transformer.set_attn_processor(FastAttnProcessor("fast")),
        lambda pipe: fastdit.accelerate(pipe),
        lambda pipe: fastdit.accelerate(pipe, SPARSE),
        lambda pipe: fastdit.accelerate(pipe.transformer, "exact"),
        lambda pipe: [fastdit.accelerate(pipe, name) for name in fastdit.PRESETS],
    ],
)
def test_restore_gives_back_the_very_same_objects(install):
    pipe = pipeline()
    before, keep = state(pipe.transformer), list(pipe.transformer.attn_processors.values())
    install(pipe)
    assert any(isinstance(p, BoundProcessor) for p in pipe.transformer.attn_processors.values())
    fastdit.restore(pipe)
    assert state(pipe.transformer) == before
    assert list(pipe.transformer.attn_processors.values()) == keep


def test_context_manager_restores_after_an_exception():
    pipe = pipeline()
    before = state(pipe.transformer)
    with pytest.raises(KeyboardInterrupt), fastdit.accelerate(pipe, "fast") as handle:
        assert isinstance(handle, Handle)
        assert installed(pipe.transformer).handle is handle
        raise KeyboardInterrupt
    assert state(pipe.transformer) == before


def test_both_denoisers_of_wan_2_2_share_a_handle():
    pipe = pipeline(two=True)
    handle = fastdit.accelerate(pipe, SPARSE)
    assert installed(pipe.transformer).handle is installed(pipe.transformer_2).handle is handle
    with torch.no_grad():
        pipe.transformer(**wan_inputs(sigma=0.9))
        pipe.transformer_2(**wan_inputs(sigma=0.4))
    assert (handle.runs, handle.clock.step) == (1, 1)
    assert [site.ran for site in fastdit.report(pipe).sites] == ["sparse"] * 4


def test_a_new_configuration_replaces_the_old_one():
    pipe = pipeline()
    fastdit.accelerate(pipe, "balanced")
    fastdit.accelerate(pipe, SPARSE)
    processors = [p for p in pipe.transformer.attn_processors.values() if isinstance(p, BoundProcessor)]
    assert len(processors) == 2
    assert not any(isinstance(p.inner, BoundProcessor) for p in processors)
    assert fastdit.report(pipe).config == SPARSE
    assert len(pipe.transformer._forward_pre_hooks) == 1


def test_inference_mode_gives_the_same():
    """Its tensors count no versions, and none of them may be left where a run outside would change it."""
    pipe = pipeline()
    config = replace(SPARSE, phases=(replace(SPARSE.phases[0], reuse=fastdit.Reuse("residual", refresh=2)),), error_budget=0.5)
    runs = []
    with fastdit.accelerate(pipe, config):
        for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
            with mode():
                runs.append([pipe.transformer(**wan_inputs(sigma=sigma))[0].clone() for sigma in (0.9, 0.6, 0.3)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_two_pipelines_do_not_meet():
    one, two = pipeline(), pipeline()
    fastdit.accelerate(one, SPARSE)
    fastdit.accelerate(two, "exact")
    with torch.no_grad():
        for sigma in (0.9, 0.5):
            for pipe in (one, two):
                pipe.transformer(**wan_inputs(sigma=sigma))
    assert [site.ran for site in fastdit.report(one).sites] == ["sparse"] * 2
    assert [site.ran for site in fastdit.report(two).sites] == ["dense"] * 2
    assert all(installed(p.transformer).handle.clock.step == 1 for p in (one, two))


def test_other_processors_go_where_they_always_went():
    pipe = pipeline()
    fastdit.accelerate(pipe)
    pipe.set_attn_processor(WanAttnProcessor())
    assert all(type(p) is WanAttnProcessor for p in pipe.transformer.attn_processors.values())
    assert not pipe.transformer._forward_pre_hooks


def test_a_compiled_model_is_found_under_its_wrapper():
    pipe = pipeline()
    plain = pipe.transformer
    pipe.transformer = torch.compile(plain, backend="eager")
    fastdit.accelerate(pipe, SPARSE)
    assert installed(plain) is not None
    fastdit.restore(pipe)
    assert installed(plain) is None


def test_the_handle_goes_with_the_pipeline():
    pipe = pipeline()
    handle = weakref.ref(fastdit.accelerate(pipe))
    number = handle().number
    del pipe
    gc.collect()
    assert handle() is None
    assert number not in _handles


def test_saving_and_state_dict_do_not_see_us(tmp_path):
    model = wan()
    keys = list(model.state_dict())
    fastdit.accelerate(model)
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    assert list(type(model).from_pretrained(tmp_path).state_dict()) == keys


def test_the_report_is_a_table_and_a_dict():
    model = wan()
    fastdit.accelerate(
        model,
        Config(phases=(Phase((1.0, 0.9)), Phase((0.9, 0.5), Window(size=(1, 1, 1)))), tile=(1, 4, 4), min_tokens=0),
    )
    with torch.no_grad():
        for sigma in (1.0, 0.7, 0.6, 0.3):
            model(**wan_inputs(sigma=sigma))
    report = fastdit.report(model)
    got = report.to_dict()
    assert [(p["sigma"], p["calls"], round(p["density"], 4)) for p in got["phases"]] == [
        ([1.0, 0.9], 2, 1.0),
        ([0.9, 0.5], 4, 0.0833),
        ([1.0, 0.0], 2, 1.0),
    ]
    assert got["density"] == pytest.approx((4 + 4 / 12) / 8)
    assert [site["name"] for site in got["sites"]] == ["blocks.0.attn1", "blocks.1.attn1"]
    assert Config.from_dict(got["config"]) == report.config
    for word in ("0.9 … 0.5", "window(1×1×1, clamp)", "2 sites mixed", "density over all calls: 0.542"):
        assert word in str(report)


def test_a_run_that_was_never_made_says_so():
    model = wan()
    fastdit.accelerate(model)
    assert "not called yet" in str(fastdit.report(model))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastdit.accelerate(wan(), "quick"), "unknown preset 'quick'"),
        (lambda: FastAttnProcessor("quick"), "unknown preset 'quick'"),
        (lambda: fastdit.accelerate(wan(), 3), "a preset's name, a JSON file or a fastdit.Config"),
        (lambda: fastdit.accelerate(torch.nn.Linear(1, 1)), "does not know where Linear keeps its tokens"),
        (lambda: fastdit.accelerate(object()), "object has no denoiser"),
        (lambda: fastdit.report(wan()), "not accelerated"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_failed_call_leaves_the_pipeline_as_it_was():
    pipe = pipeline()
    handle = fastdit.accelerate(pipe, SPARSE)
    before = state(pipe.transformer)
    with pytest.raises(ValueError, match="unknown preset"):
        fastdit.accelerate(pipe, "quick")
    assert state(pipe.transformer) == before
    assert installed(pipe.transformer).handle is handle


def test_our_processor_alone_is_no_processor():
    with pytest.raises(RuntimeError, match="set_attn_processor"):
        FastAttnProcessor()(None, None)


LATE = """
import sys
{imports}
from fastdit.pipelines import embedded
from fastdit.runs import loops

pipe = embedded.load()
assert "fastdit.api" not in sys.modules

def in_the_loop(pipe, step, time, kwargs):
    if step == 0:
        {accelerate}
        assert loops.loop().pipeline is pipe
    return kwargs

pipe("a red ball", num_frames=5, height=32, width=32, num_inference_steps=3, callback_on_step_end=in_the_loop)
assert fastdit.report(pipe).calls
assert loops.loop() is None
fastdit.restore(pipe)
"""


@pytest.mark.parametrize(
    ("imports", "accelerate"),
    [
        ("import fastdit, diffusers", "pipe.set_attn_processor(fastdit.FastAttnProcessor())"),
        ("from diffusers import DiffusionPipeline; import fastdit", "fastdit.accelerate(pipe)"),
        ("import fastdit", "pipe.transformer.set_attn_processor(fastdit.FastAttnProcessor())"),
    ],
)
def test_diffusers_knows_fastdit_before_any_of_its_names_is_used(imports, accelerate):
    """In whichever order they are imported, and also about a loop that began before the first use."""
    code = LATE.format(imports=imports, accelerate=accelerate)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("imports", ["import fastdit, diffusers", "import diffusers, fastdit"])
def test_pipelines_have_the_method_before_any_name_of_fastdit_is_used(imports):
    code = (
        f"{imports}\n"
        "for name in ('DiffusionPipeline', 'WanPipeline', 'ModularPipeline', 'WanModularPipeline'):\n"
        "    print(getattr(diffusers, name).set_attn_processor.__module__)\n"
        "print(diffusers.WanTransformer3DModel.set_attn_processor.__wrapped__.__module__)\n"
        "import sys; print('fastdit.api' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["fastdit.diffusers_hooks"] * 4 + ["diffusers.models.attention", "False"], done.stderr


def test_importing_fastdit_is_light():
    code = (
        "import sys, fastdit; assert 'FastAttnProcessor' in dir(fastdit); assert not hasattr(fastdit, 'nothing')\n"
        "fastdit.preset('fps'), repr(fastdit.PRESETS)\n"
        "print([m for m in ('torch', 'diffusers', 'numpy') if m in sys.modules])\n"
        "fastdit.ops.attention, fastdit.pipelines, fastdit.Report"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
