"""The state of the calling thread: the denoising loops that it is in, and the names that pipelines give to model calls.

Nearly every diffusers pipeline, classic or modular, iterates its timesteps inside `self.progress_bar(...)`; the others count
as models called by hand. The bar opens before the first step and closes after the last, before decoding, also after an
exception. That marks a run exactly; a list of timesteps or a count of calls only suggests it. Pipelines name their calls of
a model with `cache_context` ("cond", "uncond"). Both are stored per thread, so that threads can share a model.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any


class _Scope(threading.local):
    def __init__(self) -> None:
        self.loops: list[weakref.ref[Loop]] = []
        self.names: list[tuple[weakref.ref[Any], str]] = []


_scope = _Scope()


class Loop:
    """One denoising loop of this thread, from its creation to `end`. pipeline: its pipeline, or the block of a modular one."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = weakref.ref(pipeline)
        self._at_end: list[Callable[[], None]] = []
        self.ended = False
        _scope.loops = [other for other in _scope.loops if (found := other()) is not None and not found.ended]
        _scope.loops.append(weakref.ref(self))

    @property
    def pipeline(self) -> Any:
        return self._pipeline()

    def at_end(self, call: Callable[[], None]) -> None:
        self._at_end.append(call)

    def end(self) -> None:
        """End the loop and run the callbacks. A second call does nothing."""
        self.ended = True
        calls, self._at_end = self._at_end, []
        for call in calls:
            call()


def loops() -> list[Loop]:
    """The loops that this thread is in, innermost first."""
    return [found for reference in reversed(_scope.loops) if (found := reference()) is not None and not found.ended]


def loop() -> Loop | None:
    """The innermost loop of this thread; None outside of loops."""
    return next(iter(loops()), None)


def name_of(model: Any) -> str | None:
    """The name that the pipeline gave to the running call of a model, or None."""
    return next((name for reference, name in reversed(_scope.names) if reference() is model), None)


def watch_loops(cls: Any) -> None:
    """Make `progress_bar` of a class begin and end loops. Called once per class, when fastdit is imported."""
    original = cls.progress_bar

    @functools.wraps(original)
    def progress_bar(self: Any, *args: Any, **kwargs: Any) -> Any:
        bar = original(self, *args, **kwargs)
        # If the bar was replaced by an object without `close`, its end is unknown, so it is not a loop.
        with contextlib.suppress(AttributeError, TypeError):
            # A weak reference: a bar that is never closed (a loop left by `break`) must be freed with its last user.
            bar.close = functools.partial(_close, weakref.ref(bar), Loop(self))
        return bar

    cls.progress_bar = progress_bar


def _close(bar: weakref.ref[Any], running: Loop) -> None:
    running.end()
    if (found := bar()) is not None:
        type(found).close(found)


def watch_names(cls: Any) -> None:
    """Make `cache_context` of a model class record names for `name_of`. Called once, when fastdit is imported."""
    original = cls.cache_context

    @functools.wraps(original)
    @contextlib.contextmanager
    def cache_context(self: Any, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        _scope.names.append((weakref.ref(self), name))
        try:
            with original(self, name, *args, **kwargs):
                yield
        finally:
            _scope.names.pop()

    cls.cache_context = cache_context
