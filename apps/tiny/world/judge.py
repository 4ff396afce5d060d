"""A strict judge of clips of the world, off the frames alone, told nothing but what the caption says.

The background that the caption asks for is known to the pixel; what differs from it in chroma is a solid. Each solid's
outline is held against the true projection at the place where it is seen (`outline.py`), its track against that of the
motion asked for, its edges against those of drawn clips. Thresholds are for 256 pixels and grow with the pixel's size.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.apps.tiny.world import scene as world
from fastdit.apps.tiny.world.outline import chroma, cover, fit, pieces, roundness
from fastdit.apps.tiny.world.render import Renderer
from fastdit.apps.tiny.world.scene import (
    BACKDROPS,
    COLORS,
    FLOORS,
    HELD_OUT,
    RADII,
    SIZES,
    SOLIDS,
    SPINS,
    Scene,
    pack,
)
from fastdit.apps.tiny.world.tracks import moves, nominal, track
from fastdit.apps.tiny.world.view import camera
from fastdit.apps.tiny.world.words import caption

MEASURES = ("shape", "round", "color", "count", "motion", "floor", "sharp")
IOU, DEVIATION, ASPECT = 0.96, 0.012, 0.98
FLOOR = 0.045  # mean absolute difference from the background asked for, of 1
SHARP = 0.75  # share of the steepness of real edges
THIN = {"ring": 1.25}  # more outline for its area: the overlap may fall short by that much more
SHOTS = 5  # frames whose outlines are fitted
LEAST = 0.0015  # of the frame: smaller solids are not there


def _hue(video: Tensor, mask: Tensor) -> Tensor:
    """Which of `COLORS` each pixel of [3, F, H, W] is nearest to by hue, within its surroundings in the mask.

    A highlight alone has another hue: it is clipped at white, which makes orange yellow.
    """
    size = 2 * round(min(mask.shape[1:]) / 30) + 1
    around = F.avg_pool2d(chroma(video) * mask, size, 1, size // 2)
    table = chroma(torch.tensor(list(COLORS.values()), device=video.device).float().T)
    table = table / table.norm(dim=0, keepdim=True)
    return torch.einsum("cn,c...->n...", table, around).argmax(0)


def _grow(mask: Tensor, by: int) -> Tensor:
    return F.max_pool2d(mask[:, None].float(), 2 * by + 1, 1, by)[:, 0] > 0


class Judge:
    """`judge(video [3, F, H, W] in [-1, 1], scene)` -> `MEASURES` and `all`, each right or wrong, and `numbers`."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.renderer = Renderer(device)
        self.sharp: dict[tuple[int, int], float] = {}

    def background(self, scene: Scene, size: tuple[int, int, int]) -> Tensor:
        rows = pack([replace(scene, things=())])
        return (self.renderer(rows, *size)[0] + 1) / 2

    def edge(self, share: Tensor, mask: Tensor) -> float:
        """Steepness of the outlines, per pixel."""
        s = share.clamp(max=1)
        gx = (s[:, 1:-1, 2:] - s[:, 1:-1, :-2]) / 2
        gy = (s[:, 2:, 1:-1] - s[:, :-2, 1:-1]) / 2
        m = mask[:, 1:-1, 1:-1]
        rim = _grow(m, 1) & _grow(~m, 1)
        return float(torch.hypot(gx, gy)[rim].mean()) if rim.any() else 0.0

    def real_edge(self, scene: Scene, size: tuple[int, int, int]) -> float:
        """The same of a drawn scene of that size, with still things."""
        if size[1:] not in self.sharp:
            thing = world.Thing("red", "ball", "still", "", 0.7, 0.0, 0.0)
            one = (1, *size[1:])
            plain = Scene((thing,))
            video = (self.renderer(pack([plain]), *one)[0] + 1) / 2
            self.sharp[size[1:]] = self.edge(*cover(video, self.background(plain, one)))
        return self.sharp[size[1:]]

    @torch.no_grad()
    def __call__(self, video: Tensor, scene: Scene) -> dict[str, Any]:
        video = ((video.float() + 1) / 2).clamp(0, 1).to(self.renderer.device)
        size = (video.shape[1], video.shape[2], video.shape[3])
        loose = 256 / min(size[1:])
        back = self.background(scene, size)
        share, mask = cover(video, back)
        hue = _hue(video, mask)
        core = mask & (share > 0.75)
        asked = [list(COLORS).index(t.color) for t in scene.things]
        masks = [mask] if len(asked) == 1 else [_grow(core & (hue == c), max(1, round(2 / loose))) & mask for c in asked]
        mine = torch.stack([hue == c for c in asked]).any(0)
        there = [bool((m.float().mean((1, 2)) > LEAST).float().mean() > 0.9) for m in masks]
        right: dict[str, Any] = dict.fromkeys(MEASURES, True)
        colored = float((core & mine).sum() / core.sum().clamp(min=1))
        right["color"] = all(there) and colored > 0.9 and all(bool((core & (hue == c)).any()) for c in asked)
        stray = float((mask & ~torch.stack([_grow(m, 2) for m in masks]).any(0)).float().mean())
        single = [float((pieces(m[::4], LEAST / 2) == 1).float().mean()) >= 0.85 for m in masks]
        right["count"] = all(there) and all(single) and stray < 0.25 * LEAST
        numbers: dict[str, Any] = {"iou": [], "deviation": [], "aspect": []}
        seen = self._shapes(scene, share, masks, right, numbers, loose)
        self._motions(scene, masks, seen, size, right, all(there))
        self._floor(scene, video, mask, back, size, right, numbers)
        numbers["edge"] = self.edge(share, mask) / self.real_edge(scene, size)
        right["sharp"] = numbers["edge"] >= SHARP
        return right | {"all": all(right.values()), "numbers": numbers}

    def _shapes(
        self, scene: Scene, share: Tensor, masks: list[Tensor], right: dict[str, Any], numbers: dict[str, Any], loose: float
    ) -> list[list[tuple[float, float, float]]]:
        """When (-.5 to .5 over the clip) and where (x, z) each thing was seen, clear of others and of the frame."""
        seen: list[list[tuple[float, float, float]]] = []
        frames = len(share)
        views = torch.stack(camera(pack([scene])[:, 3], frames), -1)[0].to(share.device)
        for i, (t, mask) in enumerate(zip(scene.things, masks, strict=True)):
            solid, radius = SOLIDS.index(t.solid), RADII[len(scene.things)][SIZES.index(t.size)]
            others = _grow(torch.stack([m for j, m in enumerate(masks) if j != i]).any(0), 3) if len(masks) > 1 else None
            found: list[float] = []
            seen.append([])
            for f in torch.linspace(0, frames - 1, SHOTS).round().long().tolist():
                m = mask[f]
                rim = torch.cat([m[:2].flatten(), m[-2:].flatten(), m[:, :2].flatten(), m[:, -2:].flatten()])
                if rim.any() or (others is not None and bool((others[f] & m).any())):
                    continue
                best = fit(m, solid, radius, views[f])
                if best is None:
                    continue
                found.append(best.iou)
                seen[i].append((f / max(1, frames - 1) - 0.5, float(best.place[0]), float(best.place[2])))
                if t.solid == "ball":
                    deviation, aspect = roundness(share[f] * _grow(m[None], 2)[0], best, solid, radius, views[f])
                    numbers["deviation"].append(deviation)
                    numbers["aspect"].append(aspect)
            numbers["iou"].append(sum(found) / len(found) if found else 0.0)
            right["shape"] &= bool(found) and numbers["iou"][-1] >= 1 - (1 - IOU) * loose * THIN.get(t.solid, 1.0)
        if numbers["deviation"]:
            for name, limit in (("deviation", DEVIATION * loose), ("aspect", 1 - (1 - ASPECT) * loose)):
                mean = sum(numbers[name]) / len(numbers[name])
                right["round"] &= mean <= limit if name == "deviation" else mean >= limit
        elif any(t.solid == "ball" for t in scene.things):
            right["round"] = False
        right["shape"] &= right["round"]
        return seen

    def _motions(
        self,
        scene: Scene,
        masks: list[Tensor],
        seen: list[list[tuple[float, float, float]]],
        size: tuple[int, int, int],
        right: dict[str, Any],
        there: bool,
    ) -> None:
        ideal = nominal(scene, seen)
        truth = self._masks(ideal, size)
        for i, t in enumerate(scene.things):
            true, spun = track(truth[i]), 0.0
            if t.solid in SPINS:
                turning = replace(
                    scene,
                    camera="still",
                    things=(replace(ideal.things[i], motion="spinning", spin=world.SPIN, dx=0, dz=0, hop=0),),
                )
                wide = track(self._masks(turning, size)[0])["wide"]
                spun = float(wide.max() - wide.min())
            if scene.camera == "circling":
                spun = 0.0 if t.motion == "still" else spun * 0.8
            right["motion"] &= there and moves(t.motion, t.solid, track(masks[i]), true, spun)

    def _masks(self, scene: Scene, size: tuple[int, int, int]) -> list[Tensor]:
        """What is seen of a scene's solids, drawn small: [F, h, w] each."""
        shrink = 64 / min(size[1:])
        small = (size[0], round(size[1] * shrink), round(size[2] * shrink))
        truth = self.renderer.with_truth(pack([scene]), *small)[1]
        return [truth.masks[0, i] > 0.5 for i in range(len(scene.things))]

    def _floor(
        self,
        scene: Scene,
        video: Tensor,
        mask: Tensor,
        back: Tensor,
        size: tuple[int, int, int],
        right: dict[str, Any],
        numbers: dict[str, Any],
    ) -> None:
        clear = ~_grow(mask, 3)
        errors = {}
        for floor in FLOORS:
            for backdrop in BACKDROPS:
                same = (floor, backdrop) == (scene.floor, scene.backdrop)
                other = back if same else self.background(replace(scene, floor=floor, backdrop=backdrop), size)
                errors[floor, backdrop] = float((video - other).abs().mean(0)[clear].mean()) if clear.any() else 1.0
        numbers["floor"] = errors[scene.floor, scene.backdrop]
        right["floor"] = numbers["floor"] == min(errors.values()) and numbers["floor"] < FLOOR


def summary(rows: Sequence[dict[str, Any]], asked: Sequence[Scene]) -> dict[str, Any]:
    """Shares right over all clips, by kind, and over the combinations never trained; and the means of the numbers."""

    def share(chosen: list[int]) -> dict[str, Any]:
        return {"n": len(chosen)} | {m: round(sum(rows[i][m] for i in chosen) / len(chosen), 4) for m in (*MEASURES, "all")}

    groups = {"everything": list(range(len(rows)))}
    for i, s in enumerate(asked):
        groups.setdefault(s.kind, []).append(i)
        if s.held_out:
            groups.setdefault("never trained on", []).append(i)
    result: dict[str, Any] = {name: share(chosen) for name, chosen in groups.items()}
    for name in ("iou", "deviation", "aspect"):
        values = [v for r in rows for v in r["numbers"][name]]
        if values:
            result[name] = round(sum(values) / len(values), 4)
    for name in ("edge", "floor"):
        result[name] = round(sum(r["numbers"][name] for r in rows) / len(rows), 4)
    return result


def ask(n: int, seed: int = 77) -> tuple[list[Scene], list[str]]:
    """`n` scenes and captions in many wordings; every fifth is a combination never trained on."""
    rng = random.Random(seed)
    held = sorted(HELD_OUT)
    asked = [world.sample(rng, triple=held[i // 5 % len(held)] if i % 5 == 4 else None) for i in range(n)]
    return asked, [caption(s, rng) for s in asked]
