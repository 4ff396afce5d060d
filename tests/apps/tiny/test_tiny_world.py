"""The small world: what is drawn is where it should be, on every device, and is said in words that are known."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from fastdit.apps.tiny.world import render_gpu
from fastdit.apps.tiny.world.render import Renderer
from fastdit.apps.tiny.world.scene import (
    CAMERAS,
    COLORS,
    FLOORS,
    HELD_OUT,
    MOTIONS,
    SOLIDS,
    SPINS,
    Scene,
    Thing,
    pack,
    sample,
)
from fastdit.apps.tiny.world.words import UNDERSTOOD, VOCABULARY, caption
from fastdit.pipelines import embedded
from fastdit.pipelines.embedded import unknown_words, words_of


def one(solid: str = "ball", color: str = "red", motion: str = "still", radius: float = 0.7, **more: float) -> Thing:
    return Thing(color, solid, motion, "", radius, more.pop("x", 0.0), more.pop("z", 0.0), **more)


@pytest.mark.parametrize("solid", SOLIDS)
def test_a_solid_is_where_its_middle_is_projected(solid: str) -> None:
    scenes = [Scene((one(solid, dx=2.0, hop=0.4),), camera=c) for c in CAMERAS]
    _, truth = Renderer().with_truth(pack(scenes), 5, 64, 96)
    mask = truth.whole[:, 0]
    area = mask.sum((2, 3))
    assert 120 < area.min() < area.max() < 500
    xs = (mask.sum(2) * (torch.arange(96) + 0.5)).sum(2) / area
    ys = (mask.sum(3) * (torch.arange(64) + 0.5)).sum(2) / area
    assert (xs - truth.place[:, 0, :, 0]).abs().max() < 1.2
    off = ys - truth.place[:, 0, :, 1]  # the cone's middle of area lies below the middle of its height
    assert (off - off.mean()).abs().max() < 1.5
    assert off.mean().abs() < 5.5


def test_a_ball_is_as_large_as_its_radius_says() -> None:
    _, truth = Renderer().with_truth(pack([Scene((one(radius=0.8),))]), 1, 256, 256)
    distance = (7.0**2 + (0.75 + 7.0 * 0.19444 - 0.8) ** 2) ** 0.5
    pixels = 0.8 / (distance**2 - 0.8**2) ** 0.5 / 0.306 * 128
    assert truth.whole[0, 0].sum() == pytest.approx(torch.pi * pixels**2, rel=0.02)


def test_a_clip_is_the_same_at_every_size_and_length() -> None:
    scene = sample(random.Random(5), kind="two")
    large = Renderer()(pack([scene]), 9, 128, 128)
    small = Renderer()(pack([scene]), 5, 64, 64)
    shrunk = torch.nn.functional.avg_pool3d(large[:, :, ::2], (1, 2, 2))
    assert (shrunk - small).abs().mean() < 0.01
    assert (shrunk[:, :, ::2] - small[:, :, 1:4]).abs().mean() > 0.01  # and different where it should be


def test_wider_frames_show_more_at_the_sides() -> None:
    rows = pack([sample(random.Random(6), kind="one")])
    wide, square = Renderer()(rows, 1, 64, 96), Renderer()(rows, 1, 64, 64)
    assert torch.allclose(wide[..., 16:80], square, atol=1e-4)


def test_a_nearer_solid_hides_a_farther_one() -> None:
    near, far = one(color="red", z=-1.5), one(color="blue", z=1.5)
    for things in ((near, far), (far, near)):
        _, truth = Renderer().with_truth(pack([Scene(things)]), 1, 64, 64)
        hidden = truth.whole[0, :2] - truth.masks[0, :2]
        at = things.index(far)
        assert hidden[at].sum() > 50
        assert hidden[1 - at].sum() == 0


def test_shadows_fall_away_from_the_light_and_follow_the_solid() -> None:
    draw, empty = Renderer(), Renderer()(pack([Scene(())]), 1, 64, 64)
    left, right = (draw(pack([Scene((one(x=x),))]), 1, 64, 64) for x in (-0.8, 0.8))
    for video, columns in ((left, slice(24, 40)), (right, slice(48, 64))):
        darker = (empty - video)[0, :, 0, 32:56, columns].amin(0) > 0.1  # in every colour alike: no solid there
        assert darker.sum() > 15
    assert torch.equal(left[0, :, 0, :20], empty[0, :, 0, :20])


@pytest.mark.parametrize("kind", ["one", "three", "camera"])
def test_the_gpu_kernel_draws_what_the_reference_draws(kind: str) -> None:
    rng = random.Random(kind)
    scenes = [sample(rng, kind=kind) for _ in range(2)]
    scenes += [Scene((one(s, yaw=0.4, spin=1.0, hop=0.3),), f) for s, f in zip(SOLIDS, FLOORS * 2, strict=False)][
        : 2 + len(kind)
    ]
    rows = pack(scenes)
    wrong = (render_gpu.draw(rows, 2, 16, 24) - Renderer()(rows, 2, 16, 24)).abs()
    assert wrong.max() < 1e-3


def test_what_is_held_out_is_never_sampled_and_all_else_is() -> None:
    rng, seen = random.Random(1), set()
    for _ in range(12_000):
        scene = sample(rng)
        assert not scene.held_out
        seen |= {(t.color, t.solid, t.motion) for t in scene.things}
        assert len({t.color for t in scene.things}) == len(scene.things)
        assert all(t.motion != "spinning" or t.solid in SPINS for t in scene.things)
    every = {(c, s, m) for c in COLORS for s in SOLIDS for m in MOTIONS if m != "spinning" or s in SPINS}
    assert len(every - HELD_OUT - seen) < 0.02 * len(every)
    triple = sorted(HELD_OUT)[0]
    assert sample(rng, triple=triple).held_out


def test_nothing_leaves_the_frame() -> None:
    rng = random.Random(2)
    scenes = [sample(rng) for _ in range(60)]
    _, truth = Renderer().with_truth(pack(scenes), 5, 48, 48)
    edge = torch.cat([truth.whole[..., 0, :], truth.whole[..., -1, :], truth.whole[..., 0], truth.whole[..., -1]], -1)
    touching = (edge.sum((1, 2, 3)) > 0).float().mean()
    assert touching < 0.12


def test_captions_say_what_is_drawn_and_only_known_words() -> None:
    rng = random.Random(3)
    for _ in range(1500):
        scene = sample(rng)
        text = caption(scene, rng)
        assert unknown_words(text) == [], text
        assert set(words_of(text)) <= VOCABULARY
        plain = caption(scene)
        assert all(t.color in plain and t.solid in plain for t in scene.things)
    ball = Scene((one(motion="right", dx=2.0),), "checker")
    assert caption(ball) == "a red ball moving right on a checkered floor"
    assert "circling" in caption(replace(ball, camera="circling"))


def test_words_that_are_not_understood_are_named_once_and_in_order() -> None:
    assert unknown_words("A cat on a skateboard, and a CAT moving diagonally under a blue sky.") == ["cat", "skateboard"]
    assert unknown_words("a small blue cube spinning, the camera pans left") == []
    assert unknown_words("don't stop") == ["don't", "stop"]
    assert unknown_words("") == []
    assert unknown_words("a cat", "no/such/folder") == []  # a model that says nothing about its words


def test_the_vocabulary_that_ships_is_that_of_the_captions() -> None:
    assert set((embedded.PATH / embedded.VOCABULARY).read_text().split()) == UNDERSTOOD
