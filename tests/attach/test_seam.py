"""What meets a bound processor, in diffusers and elsewhere: lookups by class, interception, autocast, pickles, exchanges."""

import copy
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import torch
from diffusers import LayerSkipConfig
from diffusers.hooks import apply_layer_skip
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import CROSS_ATTENTION_PROCESSORS, AttnProcessor, AttnProcessor2_0
from families import BY_NAME, CASES, each_family, name, run
from models import wan, wan_inputs
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from util import environment

import fastdit
from fastdit import Config, Phase, Window
from fastdit.attach import seam
from fastdit.attach.processor import BoundProcessor, installed
from fastdit.core.reference import relative_error
from fastdit.planning.adapter import Facts

SPARSE = Config((Phase(policy=Window(size=(1, 1, 1))),), (1, 2, 2), min_tokens=0, max_density=1)
WHOLE = Config((Phase(policy=Window(size=(99, 99, 99))),), (1, 2, 2), min_tokens=0, max_density=1)
STRICT = Config(SPARSE.phases, SPARSE.tile, min_tokens=0, max_density=1, strict=True)
UNET = BY_NAME["UNet2DCondition"]


# Lookups by class ------------------------------------------------------------------------------------------------------------


@each_family
def test_a_bound_class_answers_as_its_original(case):
    model = case.model()
    before = {place: type(module.processor) for place, module in model.named_modules() if hasattr(module, "processor")}
    attributes = {place: set(dir(module.processor)) for place, module in model.named_modules() if hasattr(module, "processor")}
    fastdit.accelerate(model, "exact")
    bound = 0
    for place, module in model.named_modules():
        if not hasattr(module, "processor"):
            continue
        processor, original = module.processor, before[place]
        bound += isinstance(processor, BoundProcessor)
        assert isinstance(processor, original)
        assert processor.__class__ == original
        assert original == processor.__class__
        assert processor.__class__ in {original: 1}
        assert processor.__class__ in (str, original)
        assert inspect.signature(processor.__call__) == inspect.signature(original.__call__.__get__(processor))
        assert attributes[place] <= set(dir(processor))
        processor._attention_backend = "native"
        assert getattr(processor, "inner", processor)._attention_backend == "native"
    assert bound == len(fastdit.report(model).sites)


def test_lookups_of_diffusers():
    model = UNET.model()
    fastdit.accelerate(model, "exact")
    bound = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1.processor
    assert AttentionProcessorRegistry.get(bound.__class__) is AttentionProcessorRegistry.get(AttnProcessor2_0)
    assert bound.__class__ in CROSS_ATTENTION_PROCESSORS or AttnProcessor2_0 not in CROSS_ATTENTION_PROCESSORS
    assert type(bound)().inner.__class__ is AttnProcessor2_0
    assert type(bound).__name__ != "AttnProcessor2_0", "nobody takes one for the other in a traceback"
    fastdit.accelerate(wan(), "exact")
    assert bound.__class__ not in (type(wan().blocks[0].attn1.processor), str)


def test_back_to_the_default():
    """`set_default_attn_processor` looks every processor up and then sets one for all."""
    model, stock = UNET.model(), UNET.model()
    fastdit.accelerate(model, SPARSE)
    model.set_default_attn_processor()
    stock.set_default_attn_processor()
    assert torch.equal(run(model, UNET), run(stock, UNET))


# Interception ----------------------------------------------------------------------------------------------------------------

SKIPS = {
    "scores": {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
    "attention": {"skip_attention": True, "skip_ff": False},
    "block": {"skip_attention": True, "skip_ff": True},
    "feed forward": {"skip_attention": False, "skip_ff": True},
}
STACKS = (
    "transformer_blocks", "blocks", "layers", "single_transformer_blocks", "temporal_transformer_blocks",
    "visual_transformer_blocks",
)  # fmt: skip


def stack(model):
    """Name of a stack of blocks of the model: diffusers' own search among them depends on the hash seed."""
    if hasattr(model, "mid_block"):
        return "mid_block.attentions.0.transformer_blocks"
    return next((each for each in STACKS if isinstance(getattr(model, each, None), torch.nn.ModuleList)), None)


@pytest.mark.parametrize("what", SKIPS)
@each_family
@torch.no_grad()
def test_layers_skipped_by_guidance(case, what):
    """As on the stock model, in whichever order both were installed; where diffusers itself cannot, the same error."""
    fqn = stack(case.model())
    if fqn is None:
        pytest.skip("no stack of blocks that diffusers could skip layers of")

    def answer(config=None, first="fastdit"):
        model = case.model()
        if config is not None and first == "fastdit":
            fastdit.accelerate(model, config)
        try:
            apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn=fqn, **SKIPS[what]))
            if config is not None and first == "skip":
                fastdit.accelerate(model, config)
            return run(model, case)
        except Exception as error:  # diffusers' own, of many kinds: that it is the same one is what is tested
            return type(error)

    stock = answer()
    for first in ("fastdit", "skip"):
        for config, most in (("exact", 1e-5 if case.trims else 0.0), (WHOLE, 1e-5)):
            found = answer(config, first)
            if isinstance(stock, type):
                assert found is stock or issubclass(found, (ValueError, KeyError))  # diffusers remembers failed look-ups
            else:
                assert relative_error(found, stock) <= most


class Values(TorchFunctionMode):
    """Instead of attention, its values: what diffusers' perturbed attention does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            query, _, value = args[:3] if len(args) > 2 else (kwargs[name] for name in ("query", "key", "value"))
            if query.shape[2] == value.shape[2]:  # no cross-attention
                return value
        return func(*args, **kwargs or {})


@torch.no_grad()
def test_any_mode_around_attention_acts_and_is_reported():
    model, stock = wan(), wan()
    fastdit.accelerate(model, SPARSE)
    with Values():
        assert torch.equal(model(**wan_inputs())[0], stock(**wan_inputs())[0])
    report = fastdit.report(model)
    assert {(site.ran, site.reason) for site in report.sites} == {("dense", "Values may change attention")}
    with torch.device("cpu"):  # a mode too, but of no consequence here
        model(**wan_inputs(sigma=0.4))
    assert [ran.how for _, ran in fastdit.report(model).calls] == ["dense"] * 2 + ["sparse"] * 2
    fastdit.accelerate(model, STRICT)
    with Values(), pytest.raises(RuntimeError, match=r"blocks.0.attn1: Values may change attention \(strict"):
        model(**wan_inputs())


# Autocast and dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.bfloat16) for case in CASES]
    + [(BY_NAME[each], torch.float16) for each in ("Wan", "Flux", "UNet2DCondition")],
    ids=lambda each: str(each) if isinstance(each, torch.dtype) else name(each),
)
@torch.no_grad()
def test_autocast(case, dtype):
    def answer(config=None):
        model = case.model()
        if config is not None:
            fastdit.accelerate(model, config)
        with torch.autocast("cpu", dtype=dtype):
            return run(model, case), model

    try:
        stock, _ = answer()
    except RuntimeError as error:
        pytest.skip(f"diffusers itself: {error}")
    exact, _ = answer("exact")
    assert exact.dtype == stock.dtype
    assert torch.equal(exact, stock) if not case.trims else relative_error(exact, stock) < 0.02
    whole, model = answer(WHOLE)
    assert whole.dtype == stock.dtype
    assert relative_error(whole, stock) < 0.05
    assert sum(site.ran == "sparse" for site in fastdit.report(model).sites) >= min(case.sites, 1)
    assert answer(SPARSE)[0].isfinite().all() == stock.isfinite().all()


@torch.no_grad()
def test_mixed_dtypes_without_autocast_are_left_to_the_model():
    class Mixed(type(wan().blocks[0].attn1.processor)):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            q, k, v = (f(hidden_states).unflatten(2, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v))
            return attn.to_out[0](dispatch_attention_fn(q, k, v.double()).flatten(2).to(hidden_states.dtype))

    model = wan()
    for block in model.blocks:
        block.attn1.set_processor(Mixed())
    with pytest.raises(RuntimeError):
        model(**wan_inputs())  # stock
    fastdit.accelerate(model, SPARSE)
    with pytest.raises(RuntimeError, match="dtype"):  # PyTorch's own words, as in stock
        model(**wan_inputs())
    assert "of different dtypes" in fastdit.report(model).sites[0].reason


# Pickles and copies ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_model_is_the_stock_model(tmp_path):
    model, stock = wan(), wan()
    expected = stock(**wan_inputs())[0]
    fastdit.accelerate(model, SPARSE)
    fast = model(**wan_inputs())[0]
    torch.save(model, tmp_path / "model.pt")
    for twin in (torch.load(tmp_path / "model.pt", weights_only=False), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(**wan_inputs())[0], expected)
        assert type(twin.blocks[0].attn1.processor) is type(stock.blocks[0].attn1.processor)
    assert torch.equal(copy.deepcopy(model)(**wan_inputs())[0], fast)
    fastdit.restore(model)
    assert torch.equal(model(**wan_inputs())[0], expected)


def test_it_loads_where_fastdit_is_not_installed(tmp_path):
    model = wan()
    fastdit.accelerate(model, SPARSE)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    (tmp_path / "model.pt").write_bytes(buffer.getvalue())
    code = f"""
import sys, torch
sys.modules["fastdit"] = None
torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


# Other processors, and what they are given -----------------------------------------------------------------------------------


class ByHand:
    """Attention without the functions that fastdit stands for."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k, v = (f(hidden_states).unflatten(2, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v))
        return attn.to_out[0](scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@torch.no_grad()
def test_a_processor_that_never_reaches_the_seam():
    model = wan()
    for block in model.blocks:
        block.attn1.set_processor(ByHand())
    stock = model(**wan_inputs())[0]
    fastdit.accelerate(model, SPARSE)
    assert torch.equal(model(**wan_inputs())[0], stock)
    sites = fastdit.report(model).sites
    assert {(site.ran, site.reason) for site in sites} == {("dense", "its processor computes attention by itself")}
    fastdit.accelerate(model, STRICT)
    with pytest.raises(RuntimeError, match="computes attention by itself"):
        model(**wan_inputs())


@torch.no_grad()
def test_processors_exchanged_one_by_one():
    """As attention slicing does. The report is of the run after it, not of the one before."""
    model = UNET.model()
    stock = run(model, UNET)
    fastdit.accelerate(model, SPARSE)
    assert relative_error(run(model, UNET), stock) > 0.01
    model.set_attention_slice("auto")
    assert relative_error(run(model, UNET), stock) < 1e-5
    report = fastdit.report(model)
    assert report.density == 1
    assert {(site.ran, site.reason) for site in report.sites} == {
        ("dense", "its processor was exchanged for SlicedAttnProcessor since")
    }
    fastdit.restore(model)
    fastdit.accelerate(model, STRICT)
    model.set_attention_slice("auto")
    with pytest.raises(RuntimeError, match="exchanged for SlicedAttnProcessor"):
        run(model, UNET)


@torch.no_grad()
def test_a_dictionary_of_the_users_is_obeyed():
    model = UNET.model()
    fastdit.accelerate(model, SPARSE)
    mine = {place: AttnProcessor() for place in model.attn_processors}
    model.set_attn_processor(dict(mine))
    assert all(processor is mine[place] for place, processor in model.attn_processors.items())
    fastdit.accelerate(model, SPARSE)
    one = next(place for place in model.attn_processors if "attn1" in place)
    model.set_attn_processor(model.attn_processors | {one: mine[one]})
    run(model, UNET)
    assert (
        sum(site.reason is not None and "exchanged for AttnProcessor" in site.reason for site in fastdit.report(model).sites)
        == 1
    )


@torch.no_grad()
def test_attention_kwargs_of_a_processor_are_passed_on(monkeypatch):
    seen = []

    class Sliding(type(wan().blocks[0].attn1.processor)):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            q, k, v = (f(hidden_states).unflatten(2, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v))
            return attn.to_out[0](dispatch_attention_fn(q, k, v, attention_kwargs={"window": (64, 64)}).flatten(2))

    def original(q, k, v, mask, dropout, causal, scale, gqa, attention_kwargs, **more):
        seen.append(attention_kwargs)
        return dispatch_attention_fn(q, k, v, **more)

    monkeypatch.setattr(seam, "dispatch_attention_fn", original)
    model = wan()
    for block in model.blocks:
        block.attn1.set_processor(Sliding())
    fastdit.accelerate(model, SPARSE)
    model(**wan_inputs())
    assert seen == [{"window": (64, 64)}] * 2
    assert "passes window on to the attention backend" in fastdit.report(model).sites[0].reason


@torch.no_grad()
def test_what_an_adapter_lacks_is_reported():
    model = wan()
    stock = model(**wan_inputs())[0]
    fastdit.accelerate(model, SPARSE)
    denoiser = installed(model)
    facts = denoiser.adapter.facts
    lacking = type("Lacking", (), {"facts": staticmethod(lambda *a: Facts((0, 0, 0), facts(*a).sigma, missing="no grid"))})
    denoiser.adapter = lacking()
    assert torch.equal(model(**wan_inputs())[0], stock)
    assert {(site.ran, site.reason) for site in fastdit.report(model).sites} == {("dense", "no grid")}


# Sizes -----------------------------------------------------------------------------------------------------------------------

GRIDS = (
    (1, 4, 4), (3, 8, 8), (3, 6, 10), (5, 7, 9), (2, 12, 12), (2, 5, 9), (3, 4, 11), (4, 9, 7), (2, 6, 7), (3, 10, 5),
    (2, 8, 11), (3, 9, 9),
)  # fmt: skip


@pytest.mark.parametrize("how", ["whole", "by block"])
@pytest.mark.parametrize("config", ["exact", SPARSE], ids=["exact", "window"])
@torch.no_grad()
def test_no_size_is_a_constant_of_a_compiled_graph(how, config):
    graphs = {}
    for accelerated in (False, True):
        torch._dynamo.reset()
        model, counter = wan(), CompileCounter()
        if accelerated:
            fastdit.accelerate(model, config)
        if how == "whole":
            model.compile(backend=counter, fullgraph=True, dynamic=True)
        else:
            model.compile_repeated_blocks(backend=counter, fullgraph=True, dynamic=True)
        for grid in GRIDS:
            model(**wan_inputs(grid))
        graphs[accelerated] = counter.frame_count
    hooks = graphs[False] if how == "whole" else 0  # the pre-hook is a frame of its own, compiled as often as the forward
    assert graphs[True] <= graphs[False] + hooks
