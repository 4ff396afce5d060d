"""Encoder propagation on the real model classes, in float64: what runs at which step, and that it is what the paper says."""

import copy
import dataclasses

import diffusers
import pytest
import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel
from families import BY_NAME, r
from models import state, wan

import fastdit
from fastdit.core.reference import relative_error
from fastdit.encoder_reuse.propagate import KEY_STEPS, propagation_of
from fastdit.pipelines.encoder import encoder_of

UNETS = (
    "UNet2DCondition", "UNetMotion", "UNetSpatioTemporalCondition",
    pytest.param("UNet3DCondition", marks=pytest.mark.slow),  # as long as all others
)  # fmt: skip
DITS = ("DiT", "PixArt")
TIMES = (900, 800, 700, 600, 500)


def tiny(family):
    """A model in float64 and its call without latents and timestep."""
    case = BY_NAME[family]
    call = {key: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for key, x in case.call().items()}
    return case.model().double(), call


def latents_of(call):
    return "sample" if "sample" in call else "hidden_states"


def run(model, call, times=TIMES, seed=100, **more):
    """The answers at falling timesteps, each to latents of its own."""
    key, found = latents_of(call), []
    with torch.no_grad():
        for i, time in enumerate(times):
            # SVD's timestep is a logarithm of σ; it falls as well
            timestep = torch.tensor(time / 1000 if "added_time_ids" in call else time)
            if "hidden_states" in call:
                timestep = timestep.expand(len(call[key]))
            x = r(*call[key].shape, seed=seed + i).double()
            found.append(model(**call | {key: x, "timestep": timestep} | more, return_dict=False)[0])
    return found


def expected(model, call, keys, times=TIMES, **more):
    """The same by torch's own hooks: the whole model runs at every step, and the encoder's outputs are exchanged behind it."""
    encoder, kept, handles, is_key = encoder_of(model), {}, [], [True]

    def exchange(module, args, output):
        if is_key[0]:
            kept[module] = copy.deepcopy(output)
            return None
        return copy.deepcopy(kept[module])

    handles = [module.register_forward_hook(exchange) for module in encoder.keep]
    found = []
    for i, time in enumerate(times):
        is_key[0] = i in keys
        found += run(model, call, (time,), 100 + i, **more)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", UNETS + DITS)
def test_steps_between_decode_what_the_key_step_encoded(family):
    model, call = tiny(family)
    stock = run(model, call)
    reference = expected(model, call, {0, 3})
    before = state(model)
    with fastdit.propagate_encoder(model, (0, 3)) as handle:
        found = run(model, call)
    for i, (ours, theirs, full) in enumerate(zip(found, reference, stock, strict=True)):
        if i in (0, 3):
            assert torch.equal(ours, full)
        else:
            assert relative_error(ours, theirs) < 1e-12
            assert relative_error(ours, full) > 1e-3  # or this test would see nothing
    assert (handle.counts.calls, handle.counts.encoder, handle.counts.decoder) == (5, 2, 5)
    assert state(model) == before
    assert all(map(torch.equal, run(model, call), stock))


@pytest.mark.parametrize("groups", [1, 2, 32])
def test_any_number_of_normalization_groups(groups):
    """One group: all channels that a convolution reads vary with the decoder, and nothing stays the same."""
    case = BY_NAME["UNet2DCondition"]
    model = dataclasses.replace(case, config=case.config | {"norm_num_groups": groups}).model().double()
    _, call = tiny("UNet2DCondition")
    stock, reference = run(model, call), expected(model, call, {0, 2, 4})
    with fastdit.propagate_encoder(model, 1):
        assert all(map(torch.equal, run(model, call), stock))
    with fastdit.propagate_encoder(model, 2):
        found = run(model, call)
    assert all(map(torch.equal, found[::2], stock[::2]))
    assert all(relative_error(ours, theirs) < 1e-12 for ours, theirs in zip(found, reference, strict=True))
    assert relative_error(found[1], stock[1]) > 1e-3


@pytest.mark.parametrize("family", UNETS + DITS)
def test_between_key_steps_nothing_depends_on_the_latents(family):
    model, call = tiny(family)
    key = latents_of(call)
    fastdit.propagate_encoder(model, 2)
    for i, time in enumerate((900, 800, 700)):
        x = call[key].clone().requires_grad_()
        timestep = torch.tensor([time / 1000 if "added_time_ids" in call else time] * len(x))
        answer = model(**call | {key: x, "timestep": timestep}, return_dict=False)[0]
        slope = torch.autograd.grad(answer.sum(), x, allow_unused=True)[0] if answer.requires_grad else None
        assert (slope is not None and bool(slope.abs().max() > 0)) == (i != 1)


@pytest.mark.parametrize(("family", "encoder_calls"), [("UNet2DCondition", 5), ("PixArt", 5)])
def test_encoder_modules_run_at_key_steps_only(family, encoder_calls):
    """Counted from outside, at modules that no hook of ours is on."""
    model, call = tiny(family)
    ran = {"encoder": 0, "decoder": 0}

    def count(part):
        return lambda *_: ran.update({part: ran[part] + 1})

    if family == "PixArt":
        model.transformer_blocks[0].attn1.register_forward_hook(count("encoder"))
        model.transformer_blocks[-1].attn1.register_forward_hook(count("decoder"))
    else:
        model.down_blocks[0].resnets[0].norm1.register_forward_hook(count("encoder"))
        model.mid_block.resnets[0].norm1.register_forward_hook(count("encoder"))
        model.up_blocks[0].resnets[0].norm1.register_forward_hook(count("decoder"))
    fastdit.propagate_encoder(model)
    run(model, call, range(1000, 700, -20))
    keys = len([step for step in KEY_STEPS if step < 15])
    assert ran == {"encoder": keys * (1 if family == "PixArt" else 2), "decoder": 15}


def test_depth_of_a_transformer():
    model, call = tiny("PixArt")
    assert [len(part) for part in encoder_of(model)] == [1, 0, 0]
    deep = PixArtTransformer2DModel(**BY_NAME["PixArt"].config | {"num_layers": 28}).eval().double()
    default = encoder_of(deep)
    assert default.keep == [deep.transformer_blocks[17]]  # 18 of 28, as in the paper
    assert default.skip == list(deep.transformer_blocks[:17])
    with fastdit.propagate_encoder(deep, 2, depth=3) as handle:
        seen = []
        deep.transformer_blocks[2].attn1.register_forward_hook(lambda *_: seen.append(2))
        deep.transformer_blocks[3].attn1.register_forward_hook(lambda *_: seen.append(3))
        run(deep, call, TIMES[:2])
        assert seen == [2, 3, 3]
        assert handle.counts.encoder == 1


@pytest.mark.parametrize("swapped", [False, True])
def test_guidance_in_two_calls_and_in_one(swapped):
    """Each branch has its own features, whichever comes first."""
    model, call = tiny("UNet2DCondition")
    texts = call["encoder_hidden_states"].chunk(2)
    fastdit.propagate_encoder(model, (0, 3))
    key, x = "sample", r(1, 4, 16, 16, seed=5).double()
    found = {0: [], 1: []}
    whole = []
    with torch.no_grad():
        for i, time in enumerate(TIMES):
            now = x * (i + 1)
            for branch in (1, 0) if swapped and i else (0, 1):
                one = {key: now, "timestep": time, "encoder_hidden_states": texts[branch]}
                found[branch].append(model(**call | one).sample)
        handle = propagation_of(model)
        assert (handle.counts.calls, handle.counts.encoder) == (10, 4)
        for i, time in enumerate(TIMES):
            whole.append(model(**call | {key: (x * (i + 1)).repeat(2, 1, 1, 1), "timestep": time}).sample)
    for i, both in enumerate(whole):
        assert relative_error(torch.cat([found[0][i], found[1][i]]), both) < 1e-12
    assert (handle.counts.calls, handle.counts.encoder) == (5, 2)


def test_second_call_at_one_step_of_a_solver_is_no_branch():
    """Heun's timesteps: every one but the first comes twice."""
    model, call = tiny("UNet2DCondition")
    handle = fastdit.propagate_encoder(model, (0, 2))
    run(model, call, (900, 800, 800, 700, 700, 600, 600))
    assert (handle.counts.calls, handle.counts.encoder) == (7, 3)  # both calls of the key step at 700


def test_new_run_new_shape_and_new_text_begin_anew():
    model, call = tiny("UNet2DCondition")
    stock = run(model, call, (900,))
    handle = fastdit.propagate_encoder(model, (0,))
    run(model, call, TIMES[:3], seed=7)
    assert torch.equal(run(model, call, (900,))[0], stock[0])  # a higher timestep: another run
    run(model, call, (800,))
    assert handle.counts.encoder == 1
    wide = call | {"sample": r(2, 4, 16, 24).double()}
    fastdit.restore(model)
    theirs = run(model, wide, (700,))
    other = call | {"encoder_hidden_states": call["encoder_hidden_states"] + 1}
    theirs += run(model, other, (600,))
    handle = fastdit.propagate_encoder(model, (0,))
    run(model, call, TIMES[:2])
    ours = run(model, wide, (700,))
    ours += run(model, other, (600,))
    assert all(map(torch.equal, ours, theirs))
    assert handle.counts.encoder == 3


def test_exception_in_the_middle_forgets_everything():
    model, call = tiny("UNet2DCondition")
    handle = fastdit.propagate_encoder(model, (0,))
    run(model, call, (900, 800))

    def fail(*_):
        raise KeyboardInterrupt

    broken = model.up_blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run(model, call, (700,))
    broken.remove()
    assert handle.latest.running is None
    assert not any(branches._found for branches in handle.latest.branches)
    fastdit.restore(model)
    stock = run(model, call, (600,), seed=3)
    fastdit.propagate_encoder(model, (0,))
    run(model, call, (900,))
    with pytest.raises(KeyboardInterrupt):
        broken = model.up_blocks[1].register_forward_pre_hook(fail)
        run(model, call, (800,))
    broken.remove()
    assert torch.equal(run(model, call, (600,), seed=3)[0], stock[0])  # a full step, though the timestep fell


def test_reset_for_loops_of_ones_own():
    model, call = tiny("UNet2DCondition")
    stock = run(model, call, (500,))
    handle = fastdit.propagate_encoder(model, (0,))
    run(model, call, (900, 800), seed=3)
    handle.reset()
    assert torch.equal(run(model, call, (500,))[0], stock[0])


def test_features_do_not_pile_up():
    """Text that changes at every step makes every step a full one, and leaves at most two branches behind."""
    model, call = tiny("UNet2DCondition")
    handle = fastdit.propagate_encoder(model, (0,))
    for i, time in enumerate(TIMES):
        run(model, call | {"encoder_hidden_states": call["encoder_hidden_states"] + i}, (time,))
    assert handle.counts.encoder == 5
    assert len(handle.latest.branches[0]._found) <= 2


def test_model_that_writes_into_its_features():
    """FreeU scales the middle's output in place: what is kept must not be scaled again at each step."""
    model, call = tiny("UNet2DCondition")
    for resolution, block in enumerate(model.up_blocks):
        block.resolution_idx = resolution
        block.s1, block.s2, block.b1, block.b2 = 0.9, 0.2, 1.5, 1.6
    reference = expected(model, call, {0})
    fastdit.propagate_encoder(model, (0,))
    for ours, theirs in zip(run(model, call), reference, strict=True):
        assert relative_error(ours, theirs) < 1e-6  # FreeU's Fourier transform is in single precision


def test_t2i_adapter_is_added_once():
    """Its residuals go into the encoder, partly by writing into a feature that is a skip as well."""
    torch.manual_seed(0)
    sizes = BY_NAME["UNet2DCondition"].config | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    model = UNet2DConditionModel(**sizes).eval().requires_grad_(False).double()
    call = tiny("UNet2DCondition")[1]

    def adapted(model, time):
        states = [r(2, 32, 16, 16).double(), r(2, 64, 8, 8).double()]
        with torch.no_grad():
            given = {"sample": r(2, 4, 16, 16, seed=time).double(), "timestep": time}
            return model(**call | given, down_intrablock_additional_residuals=states).sample

    kept, is_key = {}, [True]

    def exchange(module, args, output):
        if is_key[0]:
            kept[module] = copy.deepcopy(output)  # one tensor in two places stays one
            return None
        return copy.deepcopy(kept[module])

    hooks = [module.register_forward_hook(exchange) for module in encoder_of(model).keep]
    reference = []
    for i, time in enumerate(TIMES):
        is_key[0] = i == 0
        reference.append(adapted(model, time))
    for hook in hooks:
        hook.remove()
    fastdit.propagate_encoder(model, (0,))
    for time, theirs in zip(TIMES, reference, strict=True):
        assert relative_error(adapted(model, time), theirs) < 1e-12


@pytest.mark.parametrize("first", ["attention", "encoder"])
def test_composes_with_the_attention_processor(first):
    model, call = tiny("UNet2DCondition")
    model, call = (
        model.float(),
        {key: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in call.items()},
    )
    sparse = fastdit.Config((fastdit.Phase(policy=fastdit.Window(size=(1, 1, 1))),), (1, 4, 4), min_tokens=0, max_density=1)

    def floats(answers):
        return [answer.float() for answer in answers]

    def runs(model):
        key, found = "sample", []
        with torch.no_grad():
            for i, time in enumerate(TIMES):
                found.append(model(**call | {key: r(2, 4, 16, 16, seed=i), "timestep": time}).sample)
        return floats(found)

    before = state(model)
    fastdit.accelerate(model, sparse)
    alone = runs(model)
    fastdit.restore(model)
    if first == "attention":
        attention = fastdit.accelerate(model, sparse)
        fastdit.propagate_encoder(model, (0, 3))
    else:
        fastdit.propagate_encoder(model, (0, 3))
        attention = fastdit.accelerate(model, sparse)
    assert propagation_of(model) is not None
    ours = runs(model)
    assert torch.equal(ours[0], alone[0])
    assert torch.equal(ours[3], alone[3])
    assert relative_error(ours[1], alone[1]) > 1e-4
    calls = {site.name.split(".")[0]: len(site.calls) for site in attention.sites}
    assert calls == {"down_blocks": 2, "mid_block": 2, "up_blocks": 5}
    assert {ran.how for site in attention.sites for ran in site.calls} == {"sparse"}
    attention.restore()
    assert propagation_of(model) is not None  # each handle takes off its own
    fastdit.restore(model)
    assert state(model) == before


def test_installing_again_replaces():
    model, call = tiny("UNet2DCondition")
    before = state(model)
    old = fastdit.propagate_encoder(model, 2)
    new = fastdit.propagate_encoder(model, 5)
    assert propagation_of(model) is new
    run(model, call)
    assert (new.counts.encoder, old.counts.calls) == (1, 0)
    old.restore()
    assert propagation_of(model) is new
    new.restore()
    assert state(model) == before


def test_a_copy_says_that_its_hooks_are_the_originals():
    """diffusers hooks do not survive deepcopy: the copy would run with the original's weights."""
    model, call = tiny("UNet2DCondition")
    stock = run(model, call, (900,))
    fastdit.propagate_encoder(model, 2)
    twin = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=r"copy.*fastdit\.restore\(copy\)"):
        run(twin, call, (900,))
    fastdit.restore(twin)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(run(twin, call, (900,))[0], stock[0])
    assert propagation_of(model) is not None


@pytest.mark.parametrize("first", ["hooks", "propagation"])
@pytest.mark.parametrize("feature", ["group offload", "block offload", "casting"])
def test_other_hooks_of_diffusers(feature, first):
    """Offloaded modules that do not run are not fetched; weights stored in another format are not split by hand."""

    def hooked(model):
        if feature == "casting":
            model.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float64)
            return
        kind = {"offload_type": "leaf_level"}
        if feature == "block offload":
            kind = {"offload_type": "block_level", "num_blocks_per_group": 1}
        model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), **kind)

    if "offload" in feature and diffusers.__version__.startswith("0.37"):
        pytest.skip("diffusers 0.37 offloads groups only where there is an accelerator")
    model, call = tiny("UNet2DCondition")
    model.float().double()  # so that casting to float32 loses nothing
    with fastdit.propagate_encoder(model, (0, 3)):
        alone = run(model, call)
    if first == "hooks":
        hooked(model)
    fastdit.propagate_encoder(model, (0, 3))
    if first == "propagation":
        hooked(model)
    for ours, theirs in zip(run(model, call), alone, strict=True):
        assert relative_error(ours, theirs) < 1e-12


@pytest.mark.slow  # compiles for a quarter of a minute
def test_compiled_blocks():
    """`compile_repeated_blocks` compiles below the hooks: whole graphs, one for all steps."""
    model, call = tiny("UNet2DCondition")
    with fastdit.propagate_encoder(model, (0, 3)):
        eager = run(model, call)
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    fastdit.propagate_encoder(model, (0, 3))
    run(model, call, TIMES[:2])
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled = run(model, call)
    for ours, theirs in zip(compiled, eager, strict=True):
        assert relative_error(ours, theirs) < 1e-12
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"key_steps": 0}, "k from 1 up"),
        ({"key_steps": True}, "k from 1 up"),
        ({"key_steps": ()}, "indices of steps"),
        ({"key_steps": (0, -1)}, "indices of steps"),
        ({"key_steps": (0, 1.5)}, "indices of steps"),
        ({"batch": 0}, "from 1 up, or None"),
        ({"noise": -1}, "the paper's is 0.003"),
        ({"noise": 0.003}, "need the pipeline"),
        ({"batch": None}, "need the pipeline"),
        ({"depth": 3}, "leave depth out"),
    ],
)
def test_wrong_arguments_leave_the_model_alone(given, message):
    model, _ = tiny("UNet2DCondition")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        fastdit.propagate_encoder(model, **given)
    assert state(model) == before


def test_models_without_a_known_encoder_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="cannot tell encoder from decoder in WanTransformer3DModel; it knows DiT.*UNet2DCond"):
        fastdit.propagate_encoder(wan())
    model, _ = tiny("DiT")
    for depth in (0, 2):
        with pytest.raises(ValueError, match=f"depth={depth} of 2 blocks"):
            fastdit.propagate_encoder(model, depth=depth)
    del model.transformer_blocks[1]
    with pytest.raises(ValueError, match="no decoder behind"):
        fastdit.propagate_encoder(model)


def test_threads_that_share_a_model_do_not_meet():
    """Two pipelines on one UNet, of different steps and schedulers: to the bit what each gives alone."""
    import threading

    case = BY_NAME["UNet2DCondition"]
    model = case.model()
    texts = [torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]

    @torch.no_grad()
    def go(i):
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(i))
        for t in range(900, 0, -100 + 20 * i):
            x = x - 0.1 * model(x, torch.tensor([t]), texts[i], return_dict=False)[0]
        return x

    with fastdit.propagate_encoder(model, 3) as handle:
        expected, found = [], {}
        for i in (0, 1):
            expected.append(go(i))
            handle.reset()
        for _ in range(3):
            threads = [threading.Thread(target=lambda i=i: found.update({i: go(i)})) for i in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert all(torch.equal(found[i], expected[i]) for i in (0, 1))
        assert handle.counts.encoder < handle.counts.calls
