"""diffusers' own guiders in a modular pipeline, which give their branches no names: exact is stock to the bit with each."""

import diffusers.guiders as guiders
import pytest
import torch
from diffusers import LayerSkipConfig
from util import modular, render_modular

import fastdit
from fastdit import Config, Phase, Window
from fastdit.config import Reuse
from fastdit.core.reference import relative_error

WHOLE = Config((Phase(policy=Window(size=(99, 99, 99))),), (1, 2, 2), min_tokens=0, max_density=1)
RESIDUAL = Config(
    (Phase(policy=Window(size=(1, 1, 1)), reuse=Reuse("residual", refresh=3)),), (1, 2, 2), min_tokens=0, max_density=1
)
SECOND = {"indices": [1], "fqn": "blocks"}
GUIDERS = {
    "cfg": lambda: guiders.ClassifierFreeGuidance(guidance_scale=4.0),
    "cfg ends": lambda: guiders.ClassifierFreeGuidance(guidance_scale=4.0, stop=0.5),
    "cfg begins": lambda: guiders.ClassifierFreeGuidance(guidance_scale=4.0, start=0.5),
    "zero star": lambda: guiders.ClassifierFreeZeroStarGuidance(guidance_scale=4.0),
    "tangential": lambda: guiders.TangentialClassifierFreeGuidance(guidance_scale=4.0),
    "projected": lambda: guiders.AdaptiveProjectedGuidance(guidance_scale=4.0),
    "skip layer": lambda: guiders.SkipLayerGuidance(
        guidance_scale=4.0, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0,
        skip_layer_config=LayerSkipConfig(**SECOND),
    ),
    "skip layer, cfg begins": lambda: guiders.SkipLayerGuidance(
        guidance_scale=4.0, start=0.5, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0,
        skip_layer_config=LayerSkipConfig(**SECOND),
    ),
    "auto": lambda: guiders.AutoGuidance(guidance_scale=4.0, auto_guidance_config=LayerSkipConfig(**SECOND, dropout=0.1)),
}  # fmt: skip


@pytest.mark.parametrize("name", GUIDERS)
def test_guiders(name):
    make, calls = GUIDERS[name], []
    pipe = modular(make())
    pipe.transformer.blocks[0].attn1.register_forward_hook(lambda *_: calls.append(1))
    stock = render_modular(pipe)
    pipe = modular(make())
    fastdit.accelerate(pipe, "exact")
    assert torch.equal(render_modular(pipe), stock)
    ran = [ran for site, ran in fastdit.report(pipe).calls if site == 0]
    assert len(ran) == len(calls) > 10

    pipe = modular(make())  # anew each time: a guider remembers where it ended
    fastdit.accelerate(pipe, WHOLE)
    assert relative_error(render_modular(pipe), stock) < 1e-5

    pipe = modular(make())
    handle = fastdit.accelerate(pipe, RESIDUAL)
    held, decode = [], pipe.vae.decode
    pipe.vae.decode = lambda *a, **k: held.append(handle.bytes()) or decode(*a, **k)
    found = render_modular(pipe)
    assert held == [0]
    hows = [ran.how for site, ran in fastdit.report(pipe).calls if site == 0]
    assert len(calls) / 3 <= hows.count("refresh") <= len(calls) / 3 + 2, hows  # each branch every third of its calls
    assert set(hows) == {"refresh", "reuse"}
    twin = modular(make())
    fastdit.accelerate(twin, RESIDUAL)
    assert torch.equal(render_modular(twin), found)
