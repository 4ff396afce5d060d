"""The judge's eye for motion: right wherever the words let a thing stand, wrong for every other motion."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from fastdit.apps.tiny.world.judge import Judge
from fastdit.apps.tiny.world.render import Renderer
from fastdit.apps.tiny.world.scene import MOTIONS, SPINS, Scene, Thing, another, pack, paths
from fastdit.apps.tiny.world.tracks import nominal

SIZE = (9, 128, 128)


def two(first: str, second: str) -> Scene:
    things = (Thing("cyan", "cone", first, "", 0.58, -0.9, 0.0), Thing("orange", "ball", second, "", 0.58, 0.9, 0.0))
    return nominal(Scene(things, "checker"))


def moves(scene: Scene, asked: Scene) -> bool:
    return bool(Judge()(Renderer()(pack([scene]), *SIZE)[0], asked)["motion"])


@pytest.mark.parametrize("motion", ["diagonal left", "towards", "away", "still"])
def test_things_may_stand_the_other_way_round(motion: str) -> None:
    asked = two(motion, motion)
    real = another(asked, random.Random(3))
    assert real.things[0].x > 0 > real.things[1].x
    assert [t.color for t in real.things] == ["cyan", "orange"]
    assert moves(real, asked)


def test_another_motion_at_the_same_place_is_wrong() -> None:
    asked = two("diagonal left", "still")
    for motion in MOTIONS:
        if motion != "spinning" or "cone" in SPINS:
            assert moves(two(motion, "still"), asked) == (motion == "diagonal left"), motion
    slow = replace(asked, things=(replace(asked.things[0], dx=-0.3, dz=0.4), asked.things[1]))
    assert not moves(slow, asked)


def test_the_ideal_scene_puts_each_thing_in_the_middle_of_the_way_it_was_seen_on() -> None:
    asked = two("away", "right")
    seen = [[(-0.5, 1.0, -1.0), (0.0, 1.1, 0.05), (0.5, 1.2, 1.1)], []]
    first, second = nominal(asked, seen).things
    assert first.x == 1.1
    assert first.dz == paths(2, "")[1] == 2.1
    assert first.z == pytest.approx(0.05)  # -1 + 1.05, 0.05, 1.1 - 1.05
    assert (second.x, second.z, second.dx) == (0.9, 0.0, 0.85)  # never seen clearly: where it usually is
