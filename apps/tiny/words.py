"""Clips in words: in one fixed wording, or in one of many when given a random source."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fastdit.apps.tiny.clips import MOTIONS, Clip, Thing

_NOUNS = {
    "circle": ("circle", "circle", "ball", "disc"),
    "square": ("square", "square", "box", "block"),
    "triangle": ("triangle",),
    "star": ("star",),
}
_COLOR_WORDS = {"purple": ("purple", "purple", "violet")}
_SIZE_WORDS = {"": ("",), "small": ("small", "small", "little", "tiny"), "large": ("large", "big", "big", "huge")}
_GROUND_WORDS = {
    "black": ("black", "black", "dark"),
    "gray": ("gray", "gray", "grey"),
    "navy": ("navy", "navy", "dark blue"),
    "white": ("white", "white", "light"),
}
_VERBS = (
    "moving",
    "moving",
    "moving",
    "going",
    "sliding",
    "travelling",
    "flying",
    "floating",
    "moves",
    "goes",
    "slides",
    "that moves",
)
_STILL = ("standing still", "standing still", "staying still", "not moving", "at rest", "stands still", "in place", "")
_WAYS = {
    (1, 0): ("right", "right", "to the right", "rightward", "rightwards", "from left to right"),
    (-1, 0): ("left", "left", "to the left", "leftward", "leftwards", "from right to left"),
    (0, -1): ("up", "up", "upward", "upwards", "to the top"),
    (0, 1): ("down", "down", "downward", "downwards", "to the bottom"),
}
_OPENINGS = ("", "", "", "", "a video of ", "a clip of ", "there is ", "animation of ")


def _ground(background: str, rng: random.Random | None) -> str:
    if rng is None:
        return "" if background == "black" else f" on a {background} background"
    if background == "black" and rng.random() < 0.8:
        return ""
    word = rng.choice(_GROUND_WORDS[background])
    return rng.choice((" on a {} background", " on a {} background", " against a {} background", " on {}")).format(word)


def _way(motion: str, rng: random.Random | None) -> str:
    if rng is None:
        return motion
    x, y = MOTIONS[motion]
    if not (x or y):
        return rng.choice(_STILL)
    if x and y:
        up, right = ("down", "up")[y < 0], ("left", "right")[x > 0]
        way = rng.choice(
            ("{0} and {1}", "{0} and {1}", "{0} and to the {1}", "diagonally {0} and {1}", "{0} {1}", "to the {0} {1}")
        )
        return f"{rng.choice(_VERBS)} {way.format(up, right)}"
    return f"{rng.choice(_VERBS)} {rng.choice(_WAYS[x, y])}"


def _noun(thing: Thing, rng: random.Random | None) -> str:
    def pick(words: Sequence[str]) -> str:
        return words[0] if rng is None else rng.choice(list(words))

    color = pick(_COLOR_WORDS.get(thing.color, (thing.color,)))
    words = [pick(_SIZE_WORDS[thing.size]), color, pick(_NOUNS[thing.shape])]
    phrase = " ".join(w for w in words if w)
    article = "a" if rng is None else rng.choice(("a", "a", "a", "a", "one", "the", ""))
    if article == "a" and phrase[0] in "aeiou":
        article = "an"
    return f"{article} {phrase}".strip()


def caption(clip: Clip, rng: random.Random | None = None) -> str:
    """The clip in words: "a red circle moving right"; with `rng`, in one of many other wordings."""
    if rng is not None and rng.random() < 0.4:
        rng = None
    opening = "" if rng is None else rng.choice(_OPENINGS)
    ways = [_way(t.motion, rng) for t in clip.things]
    nouns = [_noun(t, rng) for t in clip.things]
    same = len(clip.things) == 2 and clip.things[0].motion == clip.things[1].motion
    if rng is not None and same and rng.random() < 0.4:
        phrases = [nouns[0], f"{nouns[1]} {ways[0]}".strip()]
    else:
        phrases = [f"{noun} {way}".strip() for noun, way in zip(nouns, ways, strict=True)]
    return opening + " and ".join(phrases) + _ground(clip.background, rng)
