"""Workers on Ray: each actor holds a pipeline and renders one job at a time, on this machine or another."""

from __future__ import annotations

import logging
import socket
from typing import Any

from fastdit.apps.errors import UserError
from fastdit.apps.render.jobs import Job
from fastdit.apps.render.renderer import Renderer
from fastdit.apps.workers.pool import POLL, Died, Outcome, attempt, set_threads


class Actors:
    """One Ray actor for each GPU of the cluster, or for each `cpus` cores if it has no GPU. address: "auto", "local" or
    ray://HOST:PORT.

    The workers read models, LoRAs and images, so paths must be the same on every machine. If this process already has a Ray
    session, that one is used, and `close` leaves it running.
    """

    def __init__(self, address: str, cpus: int, size: int | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("--cluster needs Ray: pip install 'fastdit[cluster]'") from None
        self.ray, self.ours = ray, not ray.is_initialized()
        self.actors: list[Any] = []
        self.running: dict[Any, int] = {}
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if self.ours:
            try:
                if host and port.isdigit():  # otherwise Ray tries for minutes, and then ends this process
                    socket.create_connection((host, int(port)), timeout=10).close()
                ray.init(address=None if address == "local" else address, log_to_driver=False, logging_level=logging.ERROR)
            except (OSError, OverflowError, ValueError, RuntimeError) as error:
                raise UserError(f"--cluster {address}: no Ray there ({str(error).splitlines()[0][:200]})") from None
        found = ray.cluster_resources()
        gpus = int(found.get("GPU", 0))
        self.size = size or gpus or int(found.get("CPU", 1) // cpus)
        if self.size < 1:
            self.close()
            raise UserError(f"--cluster {address}: the cluster has neither a GPU nor {cpus} cores for a worker")

        @ray.remote(num_cpus=0 if gpus else cpus, num_gpus=1 if gpus else 0, max_restarts=0)
        class Actor:
            def __init__(self) -> None:
                set_threads(None if gpus else cpus)
                self.renderer = Renderer(show=False)

            def render(self, job: Job) -> Outcome:
                return attempt(self.renderer, job)

        actor: Any = Actor
        self.make = actor.remote
        self.actors = [self.make() for _ in range(self.size)]

    def start(self, worker: int, job: Job) -> None:
        self.running[self.actors[worker].render.remote(job)] = worker

    def wait(self) -> list[tuple[int, Outcome | Died]]:
        ready, _ = self.ray.wait(list(self.running), timeout=POLL)
        found: list[tuple[int, Outcome | Died]] = []
        for reference in ready:
            worker = self.running.pop(reference)
            try:
                found.append((worker, self.ray.get(reference)))
            except self.ray.exceptions.RayError as error:
                found.append((worker, Died(type(error).__name__)))
                self.ray.kill(self.actors[worker])
                self.actors[worker] = self.make()
        return found

    def close(self) -> None:
        for actor in self.actors:
            self.ray.kill(actor)
        if self.ours:
            self.ray.shutdown()
