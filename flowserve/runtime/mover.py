"""Copies between the tiers of a KV cache beside the engine loop, which they never hold up."""

import os
import queue
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress

from flowserve.core.messages import KvMoved
from flowserve.core.tiers import Move, Tier


class Mover:
    """Threads that move blocks: one for the disk, one for the rest, so that a slow disk delays nothing else.

    `fd` is readable when something has ended. `copy` raises OSError for a copy that fails.
    """

    def __init__(self, copy: Callable[[Move], None]) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._copy = copy
        self._ended: queue.SimpleQueue[KvMoved] = queue.SimpleQueue()
        self._queues: tuple[queue.SimpleQueue[Move | None], ...] = (queue.SimpleQueue(), queue.SimpleQueue())
        self._threads = [threading.Thread(target=self._run, args=(each,), daemon=True) for each in self._queues]
        for thread in self._threads:
            thread.start()

    def start(self, moves: Iterable[Move]) -> None:
        """Queue copies; returns at once."""
        for move in moves:
            self._queues[Tier.SSD in (move.source, move.target)].put(move)

    def ended(self) -> list[KvMoved]:
        """What has ended since the last call, in order."""
        with suppress(BlockingIOError):  # nothing has ended, or its thread is about to write that it has
            os.eventfd_read(self.fd)
        messages: list[KvMoved] = []
        while not self._ended.empty():
            messages.append(self._ended.get())
        return messages

    def close(self) -> None:
        """Finish the copies under way and queued."""
        for each in self._queues:
            each.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self.fd)

    def _run(self, moves: "queue.SimpleQueue[Move | None]") -> None:
        while (move := moves.get()) is not None:
            try:
                self._copy(move)
                success = True
            except OSError:
                success = False
            self._ended.put(KvMoved(move.ticket, success))
            os.eventfd_write(self.fd, 1)
