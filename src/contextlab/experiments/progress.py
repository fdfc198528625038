"""What a run tells while it works."""

from __future__ import annotations

from typing import Protocol


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
