"""Jobs of a run, one after another, in a process of its own: `python -m contextlab.experiments.worker`.

What all have in common comes as one line of JSON on standard input, then each job as a line, with the file that its
errors go to. The worker writes one JSON object a line to standard output (see `progress.Progress`), "ready" after each
job, and ends when its standard input closes, so that no worker outlives the run that started it. It imports the plugins
that it is told, never those that a file names.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch

from contextlab.errors import ContextlabError
from contextlab.experiments.folder import RunFolder
from contextlab.experiments.jobs import Job
from contextlab.experiments.progress import Throttled
from contextlab.experiments.sampling import settle
from contextlab.experiments.spec import ExperimentSpec
from contextlab.experiments.work import do_job
from contextlab.memory import plain_memory_errors
from contextlab.plugins import load_plugins


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


class _Orders:
    """Lines of standard input. When it closes before all are done, the parent is gone, and so is this process."""

    def __init__(self) -> None:
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.given = self.done = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in sys.stdin:
            self.given += 1
            self.lines.put(line)
        self.lines.put(None)
        if self.done < self.given:
            os.kill(os.getpid(), signal.SIGTERM)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while (line := self.lines.get()) is not None:
            yield json.loads(line)
            self.done += 1


def _errors_to(path: str) -> None:
    """Send what this process and its libraries write as errors to the end of a file."""
    sys.stderr.flush()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 2)
    os.close(file)


def main() -> int:
    """Do the jobs. Returns the exit code: 0 done (however they ended), 2 user's fault, 130 interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job hands on that SIGINT is ignored
        signal.signal(number, _stop)
    try:
        orders = _Orders()
        waiting = iter(orders)
        common = next(waiting)
        torch.set_num_threads(common["threads"])
        load_plugins(common["plugins"])
        spec = ExperimentSpec.parse(common["spec"])
        folder, device = RunFolder(common["folder"]), torch.device(common["device"])
        lines = Throttled(lambda event, key, what: _say(event=event, **what))
        for order in waiting:
            _errors_to(order["errors"])
            settle(folder, spec)
            with plain_memory_errors():
                do_job(folder, spec, Job(**order["job"]), device, lines, common["training"])
            _say(event="ready")
    except (KeyboardInterrupt, StopIteration):
        return 130
    except ContextlabError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
