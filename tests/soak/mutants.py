"""Change one line of the sources at a time, and see whether the tests notice: a seeded sample over all rooms.

    python -m tests.soak.mutants --count 200 --seed 0 --out mutants.jsonl
    python -m tests.soak.mutants --count 200 --seed 0 --out mutants.jsonl --resume

`mutate.py` says which changes there are, `chosen.py` which tests a mutant is put to: first those that mirror its file,
then its laws, then all that name what it defines, then its room's. The first that fails kills it. A test that hangs
kills, too, and is counted apart; a stage that is only long ends after --stage seconds of processor time, and the next
begins, so "survived" means: survived the tests that were run. `stages` of the record says which were cut short. Each
test that kills must pass on the sources as they are, else it is left out. All this happens in copies of the tree in a
temporary folder, one for each of --jobs, in forks of this process, one thread each.

The file of --out has one JSON object a line and a mutant; --resume leaves out those that it has, --retry only those
that were killed. --report prints its table and runs nothing. `equivalent.json` lists survivors that no test can kill,
each with its reason; the share of killed mutants is taken without them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.soak.chosen import stages
from tests.soak.mutate import Mutant, sample

ROOT = Path(__file__).parent.parent.parent
EQUIVALENT = Path(__file__).with_name("equivalent.json")
COPIED = ("src", "tests", "docs", "examples", "benchmarks", ".ci", "README.md", "pyproject.toml", "Makefile")
COPIED += ("constraints.txt", "CONTRIBUTING.md", "CHANGELOG.md", ".gitignore", "mkdocs.yml")
HANGS = 60
"""Seconds of processor time that one test may take; the longest takes a quarter of it."""
STILL = 600
"""Seconds after which a test that takes no processor time hangs, too."""
MEMORY = 12 * 2**30
VERDICTS = ("killed", "timed out", "survived", "equivalent")
BROKE, ELSEWHERE = 70, 71
"""Exit codes of a fork that is at fault itself: it ended early, or it tested other sources than the copy."""
LOADED_ONCE = ("torch", "numpy", "pandas", "hypothesis", "pydantic", "typer", "yaml", "safetensors.torch")
"""What takes long to import: the forks find it there. Nothing of the package itself is among it."""


def main() -> int:
    """The command line. Returns 1 where less than --least of the mutants that can be killed were killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--room", help="one room of src/contextlab only; top: the files beside the rooms")
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    parser.add_argument("--resume", action="store_true", help="leave out the mutants that --out has")
    parser.add_argument("--retry", action="store_true", help="leave out those that --out has as killed")
    parser.add_argument("--report", action="store_true", help="run nothing, print the table of --out")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--stage", type=float, default=120, help="seconds of processor time for a stage of tests")
    parser.add_argument("--least", type=float, default=0.92)
    options = parser.parse_args()
    if options.out.exists() and not (options.resume or options.retry or options.report):
        parser.error(f"{options.out} exists; go on with it by --resume, or give another --out")
    if options.report:
        return report(read(options.out), options.least)
    known = {Mutant(**each["mutant"]).key: each for each in read(options.out)} if options.out.exists() else {}
    wanted = sample(ROOT, options.count, options.seed, options.room)
    left = [m for m in wanted if m.key not in known or (options.retry and known[m.key]["verdict"] == "survived")]
    print(f"{len(wanted)} mutants, {len(left)} to run", flush=True)
    for name in LOADED_ONCE:
        importlib.import_module(name)
    fork = multiprocessing.get_context("fork")
    turn = fork.Value("i", 0)
    workers = [fork.Process(target=work, args=(left, turn, options.out, options.stage)) for _ in range(options.jobs)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    if any(each.exitcode for each in workers):
        print("a worker failed; --resume goes on")
        return 2
    keys = {mutant.key for mutant in wanted}
    return report([each for each in read(options.out) if Mutant(**each["mutant"]).key in keys], options.least)


def read(out: Path) -> list[dict[str, Any]]:
    """The records of a file, the last of each mutant."""
    found = {}
    for line in out.read_text().splitlines():
        record = json.loads(line)
        found[Mutant(**record["mutant"]).key] = record
    return list(found.values())


def work(mutants: list[Mutant], turn: Any, out: Path, seconds: float) -> None:
    """Take the next mutant until none is left."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Copy(Path(folder) / "tree")
        while True:
            with turn.get_lock():
                number, turn.value = turn.value, turn.value + 1
            if number >= len(mutants):
                return
            record = copy.judge(mutants[number], seconds)
            with out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            said = f"{record['verdict']:9} {record['seconds']:5.0f} s  {described(record)}"
            print(f"{number + 1:4} {said}  {record['test']}", flush=True)


class Copy:
    """A copy of the tree, one line of which is changed at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "runs"))
            elif (ROOT / name).exists():
                shutil.copy2(ROOT / name, root / name)
        self.clock = 10**9
        self.passes: dict[str, bool] = {}

    def judge(self, mutant: Mutant, seconds: float) -> dict[str, Any]:
        """Put a mutant to its tests. Returns its record."""
        began, before = time.monotonic(), processor_time()
        path = self.root / mutant.file
        text = path.read_text()
        done: list[dict[str, Any]] = []
        verdict, test = "survived", ""
        for arguments in stages(self.root, mutant.file):
            while verdict == "survived":
                self.write(path, mutant.apply(text))
                ended, test = self.tests(arguments, seconds)
                self.write(path, text)
                if ended in ("failed", "hangs"):
                    if not self.passes_without(test, arguments):
                        arguments = [*arguments, f"--deselect={test}"] if "::" in test else []
                        if arguments:
                            continue
                        ended, test = "broken without the mutant", ""
                    else:
                        verdict = "killed" if ended == "failed" else "timed out"
                break
            done.append({"tests": arguments, "ended": ended})
            if verdict != "survived":
                break
        spent = {"seconds": round(processor_time() - before, 1), "wall_seconds": round(time.monotonic() - began, 1)}
        test = test if verdict != "survived" else ""
        return {"mutant": asdict(mutant), "verdict": verdict, "test": test, **spent, "stages": done}

    def write(self, path: Path, text: str) -> None:
        """Each version has a second of its own, or Python would take the compiled file of the one before."""
        path.write_text(text)
        self.clock += 1
        os.utime(path, (self.clock, self.clock))

    def passes_without(self, test: str, arguments: list[str]) -> bool:
        """Whether what killed a mutant passes on the sources as they are; a failure to collect tests likewise."""
        key = test if "::" in test else " ".join(arguments)
        if key not in self.passes:
            chosen = [test] if "::" in test else [*arguments, "--collect-only", "-qq"]
            self.passes[key] = self.tests(chosen, 10 * HANGS)[0] in ("passed", "none")
        return self.passes[key]

    def tests(self, arguments: list[str], seconds: float) -> tuple[str, str]:
        """Run tests in a fork. Returns how they ended (passed, failed, hangs, cut, none), and at which test."""
        log = self.root.with_name("log")
        log.write_text("")
        pid = os.fork()
        if pid == 0:
            _child(self.root, arguments, log)
        process = psutil.Process(pid)
        size, since, moved, used = 0, 0.0, time.monotonic(), 0.0
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            time.sleep(0.05)
            used = _used(process)
            if (now := log.stat().st_size) != size:
                size, since, moved = now, used, time.monotonic()
            if used - since > HANGS or time.monotonic() - moved > STILL or used > seconds:
                _end(process)
                os.waitpid(pid, 0)
                hangs = used - since > HANGS or time.monotonic() - moved > STILL
                return ("hangs" if hangs else "cut"), _last(log, "begin")
        code = os.waitstatus_to_exitcode(status)
        if code in (BROKE, ELSEWHERE):
            raise RuntimeError(f"pytest did not run on the copy: {log.with_name('output').read_text()[-2000:]}")
        if code in (0, 5):
            return ("passed" if code == 0 else "none"), ""
        return "failed", _last(log, "failed") or _last(log, "begin") or "collection"


class Watch:
    """A plugin of pytest: the log tells which test runs, and which failed."""

    def __init__(self, log: Path) -> None:
        self.log = log.open("a", buffering=1)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.log.write(f"begin\t{nodeid}\n")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.log.write(f"failed\t{report.nodeid}\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.log.write(f"{'failed' if report.failed else 'collected'}\t{report.nodeid}\n")


def _child(root: Path, arguments: list[str], log: Path) -> None:
    """The fork: forget where this harness stands, and run pytest on the copy."""
    code = BROKE
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        quiet = log.with_name("output").open("w")
        os.dup2(quiet.fileno(), 1)
        os.dup2(quiet.fileno(), 2)
        os.chdir(root)
        for name in [each for each in sys.modules if each.split(".")[0] in ("tests", "contextlab")]:
            del sys.modules[name]
        ours = {str(ROOT), str(ROOT / "src"), ""}
        sys.path[:] = [str(root / "src"), str(root), *(each for each in sys.path if each not in ours)]
        os.environ.update(PYTHONPATH=str(root / "src"), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        code = int(pytest.main(["-x", "-q", "--tb=short", "-p", "no:cacheprovider", *arguments], plugins=[Watch(log)]))
        found = sys.modules.get("contextlab")
        if found is not None and not str(found.__file__).startswith(str(root)):
            code = ELSEWHERE
    finally:
        sys.stdout.flush()
        os._exit(code)


def _last(log: Path, word: str) -> str:
    found = [line.split("\t", 1)[1] for line in log.read_text().splitlines() if line.startswith(word + "\t")]
    return found[-1] if found else ""


def _used(process: psutil.Process) -> float:
    """Seconds of processor time of a process and all below it."""
    total = 0.0
    try:
        for each in (process, *process.children(recursive=True)):
            total += sum(each.cpu_times())
    except psutil.NoSuchProcess:
        pass
    return total


def processor_time() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _end(process: psutil.Process) -> None:
    for each in (*process.children(recursive=True), process):
        try:
            each.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue


def described(record: dict[str, Any]) -> str:
    m = Mutant(**record["mutant"])
    return f"{m.file}:{m.line}: {m.before.strip()}  ->  {m.after.strip()}"


def report(records: list[dict[str, Any]], least: float) -> int:
    """Print the table and the survivors. Returns 1 where too few were killed."""
    reasons = {(e["file"], e["before"], e["after"]): e["reason"] for e in json.loads(EQUIVALENT.read_text())}
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    survivors = []
    for record in records:
        mutant = Mutant(**record["mutant"])
        verdict = record["verdict"]
        if verdict == "survived":
            verdict = "equivalent" if mutant.key in reasons else "survived"
            survivors.append(f"{verdict}: {described(record)}  {reasons.get(mutant.key, '')}")
        for room in (mutant.room, "all"):
            counts[room][verdict] += 1
    print(f"\n{'room':12}", *(f"{name:>10}" for name in VERDICTS), f"{'share':>8}")
    share = 1.0
    for room in sorted(counts, key=lambda name: (name == "all", name)):
        row = counts[room]
        noticed = row["killed"] + row["timed out"]
        share = noticed / max(noticed + row["survived"], 1)
        columns = (f"{row[name]:10}" for name in VERDICTS)
        print(f"{room:12}", *columns, f"{share:8.1%}")
    print(*sorted(survivors), sep="\n")
    if records:
        each = [sum(record[name] for record in records) / len(records) for name in ("seconds", "wall_seconds")]
        print(f"a mutant takes {each[0]:.0f} s of one core, {each[1]:.0f} s of the clock")
    return 0 if share >= least else 1


if __name__ == "__main__":
    sys.exit(main())
