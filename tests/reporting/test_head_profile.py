"""Head profiles: true masses, and the cheapest pattern for each head chosen by them."""

import json

import pytest
import torch
from util import tiny_wan_pipeline

import fastdit
from fastdit import Config, Window
from fastdit.core.layout import Layout
from fastdit.core.reference import attention, token_mask
from fastdit.planning.forward_plan import complete
from fastdit.policies import HeadProfile, TopMass
from fastdit.reporting import head_profile

LAYOUT = Layout((3, 5, 6), (1, 2, 4))
SPATIAL, TEMPORAL = Window(size=(1, 9, 9)), Window(size=(9, 1, 1))


def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, LAYOUT.length, 8, generator=generator) for _ in range(2)]


def test_retained_mass_is_what_the_lse_says(monkeypatch):
    """exp(LSE_pattern − LSE_full), averaged over queries; also when it is computed in pieces."""
    q, k = tensors()
    tiled = [LAYOUT.to_tiles(x) for x in (q, k)]
    mass = head_profile.tile_mass(*tiled, LAYOUT)
    assert torch.allclose(mass.sum(-1), torch.ones(()), atol=1e-5)
    kept = complete(SPATIAL.select(LAYOUT), LAYOUT)
    _, part = attention(q, k, k, token_mask(LAYOUT, kept))
    _, full = attention(q, k, k)
    assert torch.allclose(head_profile.retained(mass, kept, LAYOUT), (part - full).exp().mean(-1), atol=1e-5)
    monkeypatch.setattr(head_profile, "LOGITS_BYTES", 1)
    assert torch.allclose(head_profile.tile_mass(*tiled, LAYOUT), mass, atol=1e-6)


def test_planted_heads_get_their_pattern():
    layout = Layout((4, 8, 8), (1, 4, 4))
    t, h, w = (x.flatten() for x in torch.meshgrid(*(torch.arange(n) for n in layout.grid), indexing="ij"))
    heads = [torch.nn.functional.one_hot(x, 64).float() * 9 for x in (t, h * 8 + w)]
    x = layout.to_tiles(torch.stack(heads)[None])
    seen = head_profile.Seen()
    seen.add(0, layout, x, x)
    seen.add(2, layout, x.flip(1), x.flip(1))
    config = head_profile.choose(seen, [SPATIAL, TEMPORAL])
    assert [phase.layers for phase in config.phases] == [(0, 1), (2, 3)]
    assert [phase.policy.heads for phase in config.phases] == [(0, 1), (1, 0)]
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_pipeline_is_watched_and_then_runs_by_its_profile():
    pipe, stock = tiny_wan_pipeline(), tiny_wan_pipeline()
    config, seen = head_profile.watching(2, (1, 2, 2))

    def render(which):
        return which(
            "a b", num_frames=9, height=64, width=64, num_inference_steps=2, output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames  # fmt: skip

    with fastdit.accelerate(pipe, config):
        watched = render(pipe)
    assert torch.allclose(watched, render(stock), atol=1e-4)
    assert seen.calls == {0: 4, 1: 4}  # steps × branches
    chosen = head_profile.choose(seen, [SPATIAL, TEMPORAL])
    with fastdit.accelerate(pipe, chosen):
        render(pipe)
        assert all(site.ran == "sparse" for site in fastdit.report(pipe).sites)
        with pytest.raises(ValueError, match="measured on the grid"):
            pipe("a b", num_frames=9, height=96, width=64, num_inference_steps=2, output_type="latent")
    assert isinstance(chosen.phases[0].policy, HeadProfile)


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="nothing was seen"):
        head_profile.choose(head_profile.Seen(), [SPATIAL])
    seen = head_profile.Seen()
    x = torch.randn(1, 1, LAYOUT.video_tiles, LAYOUT.tile_tokens, 4)
    seen.add(0, LAYOUT, x, x)
    with pytest.raises(ValueError, match="static"):
        head_profile.choose(seen, [TopMass(density=0.5)])
    with pytest.raises(ValueError, match="one size"):
        seen.add(0, Layout((3, 5, 7), (1, 2, 4)), x, x)
