import gc
import weakref

import torch
from util import tiny_wan_pipeline

import fastdit
from fastdit import Config, Phase, Window
from fastdit.core.byte_cache import ByteCache, byte_cache, size

SPARSE = Config((Phase(policy=Window(size=(1, 1, 1))),), (1, 2, 2), min_tokens=0, max_density=1)


def test_the_oldest_goes_when_the_bytes_are_full():
    cache = ByteCache(100)
    made = []

    def make(key, elements):
        return cache.get(key, lambda: made.append(key) or torch.zeros(elements, dtype=torch.int8))

    make("a", 40), make("b", 40), make("a", 40)
    assert made == ["a", "b"]
    make("c", 40)  # b was used longest ago
    make("a", 40)
    assert made == ["a", "b", "c"]
    make("b", 40)
    assert made == ["a", "b", "c", "b"]
    assert cache.bytes() <= 100
    assert make("large", 1000).numel() == 1000
    assert cache.bytes() == 1000, "a value alone may be larger"


def test_what_falls_out_is_freed():
    cache = ByteCache(10)
    first = weakref.ref(cache.get(1, lambda: torch.zeros(8, dtype=torch.int8)))
    assert first() is not None
    cache.get(2, lambda: torch.zeros(8, dtype=torch.int8))
    gc.collect()
    assert first() is None


def test_decorated():
    @byte_cache(1 << 10)
    def squares(n):
        return torch.arange(n), n * n

    assert squares(4) is squares(4)
    assert size(squares(4)) == 32 == squares.cache.bytes()


def test_restoring_one_pipeline_leaves_the_masks_of_another():
    a, b = tiny_wan_pipeline(), tiny_wan_pipeline()
    handles = [fastdit.accelerate(pipe, SPARSE) for pipe in (a, b)]
    with torch.no_grad():
        for pipe in (a, b):
            pipe.transformer(torch.randn(1, 4, 3, 16, 16), torch.tensor([500.0]), torch.randn(1, 512, 16))
    assert all(handle.masks.bytes() > 0 for handle in handles)
    fastdit.restore(a)
    assert [handle.masks.bytes() > 0 for handle in handles] == [False, True]
