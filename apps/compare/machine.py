"""What a run did to the machine, and what others did meanwhile: peak memory, and the processors' time that went elsewhere."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import psutil
import torch

EVERY = 0.02
"""Seconds between two looks at the process's memory."""
BUSY = 0.2
"""Share of the processors' time that other processes may take before the machine is called busy."""


class Watch:
    """Context manager around a run. peak: bytes, of all GPUs as PyTorch allocated them; without a GPU the process's resident
    memory, looked at every `EVERY` seconds, model and libraries included. others: share of the processors' time, in [0, 1],
    that other processes took."""

    peak = 0
    others = 0.0

    def __enter__(self) -> Watch:
        self._process = psutil.Process()
        self._gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else range(0)
        for gpu in self._gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        if not self._gpus:
            self._thread.start()
        self._start = self._times()
        return self

    def _look(self) -> None:
        while True:
            self.peak = max(self.peak, self._process.memory_info().rss)
            if self._over.wait(EVERY):
                return

    def _times(self) -> tuple[float, float, float]:
        """(now, seconds of all processors that were used, those that this process used)."""
        every = psutil.cpu_times()._asdict()
        used = sum(every.get(kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))
        mine = self._process.cpu_times()
        return time.perf_counter(), used, mine.user + mine.system

    def __exit__(self, *_: object) -> None:
        now, used, mine = (b - a for a, b in zip(self._start, self._times(), strict=True))
        self._over.set()
        with suppress(RuntimeError):  # never started
            self._thread.join()
        if self._gpus:
            self.peak = sum(torch.cuda.max_memory_allocated(gpu) for gpu in self._gpus)
        self.others = min(1.0, max(0.0, (used - mine) / (now * (psutil.cpu_count() or 1)))) if now > 0 else 0.0
