"""What a run tells while it works."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from contextlab.errors import InputError
from contextlab.progress import Steps, bars


class Progress(Protocol):
    """What a run tells while it works; the command line draws it. `key` is a job's name (`jobs.Job.key`)."""

    def update(self, key: str, step: int, steps: int, loss: float) -> None:
        """A training has made `step` of `steps` steps."""

    def phase(self, key: str, text: str) -> None:
        """A job has entered a phase: 'training', 'evaluating', ..."""

    def done(self, key: str, status: str, message: str) -> None:
        """A job has ended: 'finished', 'diverged', 'interrupted' or 'failed'; a trial may be 'paused' at a rung."""


class Silent:
    """A Progress that says nothing."""

    def update(self, key: str, step: int, steps: int, loss: float) -> None: ...

    def phase(self, key: str, text: str) -> None: ...

    def done(self, key: str, status: str, message: str) -> None: ...


class Throttled:
    """A Progress that says on what it is told, updates at most ten times a second.

    say: called as say(event, key, arguments), event "update", "phase" or "done".
    """

    def __init__(self, say: Callable[[str, str, dict[str, Any]], None]) -> None:
        self.say, self.last = say, 0.0

    def update(self, key: str, step: int, steps: int, loss: float) -> None:
        now = time.monotonic()
        if step == steps or now - self.last > 0.1:
            self.last = now
            self.say("update", key, {"step": step, "steps": steps, "loss": loss})

    def phase(self, key: str, text: str) -> None:
        self.say("phase", key, {"text": text})

    def done(self, key: str, status: str, message: str) -> None:
        self.say("done", key, {"status": status, "message": message})


class StepsOnly(Silent):
    """A Progress that calls a function of (step, steps, loss), as `train` calls it, whichever training it is."""

    def __init__(self, function: Steps) -> None:
        self.function = function

    def update(self, key: str, step: int, steps: int, loss: float) -> None:
        self.function(step, steps, loss)


@contextmanager
def told(progress: Progress | Steps | bool | None) -> Iterator[Progress]:
    """The Progress that is meant. progress: one, or what `contextlab.progress` describes."""
    if progress is None or isinstance(progress, bool):
        made = bars(progress)
        if made is None:
            yield Silent()
        else:
            with made:
                yield made
    elif all(hasattr(progress, name) for name in ("update", "phase", "done")):
        yield progress  # type: ignore[misc]
    elif callable(progress):
        yield StepsOnly(progress)
    else:
        raise InputError(
            f"progress: expected True, False, a function of (step, steps, loss) or an object with update, phase and "
            f"done, got {type(progress).__name__}"
        )
