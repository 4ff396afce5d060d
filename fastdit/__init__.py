"""Sparse, quantized, self-measuring attention for Hugging Face diffusers."""

from fastdit.api import FastAttnProcessor, accelerate, install, patch_diffusers, propagate_encoder, report, restore
from fastdit.config import Config, Phase, Reuse
from fastdit.core.quant import Quant
from fastdit.planning.adapter import REST, Facts
from fastdit.policies import Dense, Window
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
    "Phase",
    "Quant",
    "Report",
    "Reuse",
    "Window",
    "accelerate",
    "install",
    "preset",
    "propagate_encoder",
    "report",
    "restore",
]

patch_diffusers()
