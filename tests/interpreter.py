"""Imported by `conftest.py` before any Triton kernel: it turns Triton's interpreter on, and repairs what it gets wrong.

The interpreter (3.6 and 3.9) multiplies bfloat16 as if it were integers, and its casts to FP8 neither carry nor saturate
(1000 becomes 256; a GPU gives 448). Left alone, that makes FP8 attention three times worse than it is, and a tolerance set
by it would hide errors of that size. Casts go through torch here; bfloat16 and FP8 products are taken in float32.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp8e4nv": torch.float8_e4m3fn}
BITS = {8: (np.uint8, torch.uint8), 16: (np.int16, torch.int16), 32: (np.int32, torch.int32)}

_convert = interpreter._convert_float
_dot = interpreter.InterpreterBuilder.create_dot


def convert(values, source, target, rounding):
    if source.name not in TYPES or target.name not in TYPES:
        return _convert(values, source, target, rounding)
    bits = np.ascontiguousarray(values).view(BITS[source.primitive_bitwidth][0]).copy()
    x = torch.from_numpy(bits).view(TYPES[source.name]).float()
    if target.name == "fp8e4nv":
        x = torch.where(x.isnan(), x, x.clamp(-448, 448))
    y = x.to(TYPES[target.name]).view(BITS[target.primitive_bitwidth][1]).numpy()
    return y.view(f"uint{target.primitive_bitwidth}").reshape(values.shape)


def dot(self, a, b, accumulator, *arguments):
    def wide(x):
        if x.dtype not in (tl.bfloat16, tl.float8e4nv):
            return x
        return interpreter.TensorHandle(convert(x.data, x.dtype, tl.float32, None).view(np.float32), tl.float32)

    return _dot(self, wide(a), wide(b), accumulator, *arguments)


interpreter._convert_float = convert
interpreter.InterpreterBuilder.create_dot = dot
