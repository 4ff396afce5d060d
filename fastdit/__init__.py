"""Sparse, quantized, self-measuring attention for Hugging Face diffusers.

Importing fastdit is light: torch and diffusers are imported where a name of `__all__` needs them, on its first use.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fastdit.diffusers_hooks import patch_diffusers

if TYPE_CHECKING:
    from fastdit.api import FastAttnProcessor, accelerate, install, propagate_encoder, report, restore
    from fastdit.apps.compare.pipeline import compare
    from fastdit.apps.tune.pipeline import tune
    from fastdit.config import Config, Phase, Reuse
    from fastdit.core.number_format import Quant
    from fastdit.planning.adapter import REST, Facts
    from fastdit.policies import Dense, Window
    from fastdit.prediction.forecast import Forecast, Prediction
    from fastdit.prediction.predict import predict
    from fastdit.presets import PRESETS, preset
    from fastdit.reporting.report import Report

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "REST",
    "Config",
    "Dense",
    "Facts",
    "FastAttnProcessor",
    "Forecast",
    "Phase",
    "Prediction",
    "Quant",
    "Report",
    "Reuse",
    "Window",
    "accelerate",
    "compare",
    "install",
    "predict",
    "preset",
    "propagate_encoder",
    "report",
    "restore",
    "tune",
]
_EXPORTS = {
    "api": ("FastAttnProcessor", "accelerate", "install", "propagate_encoder", "report", "restore"),
    "apps.compare.pipeline": ("compare",),
    "apps.tune.pipeline": ("tune",),
    "config": ("Config", "Phase", "Reuse"),
    "core.number_format": ("Quant",),
    "planning.adapter": ("REST", "Facts"),
    "policies": ("Dense", "Window"),
    "prediction.forecast": ("Forecast", "Prediction"),
    "prediction.predict": ("predict",),
    "presets": ("PRESETS", "preset"),
    "reporting.report": ("Report",),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}


def __getattr__(name: str) -> Any:
    """A name of `__all__`, or a module of the package (`fastdit.ops`), imported on first use."""
    if name in _MODULE_OF:
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    elif not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


patch_diffusers()
