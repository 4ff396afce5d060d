"""Where kernel tests run: compiled on the GPU if there is one, otherwise interpreted. Tests hold their tensors on the CPU."""

import functools

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def moved(x):
    """A tensor as it lies in memory (strides, and the NaN around it) on the device of the tests."""
    if not isinstance(x, torch.Tensor) or x.device.type == DEVICE:
        return x
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(DEVICE)
    return memory.as_strided(x.shape, x.stride(), x.storage_offset())


def there(function):
    """`function` on the tests' device: tensors go there and come back."""

    @functools.wraps(function)
    def call(*arguments, **options):
        got = function(*map(moved, arguments), **{name: moved(x) for name, x in options.items()})
        return tuple(x.cpu() for x in got) if isinstance(got, tuple) else got.cpu()

    return call
