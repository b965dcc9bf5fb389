"""Groups of gloo processes on this machine, which live as long as the test session.

    found = ranks(4).run(function, argument)    # what function(argument) returned on each rank

The function is defined in a test module, so that a process can import it; it runs concurrently with
its peers in an initialized default group.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import tempfile
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from typing import Any

from fresh import context

TIMEOUT = 120.0  # seconds per run


class Failed(Exception):
    """A function raised on a rank, or its process died."""


class Ranks:
    def __init__(self, size: int, timeout: float = 60.0) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        pipes = [context.Pipe() for _ in range(size)]
        self._pipes = [here for here, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, size, store, there, timeout), daemon=True)
            for rank, (_, there) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()
        for _, there in pipes:
            there.close()

    def run(self, function: Callable[..., Any], *args: Any, survivors: bool = False) -> list[Any]:
        """Results by rank. survivors: for a rank that died or raised, its result is the error
        text."""
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send((function, args))
        found: list[Any] = [None] * self.size
        waiting = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        errors = []
        while waiting:
            ready = wait([*waiting], TIMEOUT)
            if not ready:
                raise Failed(f"ranks {sorted(waiting.values())} do not answer")
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, result = pipe.recv()
                except EOFError:
                    ok, result = False, "the process died"
                found[rank] = result
                if not ok:
                    errors.append(f"rank {rank} of {self.size}: {result}")
            if errors and not survivors:
                self.close()  # the other ranks wait for it
                raise Failed("\n".join(errors))
        return found

    def close(self) -> None:
        """Terminates the processes."""
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(0.5)
            process.kill()
            process.join()
        self._folder.cleanup()


def refusals(calls: Iterable[Callable[[], Any]]) -> list[str]:
    """Messages of the calls that raise."""
    found = []
    for call in calls:
        try:
            call()
        except RuntimeError as error:
            found.append(str(error))
    return found


def _serve(rank: int, size: int, store: str, pipe: Any, timeout: float) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout),
    )
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, OSError):
            break
        try:
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)
    dist.destroy_process_group()
