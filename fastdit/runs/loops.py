"""What the calling thread is in the middle of: a pipeline's denoising loop, and a call of a model that the pipeline named.

Nearly every pipeline of diffusers, classic or modular, walks its timesteps inside `self.progress_bar(...)`, on whichever model
and with whichever scheduler; the others count as models called by hand. The bar is opened before the first step and closed
behind the last one, before anything is decoded, also by an exception: that is a run, where a list of timesteps or a count of
calls only hints at one. `cache_context` is how pipelines name what they call a model for ("cond", "uncond"). Both are kept by
thread, so that threads which share a model do not meet.
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
    """One denoising loop of this thread, from its making to `end`. pipeline: whose it is, or the block of a modular one."""

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
        """Called again it does nothing."""
        self.ended = True
        calls, self._at_end = self._at_end, []
        for call in calls:
            call()


def loops() -> list[Loop]:
    """The loops that this thread is in, innermost first."""
    return [found for reference in reversed(_scope.loops) if (found := reference()) is not None and not found.ended]


def loop() -> Loop | None:
    """The innermost of them."""
    return next(iter(loops()), None)


def name_of(model: Any) -> str | None:
    """The name that the running call of a model was given."""
    return next((name for reference, name in reversed(_scope.names) if reference() is model), None)


def watch_loops(cls: Any) -> None:
    """Make the bars of a class with `progress_bar` begin and end loops. Done once a class, when fastdit is imported."""
    original = cls.progress_bar

    @functools.wraps(original)
    def progress_bar(self: Any, *args: Any, **kwargs: Any) -> Any:
        bar = original(self, *args, **kwargs)
        # A bar that something else stands for, which would not tell its end, is no loop.
        with contextlib.suppress(AttributeError, TypeError):
            # Through a weak reference: a bar that is never closed (a loop left by `break`) must go with its last user, at once.
            bar.close = functools.partial(_close, weakref.ref(bar), Loop(self))
        return bar

    cls.progress_bar = progress_bar


def _close(bar: weakref.ref[Any], running: Loop) -> None:
    running.end()
    if (found := bar()) is not None:
        type(found).close(found)


def watch_names(cls: Any) -> None:
    """Make `cache_context` of a class of models known to `name_of`. Done once, when fastdit is imported."""
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
