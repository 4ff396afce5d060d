"""Scenes in words, in one fixed wording or in one of many, and the vocabulary of these.

`caption` is what the model is trained on; the vocabulary is derived from the same tables, so the two cannot disagree.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from fastdit.apps.tiny.world.scene import COLORS, Scene, Thing
from fastdit.pipelines.embedded import words_of

_NOUNS = {
    "ball": ("ball", "ball", "ball", "sphere", "globe"),
    "cube": ("cube", "cube", "cube", "box", "block"),
    "cylinder": ("cylinder", "cylinder", "can", "drum"),
    "cone": ("cone", "cone", "cone", "pyramid"),
    "ring": ("ring", "ring", "ring", "torus", "donut"),
}
_COLOR_WORDS = {
    "purple": ("purple", "purple", "violet"),
    "cyan": ("cyan", "cyan", "turquoise"),
    "pink": ("pink", "pink", "magenta"),
}
_SIZE_WORDS = {"": ("",), "small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
_VERBS = ("moving", "moving", "moving", "going", "sliding", "gliding", "travelling", "moves", "goes", "slides", "that moves")
# ways of saying a motion; {v} is a verb of going. The first is the fixed wording
_MOTIONS = {
    "still": ("standing still", "standing still", "", "", "staying still", "not moving", "at rest", "stands still", "resting"),
    "right": ("{v} right", "{v} right", "{v} to the right", "{v} rightwards", "{v} from left to right"),
    "left": ("{v} left", "{v} left", "{v} to the left", "{v} leftwards", "{v} from right to left"),
    "towards": (
        "{v} towards the camera",
        "{v} towards us",
        "{v} closer",
        "coming closer",
        "approaching",
        "{v} forward",
        "approaching the camera",
    ),
    "away": ("{v} away", "{v} away", "{v} away from the camera", "{v} into the distance", "{v} backwards", "receding"),
    "diagonal": (
        "{v} diagonally",
        "{v} diagonally",
        "{v} diagonally to the right",
        "{v} right and away",
        "{v} diagonally right",
    ),
    "diagonal left": ("{v} diagonally left", "{v} diagonally left", "{v} diagonally to the left", "{v} left and away"),
    "bouncing": ("bouncing", "bouncing", "bouncing up and down", "bounces", "hopping", "jumping up and down", "jumping"),
    "spinning": ("spinning", "spinning", "rotating", "turning around", "spins", "turning", "spinning around", "rotates"),
}
_FLOORS = {
    "plain": ("", "", "", " on a plain floor", " on a gray floor", " on a plain ground"),
    "checker": (" on a checkered floor", " on a checkered floor", " on a checkerboard", " on a chessboard floor", " on tiles"),
    "stripes": (" on a striped floor", " on a striped floor", " on stripes", " on a floor with stripes"),
}
_BACKDROPS = {
    "sky": ("", "", "", "", " under a sky", " under a blue sky", " outdoors"),
    "wall": (" before a wall", " before a wall", " in front of a wall", " in a room", " indoors", " against a wall"),
}
_CAMERAS = {
    "still": ("",),
    "panning right": (", the camera panning right", ", the camera pans right", ", camera panning to the right", ", pan right"),
    "panning left": (", the camera panning left", ", the camera pans left", ", camera panning to the left", ", pan left"),
    "circling": (", the camera circling", ", the camera circles around", ", camera circling around", ", orbiting camera"),
}
_OPENINGS = ("", "", "", "", "", "a video of ", "a clip of ", "there is ", "an animation of ", "we see ")
_ARTICLES = ("a", "a", "a", "a", "a", "one", "the", "")
_TOGETHER = (" and ", " and ", " and ", ", ", " next to ", " beside ", " with ")
_BOTH = ("both {}", "{}", "{} together")
_FILLERS = frozenset(
    {"is", "are", "in", "of", "it", "its", "as", "then", "while", "scene", "showing", "shows", "simple", "solid"}
)


def _pick(rng: random.Random | None, options: Sequence[str]) -> str:
    return options[0] if rng is None else rng.choice(options)


def _noun(thing: Thing, rng: random.Random | None) -> str:
    color = _pick(rng, _COLOR_WORDS.get(thing.color, (thing.color,)))
    words = [_pick(rng, _SIZE_WORDS[thing.size]), color, _pick(rng, _NOUNS[thing.solid])]
    phrase = " ".join(w for w in words if w)
    article = _pick(rng, _ARTICLES)
    if article == "a" and phrase[0] in "aeiou":
        article = "an"
    return f"{article} {phrase}".strip()


def _way(motion: str, rng: random.Random | None) -> str:
    return _pick(rng, _MOTIONS[motion]).format(v=_pick(rng, _VERBS))


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """The scene in words, such as "a red ball moving right on a checkered floor"; with `rng`, in one of many wordings."""
    if rng is not None and rng.random() < 0.35:
        rng = None
    things = list(scene.things)
    sides = ["", "", ""]
    if len(things) == 2 and rng is not None and rng.random() < 0.3:
        sides = [" on the left", " on the right", ""]
    elif len(things) == 2 and rng is not None and rng.random() < 0.3:
        things.reverse()  # without a word about sides, either may be named first
    nouns = [f"{_noun(t, rng)}{side}" for t, side in zip(things, sides, strict=False)]
    alike = len(things) > 1 and len({t.motion for t in things}) == 1
    if alike and (rng is None or rng.random() < 0.7):
        way = _way(things[0].motion, rng)
        if way and len(things) == 2:
            way = _pick(rng, _BOTH).format(way)
        joined = nouns[0] + _pick(rng, _TOGETHER) + nouns[1] if len(nouns) == 2 else f"{nouns[0]}, {nouns[1]} and {nouns[2]}"
        body = f"{joined} {way}".strip()
    else:
        said = [f"{n} {_way(t.motion, rng)}".strip() for n, t in zip(nouns, things, strict=True)]
        body = " and ".join(said) if len(said) < 3 else f"{said[0]}, {said[1]} and {said[2]}"
    opening = "" if rng is None else rng.choice(_OPENINGS)
    ground, behind = _pick(rng, _FLOORS[scene.floor]), _pick(rng, _BACKDROPS[scene.backdrop])
    return opening + body + ground + behind + _pick(rng, _CAMERAS[scene.camera])


def _said() -> Iterator[str]:
    yield from COLORS
    for table in (_NOUNS, _COLOR_WORDS, _SIZE_WORDS, _MOTIONS, _FLOORS, _BACKDROPS, _CAMERAS):
        for options in table.values():
            yield from (o.replace("{v}", "") for o in options)
    for options in (_VERBS, _OPENINGS, _ARTICLES, _TOGETHER, _BOTH):
        yield from (o.replace("{}", "") for o in options)


VOCABULARY = frozenset(w for said in _said() for w in words_of(said)) | {"an"}
UNDERSTOOD = VOCABULARY | _FILLERS
"""What `build` stores beside the weights, for `embedded.unknown_words`."""
