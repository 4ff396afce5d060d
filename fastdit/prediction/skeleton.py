"""A pipeline without weights, from the configurations in a folder: all that `predict` reads, in a few megabytes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch

SCHEDULER = "scheduler"


def skeleton(folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The pipeline of a folder as `save_pretrained` leaves it, its models on the meta device. dtype: of its weights.

    Text encoders and tokenizers are left out (None): nothing of what is predicted depends on them. Reads `*.json` only; the
    network is never used. Raises ValueError for a folder without a pipeline that diffusers knows.
    """
    import diffusers

    folder = Path(folder)
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        cls = getattr(diffusers, index["_class_name"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder} has no model_index.json of a pipeline that diffusers knows") from None
    takes = inspect.signature(cls.__init__).parameters
    parts: dict[str, Any] = {name: None for name, each in takes.items() if name != "self" and each.default is each.empty}
    for name, value in index.items():
        if name.startswith("_") or name not in takes:
            continue
        if not isinstance(value, list):
            parts[name] = value
        elif value[0] == "diffusers":
            parts[name] = _part(getattr(diffusers, value[1]), folder / name, dtype)
    return cls(**parts)


def _part(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    config = cls.load_config(str(folder), local_files_only=True)
    if not issubclass(cls, torch.nn.Module):
        return cls.from_config(config)
    with torch.device("meta"):
        model = cls.from_config(config)
    for parameter in model.parameters():  # not `.to`, which warns of what should stay in float32
        parameter.data = parameter.data.to(dtype)
    return model.eval()
