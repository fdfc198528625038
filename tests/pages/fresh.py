"""Runs pieces of code one after the other, each in a process to which contextlab is new.

Python, torch and other libraries take seconds to start. They are imported once, here; every piece then gets a fork of
this process, which has not imported contextlab: what a piece forgets to import, it does not have. Requests are lines of
JSON on standard input: {"code": ...} or {"argv": [...]}, with "cwd", "seconds" and, of `run`, "resolve_only"; each is
answered by a line of JSON. With "warm", of a command whose like was run before, it is a fork of one that has imported
all rooms of contextlab, which takes a command a second.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import signal
import socket
import sys
import time
import traceback
from typing import IO

LIBRARIES = (
    *("torch", "pandas", "pyarrow.parquet", "plotly.graph_objects", "plotly.offline", "plotly.subplots", "pydantic"),
    *("hypothesis.strategies", "jinja2", "psutil", "rich.progress", "rich.table", "safetensors.torch", "typer", "yaml"),
)


def main() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    with contextlib.suppress(ImportError):
        from transformers import AutoModelForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM  # noqa: F401
    warm = None
    for line in sys.stdin:
        assert "contextlab" not in sys.modules
        if json.loads(line).get("warm"):
            warm = warm or start_warm()
            print(line, end="", file=warm, flush=True)
            print(warm.readline(), end="", flush=True)
        else:
            print(json.dumps(answer(json.loads(line))), flush=True)


def start_warm() -> IO[str]:
    """A fork of this process that imports contextlab and answers requests, until this one ends."""
    ours, theirs = socket.socketpair()
    if os.fork():
        theirs.close()
        return ours.makefile("rw")
    ours.close()
    package = importlib.import_module("contextlab")
    for room in pkgutil.iter_modules(package.__path__):
        if room.name != "__main__":
            importlib.import_module(f"contextlab.{room.name}")
    requests = theirs.makefile("rw")
    for line in requests:
        print(json.dumps(answer(json.loads(line))), file=requests, flush=True)
    os._exit(0)


def answer(request: dict) -> dict:
    """The exit status and all that the piece printed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os.setpgid(0, 0)
        signal.alarm(request["seconds"] + 5)  # where this process' parent is killed, no one else ends it
        for stream in (1, 2):
            os.dup2(write, stream)
        os._exit(run(request))
    os.close(write)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child, signal.SIGKILL))
    signal.alarm(request["seconds"])
    began = time.monotonic()
    with os.fdopen(read, errors="replace") as pipe:
        output = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(0)
    return {"status": status, "output": output, "seconds": time.monotonic() - began}


def run(request: dict) -> int:
    """In the child: do it, and give the exit status that Python would give."""
    status = 0
    try:
        os.chdir(request["cwd"])
        if "code" in request:
            exec(compile(request["code"], "<block>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = request["argv"]
            if request.get("into"):
                os.dup2(os.open(request["into"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            from contextlab.cli import main as command

            if request.get("resolve_only"):  # to time real steps of a recipe for a GPU takes minutes
                importlib.import_module("contextlab.cli.run").print_check = lambda spec, *_: spec.trainings()
            command()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    main()
