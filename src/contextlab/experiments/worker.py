"""One job of a run in a process of its own: `python -m contextlab.experiments.worker NAME`, started by `workers`.

The job comes as one line of JSON on standard input. The worker writes one JSON object a line to standard output (see
`progress.Progress`) and ends when its standard input closes, so that no worker outlives the run that started it. It
imports the plugins that it is told, never those that a file names.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

import torch

from contextlab.errors import ContextlabError
from contextlab.experiments.folder import RunFolder
from contextlab.experiments.jobs import Job
from contextlab.experiments.spec import ExperimentSpec
from contextlab.experiments.work import do_job
from contextlab.memory import plain_memory_errors
from contextlab.plugins import load_plugins


class _Lines:
    """A Progress that writes JSON lines, updates at most ten times a second."""

    def __init__(self) -> None:
        self.last = 0.0

    def update(self, key: str, step: int, steps: int, loss: float) -> None:
        now = time.monotonic()
        if step == steps or now - self.last > 0.1:
            self.last = now
            _say(event="update", step=step, steps=steps, loss=loss)

    def phase(self, key: str, text: str) -> None:
        _say(event="phase", text=text)

    def done(self, key: str, status: str, message: str) -> None:
        _say(event="done", status=status, message=message)


def _say(**message: Any) -> None:
    print(json.dumps(message), flush=True)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> int:
    """Do the job. Returns the exit code: 0 done (however it ended), 2 user's fault, 130 interrupted."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job hands on that SIGINT is ignored
        signal.signal(number, _stop)
    try:
        order = json.loads(sys.stdin.readline())
        torch.set_num_threads(order["threads"])
        threading.Thread(target=_end_with_parent, daemon=True).start()
        load_plugins(order["plugins"])
        spec = ExperimentSpec.parse(order["spec"])
        job, device = Job(**order["job"]), torch.device(order["device"])
        with plain_memory_errors():
            do_job(RunFolder(order["folder"]), spec, job, device, _Lines(), order["training"])
    except KeyboardInterrupt:
        return 130
    except ContextlabError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
