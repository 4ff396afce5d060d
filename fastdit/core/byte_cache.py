"""Caches bounded by bytes, for tensors that are derived from a few numbers and would otherwise fill GPU memory."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class ByteCache:
    """Keeps the most recently used values, at most `most` bytes in all; a single value may be larger. Thread-safe."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value of a key, calling `make` if it is missing. Two threads may both call `make`."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        value = make()
        with self._lock:
            self._values[key] = value, size(value)
            while self.bytes() > self.most and len(self._values) > 1:
                self._values.popitem(last=False)
        return value

    def bytes(self) -> int:
        return sum(taken for _, taken in self._values.values())

    def clear(self) -> None:
        with self._lock:
            self._values.clear()


def byte_cache(most: int) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Decorator: `functools.lru_cache` bounded by the bytes of the results. `.cache` is its `ByteCache`."""

    def decorate(function: Callable[..., Value]) -> Callable[..., Value]:
        cache = ByteCache(most)

        @functools.wraps(function)
        def cached(*args: Hashable) -> Value:
            return cache.get(args, lambda: function(*args))

        cached.cache = cache  # type: ignore[attr-defined]
        return cached

    return decorate


def size(value: Any) -> int:
    """Bytes of the tensors in a value: a tensor, a dataclass or a tuple of values; 0 for anything else."""
    if isinstance(value, Tensor):
        return value.nbytes
    if is_dataclass(value):
        return sum(size(getattr(value, field.name)) for field in fields(value))
    return sum(map(size, value)) if isinstance(value, tuple) else 0


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """Copy x to a device. A copy from CPU to GPU does not block: it uses pinned memory, kept until it is done."""
    if x.device.type == "cpu" and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)
