"""One case in a process of its own, with a limit of time and of memory."""

from __future__ import annotations

import contextlib
import cProfile
import os
import pstats
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from contextlab.files import read_record, write_record
from tests.soak.fuzz.cases import Case, write_files

IDLE = 20
"""Times the limit that a case may take by the wall's clock."""
MEMORY = 6 << 30
"""Bytes that a case may take, so that what is not bounded fails instead of filling the machine."""

PROFILE = "FUZZ_PROFILE"
"""The environment variable that asks for a profile of each case."""


@dataclass
class Outcome:
    """How a case ended. fault: "" when it is in order."""

    code: int
    seconds: float
    processor: float
    output: str
    errors: str
    fault: str = ""


def forked(case: Case, folder: Path, limit: float) -> Outcome:
    """Do a case in a child of this process, which has imported everything."""
    out, err = folder / ".out", folder / ".err"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setsid()
            os.chdir(folder)
            for path, number in ((out, 1), (err, 2)):
                handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
                os.dup2(handle, number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            code = _do(write_files(case, folder), folder)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    status = _wait(child, limit)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    code = -signal.SIGKILL if status is None else os.waitstatus_to_exitcode(status)
    texts = [path.read_text(errors="replace") if path.exists() else "" for path in (out, err)]
    return judge(case, Outcome(code, time.monotonic() - began, processor, *texts), status is None)


def _wait(child: int, limit: float) -> int | None:
    """The child's status; None when it took twice the processor's seconds, and was killed with its own children.

    On a busy machine the wall's clock says little; it is looked at for what waits without working.
    """
    process, ends = psutil.Process(child), time.monotonic() + IDLE * limit
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        with contextlib.suppress(psutil.Error):
            if sum(process.cpu_times()[:4]) > 2 * limit:
                break
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def spawned(case: Case, folder: Path, limit: float) -> Outcome:
    """Do a case as a user does: `python -m contextlab.cli ...`."""
    arguments = write_files(case, folder)
    began = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "contextlab.cli", *arguments],
            cwd=folder, capture_output=True, timeout=IDLE * limit, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return judge(case, Outcome(-9, limit, limit, "", ""), hung=True)
    except ValueError:  # a null byte, which no command line can hold
        return Outcome(2, 0.0, 0.0, "", "")
    texts = (done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))
    return judge(case, Outcome(done.returncode, time.monotonic() - began, 0.0, *texts), hung=False)


def judge(case: Case, outcome: Outcome, hung: bool) -> Outcome:
    """Say what is wrong with how a case ended, if anything is."""
    both = outcome.output + outcome.errors
    lines = [line for line in outcome.errors.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error:")]
    if hung:
        outcome.fault = "hangs"
    elif "Traceback (most recent call last)" in both:
        outcome.fault = "traceback"
    elif outcome.code not in (0, 1, 2):
        outcome.fault = f"exit code {outcome.code}"
    elif outcome.code == 2 and not told and "Usage:" not in outcome.errors:
        outcome.fault = "exit code 2 without a word"
    elif told and lines[-1] != told[-1]:
        outcome.fault = "an error of more than one line"
    elif told and len(told[-1]) > 2000:
        outcome.fault = "an error of thousands of characters"
    elif case.refused and outcome.code != 2:
        outcome.fault = f"accepted: {case.refused}"
    return outcome


def _do(arguments: list[str], folder: Path) -> int:
    from contextlab.cli import main

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, hard))
    if arguments[0].startswith("damage "):
        damage(arguments.pop(0).removeprefix("damage "), folder)
    if arguments[0] == "load":
        return _load(arguments[1], arguments[3::2])
    sys.argv = ["contextlab", *arguments]
    profile = cProfile.Profile() if PROFILE in os.environ else contextlib.nullcontext()
    try:
        with profile:
            main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    finally:
        if isinstance(profile, cProfile.Profile):
            pstats.Stats(profile).sort_stats("cumulative").print_stats("contextlab|torch", 60)
    return 0


def _load(name: str, changes: list[str]) -> int:
    """Read a recipe, and build each of its models, as `run` does."""
    from contextlab.errors import ContextlabError
    from contextlab.experiments import load_recipe

    try:
        load_recipe(name, changes)
    except ContextlabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def damage(what: str, folder: Path) -> None:
    """Do to a copy of a run, or of a saved model, what disks, editors and other programs do."""
    pattern, how, seed = what.split()
    chance = random.Random(int(seed))
    for name in ("run", "saved"):
        shutil.copytree(folder.parent / "whole" / name, folder / name)
    if chance.random() < 0.5:  # unfinished, so that it is gone on with
        record = folder / "run" / "record.json"
        write_record(record, {**read_record(record), "status": "interrupted"})
    found = sorted(folder.glob(pattern))
    if not found:
        return
    path = chance.choice(found)
    content = path.read_bytes()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "link":
        (folder / "elsewhere").write_bytes(content)
        path.symlink_to(folder / "elsewhere")
    elif how == "dangling":
        path.symlink_to(folder / "nowhere")
    elif how == "pipe":
        os.mkfifo(path)
    elif how != "missing":
        path.write_bytes(_damaged(content, how, chance))


def _damaged(content: bytes, how: str, chance: random.Random) -> bytes:
    if how == "flip" and content:
        at = chance.randrange(len(content))
        return content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]
    known: dict[str, Any] = {
        "half": content[: len(content) // 2], "empty": b"", "noise": chance.randbytes(300), "list": b"[1, 2]",
        "null": b"null", "other": b'{"status": 3, "name": [], "step": "x"}',
    }  # fmt: skip
    return bytes(known.get(how, content))
