"""The strict judge passes drawn clips and fails each thing that can be wrong with one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastdit.apps.tiny.world import outline
from fastdit.apps.tiny.world.evaluate import egg
from fastdit.apps.tiny.world.judge import MEASURES, Judge, ask, summary
from fastdit.apps.tiny.world.render import Renderer
from fastdit.apps.tiny.world.scene import SPIN, Scene, Thing, pack

SIZE = (5, 128, 128)
BALL = Thing("red", "ball", "right", "", 0.72, 0.1, 0.1, 2.1)
CUBE = Thing("blue", "cube", "still", "", 0.72, 0.0, 0.1, yaw=0.6)
SCENE = Scene((BALL,), "checker")
judge = Judge()


def drawn(scene: Scene) -> torch.Tensor:
    return Renderer()(pack([scene]), *SIZE)[0]


def wrong(video: torch.Tensor, scene: Scene) -> set[str]:
    row = judge(video, scene)
    assert row["all"] == all(row[m] for m in MEASURES)
    return {m for m in MEASURES if not row[m]}


@pytest.mark.parametrize(
    "scene",
    [
        SCENE,
        Scene((CUBE,), "stripes", "wall"),
        Scene((replace(CUBE, motion="spinning", spin=SPIN),)),
        Scene((Thing("green", "ring", "towards", "", 0.72, 0.0, 0.0, 0.0, -2.8),), "checker", "sky"),
        Scene((replace(BALL, motion="bouncing", dx=0.0, hop=1.0),), "plain", "wall"),
        Scene(
            (Thing("cyan", "cone", "still", "", 0.58, -1.0, 0.0), Thing("pink", "ball", "still", "", 0.58, 1.0, 0.0)),
            camera="circling",
        ),
    ],
    ids=lambda s: f"{s.things[0].solid} {s.things[0].motion}",
)
def test_a_drawn_clip_passes(scene: Scene) -> None:
    assert wrong(drawn(scene), scene) == set()


def test_a_highlight_does_not_make_orange_yellow() -> None:
    ring = Thing("yellow", "ring", "still", "", 0.58, -0.9, 0.0)
    scene = Scene((ring, Thing("orange", "ball", "right", "", 0.58, 0.9, 0.0, 0.85)), "plain", "wall")
    assert wrong(drawn(scene), scene) == set()


def test_an_egg_is_no_ball() -> None:
    assert {"shape", "round"} <= wrong(egg(judge.renderer, SCENE, SIZE), SCENE)
    assert wrong(egg(judge.renderer, SCENE, SIZE, 1.0, 0.0), SCENE) == set()  # cut out and put back unchanged


def test_the_aspect_is_read_off_the_outline() -> None:
    numbers = judge(egg(judge.renderer, SCENE, SIZE, 0.9, 0.0), SCENE)["numbers"]
    assert sum(numbers["aspect"]) / 5 == pytest.approx(0.9, abs=0.015)
    assert max(judge(drawn(SCENE), SCENE)["numbers"]["deviation"]) < 0.01


@pytest.mark.parametrize(
    ("asked", "fails"),
    [
        (replace(SCENE, things=(replace(BALL, color="orange"),)), {"color", "count"}),
        (replace(SCENE, things=(replace(BALL, solid="cone"),)), {"shape"}),
        (replace(SCENE, things=(replace(BALL, motion="left"),)), {"motion"}),
        (replace(SCENE, things=(replace(BALL, motion="still"),)), {"motion"}),
        (replace(SCENE, things=(replace(BALL, motion="diagonal"),)), {"motion"}),
        (replace(SCENE, floor="stripes"), {"floor"}),
        (replace(SCENE, backdrop="wall"), {"floor"}),
        (replace(SCENE, things=(BALL, replace(CUBE, color="green"))), {"shape", "color", "count", "motion"}),
    ],
    ids=["color", "solid", "left", "still", "diagonal", "floor", "backdrop", "one missing"],
)
def test_another_caption_fails(asked: Scene, fails: set[str]) -> None:
    found = wrong(drawn(SCENE), asked)
    assert fails - {"count"} <= found
    assert "floor" in fails or "floor" not in found


def test_one_too_many_is_counted() -> None:
    both = replace(SCENE, things=(replace(BALL, z=-0.9), Thing("red", "ball", "still", "", 0.45, 0.0, 2.5)))
    assert "count" in wrong(drawn(both), SCENE)


def test_half_the_way_is_not_enough() -> None:
    short = replace(SCENE, things=(replace(BALL, dx=1.0),))
    assert "motion" in wrong(drawn(short), SCENE)


def test_a_blurred_clip_is_not_sharp() -> None:
    blurred = torch.nn.functional.avg_pool2d(drawn(SCENE), 5, 1, 2, count_include_pad=False)
    assert "sharp" in wrong(blurred, SCENE)


def test_a_spin_that_stands_still_fails() -> None:
    spinning = Scene((replace(CUBE, motion="spinning"),))
    assert "motion" in wrong(drawn(Scene((CUBE,))), spinning)


def test_noise_fails_everything_that_is_measured() -> None:
    found = wrong(torch.rand(3, *SIZE) * 2 - 1, SCENE)
    assert {"shape", "round", "count", "motion", "floor"} <= found


def test_the_outline_fits_at_its_own_turn() -> None:
    scene = Scene((replace(CUBE, yaw=0.8),))
    view = torch.tensor([0.0, -7.0, 0.0, 1.0])
    share, mask = outline.cover((drawn(scene) + 1) / 2, judge.background(scene, SIZE))
    best = outline.fit(mask[0], 1, 0.72, view)
    assert best is not None
    assert best.iou > 0.97
    assert best.turn == pytest.approx(0.8, abs=0.12)
    assert best.place[[0, 2]].tolist() == pytest.approx([0.0, 0.1], abs=0.12)
    assert share.max() <= 1


def test_the_summary_counts_by_kind() -> None:
    asked, captions = ask(10)
    assert len(captions) == 10
    assert asked[4].held_out
    assert asked[9].held_out
    row = dict.fromkeys((*MEASURES, "all"), True) | {
        "numbers": {"iou": [0.9], "deviation": [], "aspect": [], "edge": 1.0, "floor": 0.0}
    }
    told = summary([row] * 9 + [row | {"shape": False, "all": False}], asked)
    assert told["everything"]["shape"] == 0.9
    assert told["never trained on"]["shape"] == 0.5
    assert told["iou"] == 0.9
