"""Kill runs at random moments, as `kill -9` does, and go on until they end: nothing may be lost or come out otherwise.

    python -m tests.soak.kills --kills 300 --seed 0

Five recipes: one with learners of two tasks, one with `compress`, one that sweeps, one whose trials are halved, one in
two worker processes; with --recipe NAME one of them. A campaign is one run,
killed a few times and resumed each time, at last to its end. Kills fall at random times, or before or after a random
write (a file taking its name, a folder being made), so that each gap between two files is met; with workers the whole
tree of processes dies, or one of the workers alone. What is there at the end must be what a run that was never stopped
leaves: all files, equal bit for bit but for times and memory. Exit code 1 where it is not; --keep shows the folders.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

from contextlab.errors import InputError
from contextlab.experiments import ExperimentSpec, run
from contextlab.experiments.folder import HALF_WRITTEN, RunFolder
from contextlab.experiments.jobs import all_jobs
from contextlab.files import read_json
from contextlab.training.checkpoint import newest

MODEL = {"preset": "transformer", "options": {"width": 8, "depth": 1, "heads": 2}}
REGRESSION = {"task": "linear_regression", "options": {"dimensions": 2, "examples": 4}}
RECALL = {"task": "associative_recall", "options": {"vocabulary": 16, "pairs": 2, "length": 8}}
SHORT = {"steps": 30, "batch": 4, "log_every": 5, "checkpoint_every": 6}
RECIPES: dict[str, dict[str, Any]] = {
    "learners": {
        "tasks": {"regression": REGRESSION, "learners": RECALL},  # a task may be called so
        "models": {"softmax": MODEL},
        "train": SHORT,
        "evaluate": {"prompts": 16, "batch": 16},
    },
    "compress": {
        "tasks": {
            "needle": {"task": "needle", "options": {"length": 160}},
            "mqar": {"task": "associative_recall", "options": {"vocabulary": 256, "pairs": 4, "length": 32}},
        },
        "multitask": {"all": {"tasks": ["needle", "mqar"]}},
        "alone": False,
        "models": {"softmax": MODEL},
        "train": {**SHORT, "steps": 8, "batch": 2, "checkpoint_every": 3},
        "evaluate": {"prompts": 4, "batch": 4, "splits": ["train"]},
        "compress": {
            "model": "softmax+all",
            "policies": ["streaming_llm:sinks=2"],
            "budgets": ["50%"],
            "tasks": ["needle"],
            "lengths": [160],
            "prompts": 2,
            "decoded": 8,
        },
        "seeds": [0, 1],
    },
    "sweep": {
        "tasks": {"recall": RECALL},
        "models": {"softmax": MODEL},
        "train": {**SHORT, "steps": 12, "checkpoint_every": 4},
        "evaluate": {"prompts": 16, "batch": 16},
        "sweep": {"over": {"train.learning_rate": [1e-3, 3e-2]}, "validation": {"prompts": 16}},
        "seeds": [0, 1],
    },
    "halving": {
        "tasks": {"recall": RECALL},
        "models": {"softmax": MODEL},
        "train": {**SHORT, "steps": 12, "checkpoint_every": 4},
        "evaluate": {"prompts": 16, "batch": 16},
        "sweep": {
            "over": {"train.learning_rate": [1e-9, 1e-3, 3e-2, 1e-8]},
            "validation": {"prompts": 16},
            "halving": {"metric": "cross_entropy"},
        },
        "seeds": [0, 1],
    },
    "workers": {
        "tasks": {"recall": RECALL},
        "models": {"softmax": MODEL, "delta": {**MODEL, "preset": "gated_delta_net"}},
        "train": {**SHORT, "steps": 200, "checkpoint_every": 20},
        "evaluate": {"prompts": 16, "batch": 16},
    },
}
JOBS = {"workers": 2}
SHARES = {"learners": 0.4, "compress": 0.3, "sweep": 0.1, "halving": 0.1, "workers": 0.1}
"""Of the kills; a worker process takes seconds to start, so the last recipe gets fewer."""
MOST_OF_A_CAMPAIGN = 10
TIMED = ("_seconds", "_per_token", "_per_second", "_ratio", "overhead", "peak_bytes")
"""Endings of metrics that no two runs share."""


def main() -> int:
    """The command line. Returns 1 where a campaign did not end as it must."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="leave the folders of what failed")
    parser.add_argument("--recipe", choices=RECIPES, help="all kills are of this one", default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    base = Path(tempfile.mkdtemp(prefix="kills-"))
    failed: list[str] = []
    began = time.monotonic()
    for name, share in (SHARES if options.recipe is None else {options.recipe: 1.0}).items():
        spec = ExperimentSpec.parse({"name": name, **RECIPES[name]})
        whole = base / name / "whole"
        took, code, _ = attempt(spec, whole, JOBS.get(name, 1), None)
        wanted = fingerprint(spec, whole)
        assert code == 0, f"the run of {name} that nobody kills ended with {code}"
        writes = int((whole.parent / "writes").read_text())
        kinds: collections.Counter[str] = collections.Counter()
        campaigns = 0
        while sum(kinds.values()) < round(options.kills * share):
            campaigns += 1
            folder = base / name / f"campaign-{campaigns}"
            fault = campaign(spec, folder, took, writes, wanted, chance, kinds)
            if fault:
                failed.append(f"{folder}: {fault}")
                print(failed[-1], flush=True)
            elif folder.exists():
                shutil.rmtree(folder)
        print(f"{name}: {campaigns} campaigns, kills: {dict(kinds)}; {time.monotonic() - began:.0f} s", flush=True)
    print(f"{len(failed)} campaigns did not end as they must")
    if not options.keep:
        shutil.rmtree(base)
    return 1 if failed else 0


def campaign(
    spec: ExperimentSpec,
    folder: Path,
    took: float,
    writes: int,
    wanted: dict[str, Any],
    chance: random.Random,
    kinds: collections.Counter[str],
) -> str:
    """One run, killed several times. Returns what is wrong with what it leaves; "" where nothing is."""
    jobs = JOBS.get(spec.name, 1)
    for i in range(chance.randint(1, MOST_OF_A_CAMPAIGN)):
        left = 1 if i == 0 else 2  # a run that was resumed has less before it
        if jobs > 1:
            kill: tuple[Any, ...] = (chance.choice(["tree", "worker"]), chance.uniform(0, took))
        elif chance.random() < 0.5:
            kill = ("time", chance.uniform(0, took / left))
        else:
            kill = (chance.choice(["before a write", "after a write"]), chance.randint(1, writes // left))
        _, code, killed = attempt(spec, folder, jobs, kill)
        kinds[kill[0]] += killed
        if code > 1:
            return f"refused or failed with {code} after {dict(kinds)}: {(folder.parent / 'error').read_text()}"
        if code == 0 and not killed:
            break
    for _ in range(2):  # a run in which a worker was killed ends as failed, and is resumed once more
        _, code, _ = attempt(spec, folder, jobs, None)
        if code == 0:
            break
    if code:
        return f"the last resume ended with {code}: {(folder.parent / 'error').read_text()}"
    found = fingerprint(spec, folder)
    if "spec" not in found:
        return str(found["status"])
    return "; ".join(f"{key}: {found.get(key)} for {each}" for key, each in wanted.items() if found.get(key) != each)


def attempt(spec: ExperimentSpec, folder: Path, jobs: int, kill: tuple[Any, ...] | None) -> tuple[float, int, bool]:
    """Begin or go on with a run in a process of its own. Returns seconds, exit code, whether it was killed.

    The process is a fork of this one, which has imported all that takes long; threads of torch it has none.
    """
    began = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    pid = _fork()
    if pid == 0:
        _child(lambda: _run(spec, folder, jobs, kill), folder.parent / "error")
    killed = False
    if kill is not None and isinstance(kill[1], float):
        if _ended(pid, kill[1]):
            return time.monotonic() - began, _ended(pid, 0)[1], False  # type: ignore[index]
        killed = _kill(pid, kill[0])
    status = _ended(pid, 600)
    if status is None:
        _kill(pid, "tree")
        raise TimeoutError(f"{folder}: still running after 600 s")
    code = status[1]
    killed = killed or code == -signal.SIGKILL
    return time.monotonic() - began, 0 if code == -signal.SIGKILL else code, killed


_STATUS: dict[int, int] = {}


def _fork() -> int:
    pid = os.fork()
    _STATUS.pop(pid, None)  # of a process long ago
    return pid


def _ended(pid: int, seconds: float) -> tuple[int, int] | None:
    """(pid, exit code) once the child has ended, None where it runs on after so many seconds."""
    until = time.monotonic() + seconds
    while pid not in _STATUS:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            _STATUS[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() > until:
            return None
        else:
            time.sleep(0.002)
    return pid, _STATUS[pid]


def _kill(pid: int, which: str) -> bool:
    """Kill the process with all its children, or one child alone. Returns whether there was one to kill."""
    try:
        process = psutil.Process(pid)
        children = process.children(recursive=True)
    except psutil.NoSuchProcess:
        return False
    if which == "worker":
        if not children:
            return False
        random.Random(children[0].pid).choice(children).kill()
        return True
    for each in (process, *children):
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    return True


def _child(work: Callable[[], int], errors: Path) -> None:
    code = 3
    try:
        os.setsid()
        with errors.open("w") as file:
            os.dup2(file.fileno(), 2)
            os.dup2(file.fileno(), 1)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(spec: ExperimentSpec, folder: Path, jobs: int, kill: tuple[Any, ...] | None) -> int:
    """What a person does: resume, and where there is nothing to resume yet, run."""
    written = _counted(kill)
    try:
        done = run(spec, out=folder, resume=True, jobs=jobs, threads=1)
    except InputError as error:
        if "no run to resume" not in str(error):
            raise
        done = run(spec, out=folder, jobs=jobs, threads=1)
    if folder.name == "whole":
        (folder.parent / "writes").write_text(str(written[0]))
    return 0 if done.record["status"] == "finished" else 1


def _counted(kill: tuple[Any, ...] | None) -> list[int]:
    """Count what takes a name on disk, and die at the one that is asked for."""
    count = [0]

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if kill == ("before a write", count[0]):
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*arguments, **options)
            if kill == ("after a write", count[0]):
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in ("replace", "rename", "mkdir", "open", "unlink", "rmdir"):
        setattr(os, name, watched(getattr(os, name)))
    return count


def fingerprint(spec: ExperimentSpec, path: Path) -> dict[str, Any]:
    """What a run left, but for times, by file; read in a process of its own, so that this one has no threads."""
    answer = path.parent / "fingerprint.json"
    pid = _fork()
    if pid == 0:

        def work() -> int:
            answer.write_text(json.dumps(_fingerprint(spec, RunFolder(path))))
            return 0

        _child(work, path.parent / "error")
    if _ended(pid, 120) != (pid, 0):
        return {"status": f"a file is missing or damaged: {(path.parent / 'error').read_text()[-500:]}"}
    found: dict[str, Any] = json.loads(answer.read_text())
    return found


def _fingerprint(spec: ExperimentSpec, folder: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = {"spec": folder.spec.read_text(), "status": folder.status(), "whole": folder.whole(spec)}
    found["half written"] = [str(p) for p in folder.path.rglob(".*") if HALF_WRITTEN.fullmatch(p.name)]
    found["checkpoints of trials"] = [str(path) for path in folder.path.glob("trials/*/step_*")]  # all are let go
    for table in sorted(folder.path.rglob("*.parquet")):
        found[str(table.relative_to(folder.path))] = _table(pd.read_parquet(table))
    for page in sorted(folder.path.glob("*.html")):
        found[page.name] = page.read_text().rstrip().endswith("</html>")
    for job in all_jobs(spec):
        record = read_json(folder.job_record(job))
        history = {name: rows for name, rows in record.get("history", {}).items() if name != "seconds"}
        same = (
            "key",
            "status",
            "message",
            "evaluate_spec",
            "parameters",
            "steps",
            "threads",
            "tasks",
            "trial",
            "setting",
            "validation",
            "rungs",
            "sweep",
        )
        found[job.key] = [history, {name: record.get(name) for name in same}, sorted(record.get("files", ()))]
        if job.kind == "training":
            last = newest(folder.training(job))
            assert last is not None
            for tensors in sorted(last.glob("*.safetensors")):
                name = str(tensors.relative_to(folder.path))
                found[name] = hashlib.sha256(tensors.read_bytes()).hexdigest()
    return found


def _table(table: pd.DataFrame) -> str:
    timed = table["metric"].astype(str).str.endswith(TIMED) if "metric" in table else pd.Series(False, table.index)
    return hashlib.sha256(
        table[~timed].drop(columns="seconds", errors="ignore").to_csv(index=False).encode()
    ).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
