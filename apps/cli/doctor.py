"""`fastdit doctor`: what this machine will run and why, a self-test of every kernel against float64, and what to install."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

import fastdit
from fastdit.apps.errors import UserError
from fastdit.apps.render.media import ffmpeg
from fastdit.apps.sizes import FRAMES, parse_size
from fastdit.pipelines import embedded

LEAST_DISK = 1 << 30
EXTRAS = {"ray": ("cluster", "many machines"), "gradio": ("ui", "the web page"), "peft": ("lora", "LoRA")}


@dataclass(frozen=True)
class Finding:
    """good: None for plain information. remedy: what to do if it is not good."""

    what: str
    found: str
    good: bool | None = None
    remedy: str = ""


def doctor(
    folder: Annotated[Path, typer.Option("--out", "-o", help="Folder whose disk is checked.")] = Path("."),
    sizes: Annotated[
        str, typer.Option(help="Clips of the embedded model to predict, frames x height x width, separated by commas.")
    ] = "33x256x256",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Report what this machine will run, and what to install.

    Every kernel is tested against float64. The exit status is 1 if something that rendering needs is missing or wrong.
    """
    asked = [parse_size(each, "--sizes", FRAMES) for each in sizes.split(",")]
    findings = [*software(), *machine(folder), *predicted(asked), *kernels()]
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            mark = {True: "ok  ", False: "!!  ", None: "    "}[finding.good]
            typer.echo(f"{mark}{finding.what.ljust(width)}  {finding.found}")
            if finding.remedy:
                typer.echo(f"    {' ' * width}  -> {finding.remedy}")
    return 1 if any(finding.good is False for finding in findings) else 0


def software() -> list[Finding]:
    """Installed libraries, and missing ones that would add something."""
    import torch

    found = [Finding("fastdit", fastdit.__version__), Finding("Python", f"{platform.python_version()}, {platform.platform()}")]
    found += [Finding(name, metadata.version(name)) for name in ("torch", "diffusers", "transformers")]
    try:
        found.append(Finding("triton", metadata.version("triton")))
    except metadata.PackageNotFoundError:
        needed = torch.cuda.is_available()
        found.append(Finding("triton", "not installed", False if needed else None, "pip install triton" if needed else ""))
    try:
        found.append(Finding("ffmpeg", ffmpeg(), True))
    except UserError as problem:
        found.append(Finding("ffmpeg", "none that runs", False, str(problem)))
    for name, (extra, purpose) in EXTRAS.items():
        try:
            found.append(Finding(name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            found.append(Finding(name, f"not installed; for {purpose}: pip install 'fastdit[{extra}]'"))
    return found


def machine(folder: Path) -> list[Finding]:
    """Processors, memory, the disk of a folder, and GPUs, or why there is no GPU."""
    import torch

    from fastdit.approx.memory_budget import free_bytes

    found = [Finding("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of PyTorch")]
    found.append(Finding("memory", f"{free_bytes(torch.device('cpu')) / 2**30:.1f} GB free"))
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.is_dir())  # `render` creates the rest
    disk = shutil.disk_usage(there).free
    good = disk >= LEAST_DISK and os.access(there, os.W_OK)
    remedy = "" if good else "make room, or choose another folder with --out"
    state = f"{disk / 2**30:.1f} GB free at {there}"
    found.append(Finding("disk", state if os.access(there, os.W_OK) else f"{there} cannot be written", good, remedy))
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = f"PyTorch is built for {built} and sees none" if built else "PyTorch is built without CUDA"
        seen = shutil.which("nvidia-smi") is not None
        remedy = "pip install torch --index-url https://download.pytorch.org/whl/cu128" if seen and not built else ""
        return [*found, Finding("GPU", f"none: {why}; attention runs on the CPU", None, remedy)]
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        free = torch.cuda.mem_get_info(number)[0]
        size = f"{free / 2**30:.0f} of {facts.total_memory / 2**30:.0f} GB free"
        found.append(Finding(f"GPU {number}", f"{facts.name}, sm_{facts.major}{facts.minor}, {size}", True))
        found.append(Finding(f"GPU {number}, attention", which_kernel((facts.major, facts.minor))))
    return found


def predicted(sizes: list[tuple[int, int, int]]) -> list[Finding]:
    """What clips of the embedded model will take here, with each preset that is sparse. Nothing is drawn."""
    from fastdit.prediction.skeleton import skeleton

    pipe, found = skeleton(embedded.PATH), []
    for frames, height, width in sizes:
        what = f"{frames}x{height}x{width}"
        try:
            said = fastdit.predict(pipe, height, width, frames, embedded.STEPS, guidance=embedded.GUIDANCE)
        except ValueError as error:
            raise UserError(f"--sizes {what}: {error}", 2) from None
        found += [Finding(f"predicted, {what}", said.line(name)) for name in ("balanced", "fast")]
    return found


def which_kernel(capability: tuple[int, int]) -> str:
    """The kernel that 16-bit inputs go to on a GPU of this compute capability, and why."""
    if importlib.util.find_spec("triton") is None:
        return "PyTorch's own: Triton is not installed"
    from fastdit.kernels import launch

    if capability != (9, 0):
        return f"the Triton kernel: the overlapped one is for sm_90, this is sm_{capability[0]}{capability[1]}"
    if (why := launch.no_gluon()) is not None:
        return f"the Triton kernel: {why}"
    return "the overlapped kernel for Hopper (Gluon)"


def kernels() -> list[Finding]:
    """Test each number format on ragged layouts against float64, on a GPU if there is one; or say why it has no kernel."""
    import torch

    from fastdit import ops
    from fastdit.apps.bench.attention import RAGGED, wrong
    from fastdit.core.quant import Quant

    formats: dict[str, Any] = {
        "16 bits": Quant(),
        "FP8": Quant("fp8", "fp8", smooth_k=True),
        "INT8 and FP8": Quant("int8", "fp8", smooth_k=True),
        "INT8": Quant("int8", "int8", smooth_k=True),
        "INT4 and FP8": Quant("int4", "fp8", smooth_q=True, smooth_k=True),
    }
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    found = []
    for name, quant in formats.items():
        what = f"kernel, {name}"
        if (reason := ops.unsupported(torch.empty(1, 1, 64, 64, dtype=dtype, device=device), quant)) is not None:
            found.append(Finding(what, f"none here: {reason}; such a phase stays dense"))
            continue
        start = time.perf_counter()
        try:
            lines = wrong([quant], (64,), dtype, device, RAGGED[:1])
        except Exception as error:  # of many kinds: a missing compiler, a driver that is too old
            text = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            found.append(Finding(what, f"does not run: {text}", False, "pip install --upgrade triton, or a newer driver"))
            continue
        taken = f"{time.perf_counter() - start:.1f} s on {device}"
        if lines:
            found.append(Finding(what, f"WRONG: {lines[0]}", False, "report this, with the whole output; use --preset exact"))
        else:
            found.append(Finding(what, f"agrees with float64 ({taken})", True))
    return found
