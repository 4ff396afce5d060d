"""The compile table: `python tests/compile_kernels.py [dim ...]` prints it, one JSON line a kernel, for `compile_table.json`.

A program of its own: in the test process Triton is in interpreter mode. `controls`: each of `CONTROLS`; `options`: kernels with
what can be asked for beside the format, and those of float32. `hopper DIM ...`: the warp-specialized kernel of sm_90 (a minute
each on a slow machine); `hopper-short`: two of it, and one that raises the flag. `scores`: antidiagonal scores. `pooled`: the
pooled remainder, `repair`: the dense launch behind a call, `merge`: parts of lists. `flag`: kernels that raise the flag.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path

from fastdit.apps.bench import sass
from fastdit.core.quant import Quant
from fastdit.kernels import triton_forward

CONTROLS = {
    "V not transposed": (
        "v = tl.trans(tl.load(V + first * DP + (d[:, None] * BN + columns[None, :])))",
        "v = tl.load(V + first * DP + (columns[:, None] * DP + d[None, :]))",
    ),
    "K not padded": (
        "tl.load(K + first * DP + (columns[:, None] * DP + d[None, :]))",
        "tl.load(K + first * DP + (columns[:, None] * DP + d[None, :]), mask=(first + columns < n_q)[:, None], other=0.0)",
    ),
    "mask in every iteration": ("if masked == 1:", "if masked >= 0:"),
    "P not relabelled": ("p = tl.reshape(tl.permute(", "tl.reshape(tl.permute("),
}
"""Mistakes in the kernel's source, old text to new, that the table must catch."""


HOPPER = (Quant(), Quant("fp8", "fp8"), Quant("int8", "fp8", smooth_k=True), Quant("int8", smooth_k=True))
"""Formats of the warp-specialized kernel."""


def mutant(name: str, folder: str):
    """The kernel with a mistake in it. Triton reads the source of a kernel from its file, so it gets one."""
    old, new = CONTROLS[name]
    text = Path(triton_forward.__file__).read_text()
    assert old in text, name
    path = Path(folder) / "mutant.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("mutant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.forward


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        if sys.argv[1:] == ["controls"]:
            for name in CONTROLS:
                row = sass.compile_forward(90, 128, Quant("fp8", "fp8"), mutant(name, folder))
                print(json.dumps({"control": name} | row), flush=True)
            row = sass.compile_forward(90, 128, Quant("fp8", "fp8"), BM=128, num_warps=4)
            print(json.dumps({"control": "four warps for 128 rows"} | row), flush=True)
        elif sys.argv[1:2] == ["hopper"]:
            for dim in map(int, sys.argv[2:]):
                for quant in HOPPER:
                    for slots in (128, 64):
                        print(json.dumps({"slots": slots} | sass.compile_hopper(dim, quant, slots)), flush=True)
        elif sys.argv[1:] == ["hopper-short"]:
            for quant in HOPPER[:2]:
                print(json.dumps({"slots": 128} | sass.compile_hopper(128, quant, padded=False)), flush=True)
            print(json.dumps({"slots": 128} | sass.compile_hopper(128, Quant(), padded=False, flag=True)), flush=True)
        elif sys.argv[1:] == ["scores"]:
            for arch in sass.SHARED:
                for wide in (False, True):
                    print(json.dumps(sass.compile_scores(arch, 128, wide)), flush=True)
        elif sys.argv[1:] in (["pooled"], ["repair"]):
            compiled = sass.compile_pooled if sys.argv[1] == "pooled" else sass.compile_repair
            for arch in sass.SHARED:
                for dim, wide in ((64, False), (128, False), (256, False), (128, True), (256, True)):
                    print(json.dumps(compiled(arch, dim, wide)), flush=True)
        elif sys.argv[1:] == ["merge"]:
            for arch in sass.SHARED:
                for dim in (64, 256):
                    print(json.dumps(sass.compile_merge(arch, dim)), flush=True)
        elif sys.argv[1:] == ["flag"]:
            for arch in sass.SHARED:
                for quant in (Quant(), Quant("int8", "none" if arch < 89 else "fp8", smooth_k=True)):
                    for flag in (False, True) if quant.is_none else (True,):
                        print(json.dumps({"flag": flag} | sass.compile_forward(arch, 128, quant, FLAG=flag)), flush=True)
                print(json.dumps({"pooled": True} | sass.compile_pooled(arch, 128, False, flag=True)), flush=True)
        elif sys.argv[1:] == ["options"]:
            whole = {"PADDED": True, "SPLIT": True}
            for arch in sass.SHARED:
                for quant in (Quant(), Quant("int8", "none" if arch < 89 else "fp8", smooth_k=True)):
                    for changes in (whole, whole | {"KEY_BIAS": True}, {"PADDED": True, "RANK": 16}):
                        row = sass.compile_forward(arch, 128, quant, **changes)
                        print(json.dumps({"options": changes} | row), flush=True)
                for dim in (64, 128):
                    print(json.dumps({"options": "wide"} | sass.compile_forward(arch, dim, Quant(), wide=True)), flush=True)
        else:
            for case in sass.cases(dims=[int(dim) for dim in sys.argv[1:]] or (64, 128, 256)):
                print(json.dumps(sass.compile_forward(*case)), flush=True)
