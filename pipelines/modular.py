"""Modular pipelines: blocks, which know no scheduler, open the loops, which belong to the pipeline that runs the block."""

from __future__ import annotations

import functools
import threading
from typing import Any

from fastdit.runs import loops


class _Running(threading.local):
    def __init__(self) -> None:
        self.pipelines: list[Any] = []


_running = _Running()


def watch(pipelines: Any, blocks: Any) -> None:
    """Make the bars of a class of blocks begin loops of the pipeline, of a class of pipelines, whose call opens them. A block
    that is called by hand has loops of its own. Done once, when fastdit is imported."""
    call, bar = pipelines.__call__, blocks.progress_bar

    @functools.wraps(call)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        _running.pipelines.append(self)
        try:
            return call(self, *args, **kwargs)
        finally:
            _running.pipelines.pop()

    class Owner:
        """The bars' `self` is whoever owns the loop; a pipeline or a block."""

        def progress_bar(self, block: Any, *args: Any, **kwargs: Any) -> Any:
            return bar(block, *args, **kwargs)

    loops.watch_loops(Owner)

    @functools.wraps(bar)
    def progress_bar(self: Any, *args: Any, **kwargs: Any) -> Any:
        owner = _running.pipelines[-1] if _running.pipelines else self
        return Owner.progress_bar(owner, self, *args, **kwargs)

    pipelines.__call__, blocks.progress_bar = run, progress_bar
