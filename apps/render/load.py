"""Loading a pipeline, and finding out what it can render. Every error names its remedy."""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastdit.apps.errors import UserError
from fastdit.apps.render.paths import here, hub_id, local, split_lora
from fastdit.apps.render.settings import KINDS, SETTINGS, Settings
from fastdit.pipelines import embedded

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = (".safetensors", ".bin", ".pt")  # of LoRA files; no repository has such a name
LEAST_PIXELS = 16  # the least that SSIM's window and H.264 can handle


def resolve(settings: Settings) -> tuple[str, Any]:
    """The (device, torch dtype) to use; "auto" is resolved. Raises UserError for a missing device."""
    import torch

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    device, cuda = settings.device, torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if cuda else "cpu"
    if device not in ("cpu", "cuda") or settings.dtype not in ("auto", *dtypes):
        raise UserError("--device must be auto, cpu or cuda, and --dtype auto, float32, bfloat16 or float16", 2)
    if device == "cuda" and not cuda:
        raise UserError("--device cuda: PyTorch sees no CUDA GPU here: use --device cpu, or install PyTorch's CUDA build")
    if settings.dtype != "auto":
        return device, dtypes[settings.dtype]
    # The embedded model is so small that half precision saves nothing.
    return device, torch.bfloat16 if device == "cuda" and settings.model else torch.float32


def load(settings: Settings) -> Any:
    """Load the settings' diffusers pipeline onto its device, without progress bars. A local folder never uses the network."""
    import torch
    import transformers
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    from fastdit.pipelines.registry import adapter_for

    device, dtype = resolve(settings)
    source, local = _locate(settings.model or str(embedded.PATH), embedded=not settings.model)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # Wan's autoencoder loses detail in half precision; it is a small part of the time.
    types = {"default": dtype, "vae": torch.float32}
    try:
        with warnings.catch_warnings():
            # diffusers 0.42 warns that the argument is now called `dtype`; 0.37 knows only the old name.
            warnings.simplefilter("ignore", FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(source, torch_dtype=types, local_files_only=local)
    except Exception as error:  # four libraries raise many kinds
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        remedy = "download or save it again" if local else "check the id and the network, or give -m a downloaded folder"
        raise UserError(f"cannot load the model {source} ({cause[:200]}): {remedy}") from error
    if "callback_on_step_end" not in (takes := inspect.signature(pipe.__call__).parameters) or "prompt" not in takes:
        missing = "no prompt" if "prompt" not in takes else "no callback_on_step_end"
        raise UserError(f"{source} is a {type(pipe).__name__}, which takes {missing}: give -m a text-to-video model")
    try:
        known = [adapter_for(model) for model in denoisers(pipe)]
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    if not known:
        raise UserError(f"{source} has no denoiser that fastdit knows: give -m a diffusion model")
    pipe.set_progress_bar_config(disable=True)
    return _prepare(pipe, settings, device)


def _prepare(pipe: Any, settings: Settings, device: str) -> Any:
    """Apply LoRA, offload, tiling and compilation. Raises UserError for what this pipeline or machine cannot do."""
    import torch

    if settings.lora:
        path, weight = split_lora(settings.lora)
        if not here(path) and (not hub_id(path) or path.endswith(WEIGHTS)):
            raise UserError(
                f"cannot load the LoRA {settings.lora} (no file or folder {path}, nor is that a Hub id owner/name)", 2
            )
        try:
            pipe.load_lora_weights(str(local(path)) if here(path) else path, adapter_name="lora")
            pipe.set_adapters(["lora"], [float(weight)])
        except Exception as error:  # peft missing, no such file, weights of another model, not a number
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"cannot load the LoRA {settings.lora} ({cause[:200]})") from error
    if settings.vae_tiling:
        if not hasattr(getattr(pipe, "vae", None), "enable_tiling"):
            raise UserError(f"--vae-tiling: the autoencoder of {type(pipe).__name__} cannot work in tiles")
        pipe.vae.enable_tiling()
    if settings.cpu_offload == "none":
        pipe.to(device)
    elif device == "cpu":
        raise UserError("--cpu-offload: there is no GPU to unload", 2)
    elif settings.cpu_offload == "model":
        pipe.enable_model_cpu_offload()
    else:
        pipe.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level", use_stream=True)
    if settings.ulysses * settings.ring > 1:
        split(pipe, settings.ulysses, settings.ring)
    if settings.compile:
        for model in denoisers(pipe):
            compile_blocks: Any = getattr(model, "compile_repeated_blocks", None)
            if getattr(model, "_repeated_blocks", None):
                compile_blocks(fullgraph=True)
            else:
                model.compile()
    return pipe


def split(pipe: Any, ulysses: int, ring: int) -> None:
    """Split the sequence of every denoiser over GPUs. Raises UserError for a model that diffusers cannot split this way."""
    from diffusers import ContextParallelConfig

    for model in denoisers(pipe):
        split_over: Any = getattr(model, "enable_parallelism", None)
        name, heads = type(model).__name__, getattr(model.config, "num_attention_heads", None)
        if split_over is None or getattr(model, "_cp_plan", None) is None:
            raise UserError(f"--ulysses, --ring: diffusers does not know how to split {name} over GPUs")
        if isinstance(heads, int) and heads % ulysses:
            raise UserError(f"--ulysses {ulysses} must divide the {heads} attention heads of {name}: use --ring")
        split_over(config=ContextParallelConfig(ulysses_degree=ulysses, ring_degree=ring))


def defaults(pipe: Any) -> dict[str, Any]:
    """A pipeline's own default settings, read off its signature: frames, height, width, steps, guidance; fps is 16."""
    names = {about.alias or name: name for name, about in SETTINGS.items() if about.argument and KINDS[name] is not str}
    parameters = inspect.signature(pipe.__call__).parameters
    found = {ours: parameters[name].default for name, ours in names.items() if name in parameters}
    size = getattr(pipe, "default_sample_size", None)
    if isinstance(size, int):  # image pipelines leave height and width to the denoiser's configuration
        pixels = size * getattr(pipe, "vae_scale_factor", 8)
        found = {name: pixels if value is None and name in ("height", "width") else value for name, value in found.items()}
    known = {name: value for name, value in found.items() if isinstance(value, int | float)}
    return known | {"fps": 16} | ({} if makes_video(pipe) else {"frames": 1, "format": "png"})


def makes_video(pipe: Any) -> bool:
    return "num_frames" in inspect.signature(pipe.__call__).parameters


def _locate(model: str, embedded: bool) -> tuple[str, bool]:
    """(path or Hub id, whether it is local)."""
    folder = local(model)
    if not here(model) and hub_id(model):
        return model, False
    remedy = (
        "train it with fastdit.apps.tiny.world.train, or reinstall fastdit"
        if embedded
        else "give -m a folder saved by pipe.save_pretrained(...), or a Hub id owner/name"
    )
    if not folder.is_dir():
        raise UserError(f"no model folder {folder}: {remedy}")
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        parts = {name: part for name, part in index.items() if isinstance(part, list) and part[0] is not None}
    except (OSError, ValueError, AttributeError, IndexError):
        raise UserError(f"{folder} has no readable model_index.json: {remedy}") from None
    for name in parts:
        if not (folder / name).is_dir():
            raise UserError(f"the model {folder} lacks its part {name}/: {remedy}")
        # Only models have config.json; schedulers and tokenizers name theirs otherwise and have no weights.
        has_weights = any(any((folder / name).glob(f"*.{kind}")) for kind in ("safetensors", "bin"))
        if (folder / name / "config.json").is_file() and not has_weights:
            raise UserError(f"no weights in {folder / name} (*.safetensors or *.bin): {remedy}")
    return str(folder), True


def denoisers(pipe: Any) -> Iterator[nn.Module]:
    """The models that fastdit accelerates in a pipeline."""
    from fastdit.api import denoisers_of

    return (model for _, model in denoisers_of(pipe))


def multiples(pipe: Any) -> tuple[int, int, int]:
    """(frames − 1, height, width) must be multiples of these: the autoencoder's scale times the denoiser's patch."""
    from fastdit.prediction import shape

    model: Any = next(denoisers(pipe))
    try:
        return shape.multiples(pipe, model)
    except ValueError:  # a UNet, or a model that was described
        pass
    scale: Any = getattr(pipe, "vae_scale_factor_spatial", None) or getattr(pipe, "vae_spatial_compression_ratio", 8)
    time: Any = getattr(pipe, "vae_scale_factor_temporal", None) or getattr(pipe, "vae_temporal_compression_ratio", 4)
    patch = getattr(model.config, "patch_size", 1)
    h, w = patch[-2:] if isinstance(patch, list | tuple) else (patch, patch)
    return time, scale * h, scale * w


def tokens(pipe: Any, frames: int, height: int, width: int) -> int:
    """Tokens of a clip in the denoiser's sequence; text is not counted."""
    time, h, w = multiples(pipe)
    return ((frames - 1) // time + 1) * (height // h) * (width // w)


def check_shape(pipe: Any, frames: int, height: int, width: int) -> None:
    """Raise UserError for a size that does not fit the model, naming the nearest one that does."""
    time, h, w = multiples(pipe)
    if not makes_video(pipe) and frames != 1:
        raise UserError(f"--frames must be 1: {type(pipe).__name__} makes single images, got {frames}", 2)
    if frames < 1 or (frames - 1) % time:
        nearest = time * max(0, round((frames - 1) / time)) + 1
        raise UserError(f"--frames must be {time}k + 1 for this model, got {frames}: nearest is {nearest}", 2)
    for name, size, step in (("height", height, h), ("width", width, w)):
        least = -(-LEAST_PIXELS // step) * step
        if size < least or size % step:
            nearest = max(least, round(size / step) * step)
            rule = f"--{name} must be a multiple of {step}, at least {least}, for this model"
            raise UserError(f"{rule}, got {size}: nearest is {nearest}", 2)


def unknown_words(pipe: Any, prompt: str) -> list[str]:
    """The words of the prompt that the model says it does not know (`embedded.unknown_words`); a line on standard error
    says so."""
    unknown = embedded.unknown_words(prompt, str(getattr(pipe.config, "_name_or_path", "")) or None)
    if unknown:
        print(f"fastdit: not understood: {', '.join(unknown)}", file=sys.stderr)
    return unknown


def dropped_tokens(pipe: Any, prompt: str) -> int:
    """The number of tokens of the prompt that the model does not read; a warning on standard error says so."""
    parameter = inspect.signature(pipe.__call__).parameters.get("max_sequence_length")
    tokenizer = getattr(pipe, "tokenizer", None)
    if parameter is None or tokenizer is None:
        return 0
    count = len(tokenizer(prompt, truncation=False, verbose=False)["input_ids"])
    dropped = max(0, count - parameter.default)
    if dropped:
        print(
            f"fastdit: the prompt has {count} tokens and the model reads {parameter.default}: {dropped} are dropped",
            file=sys.stderr,
        )
    return dropped
