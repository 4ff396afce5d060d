"""Finding and loading the pipeline a command names, and what it can draw. Every failure is one line with a remedy."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

from fastdit.apps.media import Problem

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(model: str | None, device: str, dtype: Any) -> Any:
    """The pipeline in a folder or on the Hub (None: the embedded one), on a device, quiet. A folder never means the network."""
    import torch
    import transformers
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    from fastdit.pipelines import tiny

    source, local = _locate(model if model is not None else str(tiny.PATH), embedded=model is None)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Wan's autoencoder loses detail in half precision; it is a small part of the time.
    types = {"default": dtype, "vae": torch.float32}
    try:
        pipe = DiffusionPipeline.from_pretrained(source, torch_dtype=types, local_files_only=local)
    except Exception as error:  # of many kinds, from four libraries
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = (
            "download or save it again" if local else "check the id and the network, or give -m a downloaded folder"
        )
        raise Problem(f"cannot load the model {source} ({cause[:200]}): {remedy}") from error
    wanted = {"num_frames", "callback_on_step_end"} - set(inspect.signature(pipe.__call__).parameters)
    if wanted:
        raise Problem(
            f"{source} is a {type(pipe).__name__}, which takes no {' and no '.join(sorted(wanted))}: give -m a text-to-video model"
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _locate(model: str, embedded: bool) -> tuple[str, bool]:
    """(path or Hub id, whether it is local)."""
    folder = Path(model).expanduser()
    if not folder.exists() and HUB_ID.fullmatch(model) and not model.startswith("."):
        return model, False
    remedy = (
        "train it with fastdit.apps.tiny.train, or reinstall fastdit"
        if embedded
        else "give -m a folder saved by pipe.save_pretrained(...), or a Hub id owner/name"
    )
    if not folder.is_dir():
        raise Problem(f"no model folder {folder}: {remedy}")
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = {name: part for name, part in index.items() if isinstance(part, list) and part[0] is not None}
    except (OSError, ValueError, AttributeError, IndexError):
        raise Problem(f"{folder} has no readable model_index.json: {remedy}") from None
    for name in parts:
        if not (folder / name).is_dir():
            raise Problem(f"the model {folder} lacks its part {name}/: {remedy}")
        # Only models have config.json; schedulers and tokenizers name theirs otherwise and have no weights.
        has_weights = any(any((folder / name).glob(f"*.{kind}")) for kind in ("safetensors", "bin"))
        if (folder / name / "config.json").is_file() and not has_weights:
            raise Problem(f"no weights in {folder / name} (*.safetensors or *.bin): {remedy}")
    return str(folder), True


def multiples(pipe: Any) -> tuple[int, int, int]:
    """(frames − 1, height, width) must be multiples of these: the autoencoder's scale times the denoiser's patch."""
    scale = getattr(pipe, "vae_scale_factor_spatial", None) or getattr(pipe, "vae_spatial_compression_ratio", 8)
    time = getattr(pipe, "vae_scale_factor_temporal", None) or getattr(pipe, "vae_temporal_compression_ratio", 4)
    patch = getattr(pipe.transformer.config, "patch_size", 1)
    h, w = patch[-2:] if isinstance(patch, list | tuple) else (patch, patch)
    return time, scale * h, scale * w


def check_shape(pipe: Any, frames: int, height: int, width: int) -> None:
    """Raises Problem naming the nearest valid value of whatever does not fit the model."""
    time, h, w = multiples(pipe)
    if frames < 1 or (frames - 1) % time:
        raise Problem(
            f"--frames must be {time}k + 1 for this model, got {frames}: nearest is {time * max(0, round((frames - 1) / time)) + 1}",
            2,
        )
    for name, size, step in (("height", height, h), ("width", width, w)):
        # SSIM and H.264 need a few pixels too.
        least = -(-16 // step) * step
        if size < least or size % step:
            raise Problem(
                f"--{name} must be a multiple of {step}, at least {least}, for this model, got {size}: nearest is {max(least, round(size / step) * step)}",
                2,
            )


def dropped_tokens(pipe: Any, prompt: str) -> int:
    """How many tokens of the prompt the model does not read; says so on standard error."""
    parameter = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    tokenizer = getattr(pipe, "tokenizer", None)
    if parameter is None or tokenizer is None:
        return 0
    count = len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"])
    dropped = max(0, count - parameter.default)
    if dropped:
        print(
            f"fastdit: the prompt has {count} tokens, the model reads {parameter.default}: the last {dropped} are dropped",
            file=sys.stderr,
        )
    return dropped
