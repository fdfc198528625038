"""What a run tells while it works."""

from __future__ import annotations

import time
from typing import Any, Protocol


class Progress(Protocol):
    """What a run tells while it works; the command line draws it. `key` is a job's name (`jobs.Job.key`)."""

    def update(self, key: str, step: int, steps: int, loss: float) -> None:
        """A training has made `step` of `steps` steps."""

    def phase(self, key: str, text: str) -> None:
        """A job has entered a phase: 'training', 'evaluating', ..."""

    def done(self, key: str, status: str, message: str) -> None:
        """A job has ended: 'finished', 'diverged', 'interrupted' or 'failed'."""


class Silent:
    """A Progress that says nothing."""

    def update(self, key: str, step: int, steps: int, loss: float) -> None: ...

    def phase(self, key: str, text: str) -> None: ...

    def done(self, key: str, status: str, message: str) -> None: ...


class Throttled:
    """A Progress that says on what it is told by `say`, updates at most ten times a second."""

    def __init__(self) -> None:
        self.last = 0.0

    def say(self, event: str, key: str, **what: Any) -> None:
        """event: "update", "phase" or "done". what: its other arguments."""
        raise NotImplementedError

    def update(self, key: str, step: int, steps: int, loss: float) -> None:
        now = time.monotonic()
        if step == steps or now - self.last > 0.1:
            self.last = now
            self.say("update", key, step=step, steps=steps, loss=loss)

    def phase(self, key: str, text: str) -> None:
        self.say("phase", key, text=text)

    def done(self, key: str, status: str, message: str) -> None:
        self.say("done", key, status=status, message=message)
