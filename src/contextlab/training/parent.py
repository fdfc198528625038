"""The end of a worker whose parent is gone.

A process of `multiprocessing`, such as one of a pool, outlives the one that started it where that is killed: it trains
on for nobody, then waits for its next job for ever. So a training that such a process makes ends, once the parent is
gone, as by SIGTERM, with a checkpoint; and a process that has trained gets that signal, too, as soon as it trains no
more.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection

AGAIN = 5.0
"""Seconds after which a process that has not ended gets its signal again."""


@contextmanager
def parent_watched() -> Iterator[Callable[[], bool]]:
    """While a training goes on. Yields what tells whether this process has lost the one that started it."""
    watch = _of_this_process()
    if watch is None:
        yield lambda: False
        return
    with watch.changed:
        watch.trainings += 1
    try:
        yield watch.lost.is_set
    finally:
        with watch.changed:
            watch.trainings -= 1
            watch.changed.notify_all()


class _Watch:
    """A thread that waits until the parent is gone, then until nothing is trained, and ends the process."""

    def __init__(self, sentinel: int) -> None:
        self.sentinel, self.process = sentinel, os.getpid()
        self.lost, self.changed, self.trainings = threading.Event(), threading.Condition(), 0
        threading.Thread(target=self._wait, name="contextlab-parent", daemon=True).start()

    def _wait(self) -> None:
        connection.wait([self.sentinel])
        self.lost.set()
        while True:
            with self.changed:
                self.changed.wait_for(lambda: not self.trainings)
            os.kill(self.process, signal.SIGTERM)
            time.sleep(AGAIN)


_watch: _Watch | None = None
_lock = threading.Lock()


def _of_this_process() -> _Watch | None:
    """None where `multiprocessing` has not started this process. A fork of a process that is watched gets its own."""
    global _watch
    parent = multiprocessing.parent_process()
    if parent is None:
        return None
    with _lock:
        if _watch is None or _watch.process != os.getpid():
            _watch = _Watch(parent.sentinel)
        return _watch
