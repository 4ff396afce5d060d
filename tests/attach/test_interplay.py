"""What diffusers offers beside attention keeps working: caches, LoRA, fused projections, offloading, casting, adapters, copies.

Each feature is held against itself on the stock model whose attention is masked to the same tiles, bit for bit where nothing
reorders a sum.
"""

import contextlib
import copy
import inspect

import diffusers
import pytest
import torch
from chequer import SPARSE, masked
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from families import BY_NAME, run

import fastdit
from fastdit.attach.processor import BoundProcessor
from fastdit.core.reference import relative_error

DITS = ("Wan", "Flux", "HunyuanVideo", "CogVideoX", "LTXVideo", "QwenImage", "SD3", "PixArt", "UNet2DCondition")
needs_accelerator = pytest.mark.skipif(
    diffusers.__version__.startswith("0.37"), reason="diffusers 0.37 offloads groups only where there is an accelerator"
)
STEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
NOW = [0]
"""The timestep of the running call, which some caches ask for."""


def denoise(model, case, steps=STEPS):
    """A few steps at falling noise levels, as a pipeline calls them; all answers."""
    call = case.call()
    found = []
    with torch.no_grad():
        for level in steps:
            NOW[0] = int(1000 * level)
            key = "timestep" if "timestep" in call else "t"
            timestep = call[key] * 0 + level * (1 if float(call[key].max()) <= 1 else 1000)
            context = model.cache_context("cond") if hasattr(model, "cache_context") else contextlib.nullcontext()
            with context:
                found.append(run(model, case, **{key: timestep.to(call[key].dtype)}))
    return torch.stack(found)


def same(found, expected, case):
    return relative_error(found, expected) < 1e-4 if case.trims else relative_error(found, expected) < 1e-5


CACHES = {
    "first block": lambda: FirstBlockCacheConfig(threshold=0.5),
    "taylor": lambda: TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=1,
        max_order=1,
        cache_identifiers=[r"(transformer_)?blocks\.\d+\.attn1?"],  # its own patterns know nothing of an attn1
    ),
    "mag": lambda: MagCacheConfig(
        num_inference_steps=6, mag_ratios=torch.ones(6), threshold=0.5, max_skip_steps=2, retention_ratio=0.2
    ),
    "broadcast": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 801),
        current_timestep_callback=lambda: NOW[0],
        spatial_attention_block_identifiers=("blocks", "transformer_blocks"),
    ),
    "faster": lambda: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 681),
        current_timestep_callback=lambda: NOW[0],
        is_guidance_distilled=True,
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BCFHW",
    ),
}


@pytest.mark.parametrize("first", ["cache first", "fastdit first"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["Wan", "Flux", "HunyuanVideo", "CogVideoX", "LTXVideo", "QwenImage"])
def test_step_caches(family, cache, first):
    """The same answers as the cache gives on the masked model, and the same calls skipped."""
    case = BY_NAME[family]
    stock = case.model()
    stock.enable_cache(CACHES[cache]())
    seen = []
    with masked(case, seen):
        expected = denoise(stock, case)

    model = case.model()
    if first == "cache first":
        model.enable_cache(CACHES[cache]())
    fastdit.accelerate(model, SPARSE)
    if first == "fastdit first":
        model.enable_cache(CACHES[cache]())
    found = denoise(model, case)
    assert same(found, expected, case)
    sites = len(fastdit.report(model).sites)
    assert len(fastdit.report(model).calls) == len(seen)
    if cache != "first block":  # which judges what it sees, and random weights may not please it
        assert len(seen) < sites * len(STEPS)


@pytest.mark.parametrize("family", [family for family in DITS if family != "PixArt"])  # which takes no adapters
def test_lora(family):
    from peft import LoraConfig

    case = BY_NAME[family]
    settings = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)

    def with_lora(model):
        torch.manual_seed(3)
        model.add_adapter(copy.deepcopy(settings))
        return model

    with masked(case):
        plain, expected = run(case.model(), case), run(with_lora(case.model()), case)
    assert relative_error(plain, expected) > 1e-3
    model = case.model()
    fastdit.accelerate(model, SPARSE)
    assert same(run(with_lora(model), case), expected, case)
    model.disable_adapters()
    assert same(run(model, case), plain, case)
    model.enable_adapters()
    assert same(run(model, case), expected, case)
    model.delete_adapters(["default"])
    assert same(run(model, case), plain, case)


FUSED = [family for family in DITS if family != "SD3"]  # dual blocks and fused projections do not go together in diffusers


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("family", FUSED)
def test_fused_projections(family, order):
    case = BY_NAME[family]
    with masked(case):
        expected = run(case.model(), case)
    model = case.model()
    if order == "before":
        model.fuse_qkv_projections()
    fastdit.accelerate(model, SPARSE)
    if order == "after":
        model.fuse_qkv_projections()
    assert same(run(model, case), expected, case)
    assert fastdit.report(model).density < 1
    if hasattr(model, "unfuse_qkv_projections"):
        model.unfuse_qkv_projections()
        assert same(run(model, case), expected, case)
    fastdit.restore(model)
    assert not any(isinstance(getattr(m, "processor", None), BoundProcessor) for m in model.modules())
    stock = case.model()
    assert same(run(model, case), run(stock, case), case)


def test_restore_while_fused_then_unfuse():
    """What diffusers keeps to give back after fusing must not bring us back after restore."""
    case = BY_NAME["UNet2DCondition"]
    model = case.model()
    fastdit.accelerate(model, SPARSE)
    model.fuse_qkv_projections()
    fastdit.restore(model)
    model.unfuse_qkv_projections()
    assert not any(isinstance(processor, BoundProcessor) for processor in model.attn_processors.values())
    assert relative_error(run(model, case), run(case.model(), case)) < 1e-6


BY_BLOCK = ("Flux", "HunyuanVideo", "HunyuanVideo15", "LTXVideo", "QwenImage", "Lumina2", "ZImage", "UNet2DCondition")


@pytest.mark.parametrize("family", BY_BLOCK)
def test_compiled_by_block(family):
    """No graph is added after the first step, also in models whose own forward is no one graph."""
    case = BY_NAME[family]
    model, levels = case.model(), STEPS[:3]
    if not getattr(model, "_repeated_blocks", None):
        pytest.skip("this diffusers does not say which blocks of the model repeat")
    fastdit.accelerate(model, SPARSE)
    eager = denoise(model, case, levels)
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    first = denoise(model, case, levels[:1])
    with torch.compiler.set_stance("fail_on_recompile"):
        rest = denoise(model, case, levels[1:])
    assert relative_error(torch.cat([first, rest]), eager) < 1e-5
    assert fastdit.report(model).density < 1


@needs_accelerator
@pytest.mark.parametrize("family", DITS)
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offloading(family, kind):
    from diffusers.hooks import apply_group_offloading

    case = BY_NAME[family]
    with masked(case):
        expected = run(case.model(), case)
    model = case.model()
    fastdit.accelerate(model, SPARSE)
    cpu = torch.device("cpu")
    apply_group_offloading(model, cpu, cpu, kind, **({"num_blocks_per_group": 1} if kind == "block_level" else {}))
    assert same(run(model, case), expected, case)


@pytest.mark.parametrize("family", DITS)
def test_layerwise_casting(family):
    case = BY_NAME[family]

    def cast(model):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        return model

    with masked(case):
        expected = run(cast(case.model()), case)
    model = cast(case.model())
    fastdit.accelerate(model, SPARSE)
    assert same(run(model, case), expected, case)


@pytest.mark.parametrize("family", DITS)
def test_copies_saved_models_and_checkpointing(family, tmp_path):
    """With `exact` installed a model is what it was: copied, saved and loaded, cast, checkpointed."""
    case = BY_NAME[family]
    model = case.model()
    stock = run(model, case)
    keys, signature = list(model.state_dict()), inspect.signature(model.forward)
    fastdit.accelerate(model, "exact")
    assert list(model.state_dict()) == keys
    assert inspect.signature(model.forward) == signature
    assert torch.equal(run(model, case), run(model, case))
    assert same(run(copy.deepcopy(model), case), stock, case)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(type(model).from_pretrained(tmp_path), case), stock)
    if model._supports_gradient_checkpointing:
        model.enable_gradient_checkpointing()
        assert same(run(model, case), stock, case)
    named = model(**case.call(), return_dict=True)
    assert same(named.sample if hasattr(named, "sample") else named[0], stock, case)
    half = copy.deepcopy(model).to(torch.float64)
    assert all(p.dtype == torch.float64 for p in half.parameters())


def test_ip_adapter_loaded_afterwards():
    """The loader makes processors anew by their class, and sets them: self-attention stays ours, the adapter's is its own."""
    case = BY_NAME["UNet2DCondition"]

    def with_adapter(model):
        torch.manual_seed(5)
        heads = {"image_proj": {}, "ip_adapter": {}}
        heads["image_proj"] = {
            "proj.weight": torch.randn(4 * 16, 8), "proj.bias": torch.randn(64), "norm.weight": torch.ones(16),
            "norm.bias": torch.zeros(16),
        }  # fmt: skip
        key = 1
        for place, processor in model.attn_processors.items():
            if place.endswith("attn2.processor"):
                wide = next(
                    block.shape[0] for name, block in model.state_dict().items()
                    if name == place.replace("processor", "to_q.weight")
                )  # fmt: skip
                heads["ip_adapter"] |= {
                    f"{key}.to_k_ip.weight": torch.randn(wide, 16),
                    f"{key}.to_v_ip.weight": torch.randn(wide, 16),
                }
                key += 2
            del processor
        model._load_ip_adapter_weights([heads], low_cpu_mem_usage=False)
        return model

    image = {"added_cond_kwargs": {"image_embeds": [torch.ones(2, 1, 8)]}}
    with masked(case):
        expected = run(with_adapter(case.model()), case, **image)
        plain = run(case.model(), case)
    assert relative_error(plain, expected) > 1e-3
    model = case.model()
    fastdit.accelerate(model, SPARSE)
    assert same(run(with_adapter(model), case, **image), expected, case)
    assert fastdit.report(model).density < 1


def test_controlnet_residuals():
    from diffusers import ControlNetModel

    case = BY_NAME["UNet2DCondition"]
    model = case.model()
    control = ControlNetModel.from_unet(model, conditioning_channels=3, conditioning_embedding_out_channels=(8, 8)).eval()
    call = case.call()
    with torch.no_grad():
        for parameter in control.parameters():
            parameter.add_(0.01)
        down, mid = control(
            call["sample"], call["timestep"], call["encoder_hidden_states"], torch.rand(2, 3, 32, 32), return_dict=False
        )
        down, mid = [x[..., : y.shape[-1]] for x, y in zip(down, down, strict=True)], mid
    more = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}
    with masked(case):
        expected = run(model, case, **more)
    fastdit.accelerate(model, SPARSE)
    assert same(run(model, case, **more), expected, case)


@pytest.mark.parametrize("family", ["Wan", "SD3", "UNet2DCondition"])
def test_cpu_offload_of_a_model(family):
    """accelerate's hooks, as `enable_model_cpu_offload` puts them on."""
    from accelerate import cpu_offload_with_hook

    case = BY_NAME[family]
    with masked(case):
        expected = run(case.model(), case)
    model, hook = cpu_offload_with_hook(case.model(), torch.device("cpu"))
    fastdit.accelerate(model, SPARSE)
    assert same(run(model, case), expected, case)
    hook.offload()
    assert same(run(model, case), expected, case)
