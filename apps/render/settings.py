"""The settings of a clip: one table, from which options, keys, pages and hashes are made, and the checks that need no model."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from fastdit import Config, preset
from fastdit.apps.errors import UserError
from fastdit.apps.render.paths import local
from fastdit.apps.render.text import blank, control, half_pair
from fastdit.pipelines.embedded import GUIDANCE, SIZE, STEPS

FRAMES, HEIGHT, WIDTH = SIZE
LONGEST_PROMPT = 4000  # characters; no text encoder in diffusers reads half as many
OFFLOADS = ("none", "model", "group")
FORMATS = ("mp4", "webp", "gif", "png")


@dataclass(frozen=True)
class Setting:
    """How a field of `Settings` is used.

    alias: diffusers' name, if it differs. short: the option's letter. own: unless the user gives it, the pipeline's own default
    is taken. argument: the pipeline is called with it. loads: the loaded pipeline depends on it. hashed: it changes what the
    clip shows, so it is part of the clip's hash. line: a line of a file of prompts may give it. page: a visitor of the web page
    may give it.
    """

    help: str
    alias: str = ""
    short: str = ""
    own: bool = False
    argument: bool = False
    loads: bool = False
    hashed: bool = True
    line: bool = True
    page: bool = False


def _about(help: str, **facts: Any) -> dict[str, Setting]:
    return {"setting": Setting(help, **facts)}


@dataclass(frozen=True)
class Settings:
    """Everything that decides a clip and how it is run. The defaults suit the embedded model.

    custom: a configuration that replaces the preset's. height, width: pixels; lora: see `split_lora`.
    """

    prompt: str = field(metadata=_about("What to draw.", argument=True, page=True))
    negative: str = field(
        default="", metadata=_about("What not to draw.", alias="negative_prompt", own=True, argument=True, page=True)
    )
    seed: int = field(default=0, metadata=_about("Seed of the noise that a clip starts from.", page=True))
    model: str | None = field(
        default=None,
        metadata=_about(
            "Folder or Hub id of a diffusers pipeline. None: the embedded one.",
            short="m", own=True, loads=True, line=False, page=True,
        ),
    )  # fmt: skip
    preset: str = field(
        default="balanced",
        # its configuration is hashed instead
        metadata=_about("How attention is accelerated; `fastdit show presets` lists them.", hashed=False, page=True),
    )
    frames: int = field(
        default=FRAMES,
        metadata=_about(
            f"Number of frames. [embedded model: {FRAMES}]", alias="num_frames", own=True, argument=True, page=True
        ),
    )
    height: int = field(
        default=HEIGHT,
        metadata=_about(f"Pixels. [embedded model: {HEIGHT}; others: their own]", own=True, argument=True, page=True),
    )
    width: int = field(default=WIDTH, metadata=_about("Pixels, as for the height.", own=True, argument=True, page=True))
    steps: int = field(
        default=STEPS,
        metadata=_about(
            f"Denoising steps. [embedded: {STEPS}]", alias="num_inference_steps", own=True, argument=True, page=True
        ),
    )
    guidance: float = field(
        default=GUIDANCE,
        metadata=_about(
            f"Classifier-free guidance; 1: off. [embedded: {GUIDANCE:g}]",
            alias="guidance_scale",
            own=True,
            argument=True,
            page=True,
        ),
    )
    fps: int = field(default=8, metadata=_about("Frames a second. [embedded model: 8; others: 16]", own=True))
    device: str = field(default="auto", metadata=_about("auto, cpu or cuda.", loads=True, hashed=False, line=False))
    dtype: str = field(default="auto", metadata=_about("auto, float32, bfloat16 or float16.", loads=True))
    custom: Config | None = None
    image: str | None = field(
        default=None, metadata=_about("Picture to start from (image-to-video models).", own=True, page=True)
    )
    lora: str | None = field(
        default=None, metadata=_about("LoRA: folder, file or Hub id, with @SCALE if it is not 1.", own=True, loads=True)
    )
    format: str = field(
        default="mp4", metadata=_about(f"{', '.join(FORMATS)} (a file a frame). [mp4; png of image models]", own=True)
    )
    crf: int = field(default=18, metadata=_about("Quality of mp4: 0 is lossless, 51 worst."))
    cpu_offload: str = field(
        default="none",
        metadata=_about(f"Keep the model in main memory: {', '.join(OFFLOADS)}.", loads=True, hashed=False, line=False),
    )
    compile: bool = field(default=False, metadata=_about("torch.compile the denoiser.", loads=True, hashed=False, line=False))
    vae_tiling: bool = field(
        default=False, metadata=_about("Decode in tiles: less memory.", loads=True, hashed=False, line=False)
    )
    ulysses: int = field(
        default=1,
        metadata=_about("GPUs that share each video by attention heads, under torchrun.", loads=True, hashed=False, line=False),
    )
    ring: int = field(
        default=1,
        metadata=_about("GPUs that share each video in a ring, under torchrun.", loads=True, hashed=False, line=False),
    )

    def config(self) -> Config:
        """The preset's configuration. Raises UserError listing the presets."""
        if self.custom is not None:
            return self.custom
        try:
            return preset(self.preset)
        except ValueError as error:
            raise UserError(str(error), 2) from None

    def check(self) -> None:
        """Check everything that needs no model. Raises UserError."""
        for name, said in vars(self).items():
            if isinstance(said, str):
                # a prompt may have any character that JSON allows, as in the pipeline's own call; the other settings may not
                odd = half_pair(said) or (None if name in ("prompt", "negative") else control(said))
                if odd is not None:
                    raise UserError(f"the {name} contains {odd!r}: remove it", 2)
        self.config()
        if blank(self.prompt):
            raise UserError('the prompt is empty: say what to draw, such as "a red ball moving right"', 2)
        if self.steps < 1:
            raise UserError(f"--steps must be at least 1, got {self.steps}", 2)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed must be from 0 to 2^63 - 1, got {self.seed}", 2)
        if not 1 <= self.fps <= 240:
            raise UserError(f"--fps must be from 1 to 240, got {self.fps}", 2)
        if len(self.prompt) > LONGEST_PROMPT or len(self.negative) > LONGEST_PROMPT:
            count = max(len(self.prompt), len(self.negative))
            raise UserError(f"the prompt has {count} characters: the longest allowed has {LONGEST_PROMPT}", 2)
        for name, size in (("frames", self.frames), ("height", self.height), ("width", self.width)):
            if size < 0:
                raise UserError(f"--{name} must be positive, got {size}", 2)
        for name, size in (("ulysses", self.ulysses), ("ring", self.ring)):
            if size < 1:
                raise UserError(f"--{name} must be at least 1, got {size}", 2)
        if self.format not in FORMATS:
            raise UserError(f"--format must be one of {', '.join(FORMATS)}, got {self.format!r}", 2)
        if not 0 <= self.crf <= 51:
            raise UserError(f"--crf must be from 0 (lossless) to 51, got {self.crf}", 2)
        if self.cpu_offload not in OFFLOADS:
            raise UserError(f"--cpu-offload must be one of {', '.join(OFFLOADS)}, got {self.cpu_offload!r}", 2)
        if self.image is not None and not os.path.isfile(local(self.image)):
            raise UserError(f"--image: no file {self.image}", 2)
        if not math.isfinite(self.guidance) or self.guidance < 0:
            raise UserError(f"--guidance must be a number of at least 0 (1 and below: off), got {self.guidance}", 2)

    def to_dict(self) -> dict[str, Any]:
        """The settings as recorded beside the clip, with the preset's configuration."""
        fields = asdict(self)
        if fields.pop("custom") is not None:
            fields["preset"] = "custom"
        return fields | {"config": self.config().to_dict()}

    @property
    def pipeline(self) -> tuple[Any, ...]:
        """What the loaded pipeline depends on."""
        return tuple(getattr(self, name) for name, about in SETTINGS.items() if about.loads)


SETTINGS: dict[str, Setting] = {each.name: each.metadata["setting"] for each in fields(Settings) if each.metadata}
"""The table of settings, by name. `custom` is missing: it cannot be written as text."""
KINDS: dict[str, type] = {
    each.name: {"str": str, "int": int, "float": float, "bool": bool}[str(each.type).removesuffix(" | None")]
    for each in fields(Settings)
    if each.name in SETTINGS
}
DEFAULTS: dict[str, Any] = {each.name: each.default for each in fields(Settings) if each.name in SETTINGS}
ALIASES = {about.alias: name for name, about in SETTINGS.items() if about.alias}
"""{diffusers' name of a setting: ours}."""
