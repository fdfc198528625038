"""Change one line of the sources at a time, and see whether the tests notice: a seeded sample over all rooms.

    python -m tests.soak.mutants --count 200 --seed 0 --out mutants.jsonl
    python -m tests.soak.mutants --count 200 --seed 0 --out mutants.jsonl --resume
    python -m tests.soak.mutants --count 200 --seed 0 --out mutants.jsonl --map map.json

`mutate.py` says which changes there are. With --map, `covering.py` says which tests a mutant is put to: those that
execute its line, as many as take --budget seconds of processor time. Without, `chosen.py` does: first the tests that
mirror its file, then its laws, then all that name what it defines, then its room's; a stage that is only long ends
after --stage seconds, and the next begins. The first test that fails kills it; one that hangs kills, too, and is
counted apart. So "survived" means: survived the tests that were run; `stages` of the record says which were cut short,
and `executing` how many tests run the line. Each test that kills must pass on the sources as they are, else it is left
out. All this happens in copies of the tree in a temporary folder, one for each of --jobs, in forks of this process, one
thread each.

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.soak.chosen import Stage, stages
from tests.soak.covering import Plan, plan
from tests.soak.executed import Map
from tests.soak.mutate import Mutant, sample
from tests.soak.verdicts import described, equivalent, read, report

ROOT = Path(__file__).parent.parent.parent
COPIED = ("src", "tests", "docs", "examples", "benchmarks", ".ci", "README.md", "pyproject.toml", "Makefile")
COPIED += ("constraints.txt", "CONTRIBUTING.md", "CHANGELOG.md", ".gitignore", "mkdocs.yml")
HANGS = 60
"""Seconds of processor time that one test may take; the longest takes a quarter of it."""
STILL = 600
"""Seconds after which a test that takes no processor time hangs, too."""
MEMORY = 12 * 2**30
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
    parser.add_argument(
        "--retry", action="store_true", help="leave out those that --out has as killed or that no test can kill"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, print the table of --out")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--stage", type=float, default=120, help="seconds of processor time for a stage of tests")
    parser.add_argument(
        "--map", type=Path, help="of `python -m tests.soak.executed`: choose tests by what they execute"
    )
    parser.add_argument(
        "--budget", type=float, default=90, help="with --map: processor time for a mutant's tests, seconds"
    )
    parser.add_argument("--least", type=float, default=0.92)
    options = parser.parse_args()
    if options.out.exists() and not (options.resume or options.retry or options.report):
        parser.error(f"{options.out} exists; go on with it by --resume, or give another --out")
    if options.report:
        return report(read(options.out), options.least)
    known = {Mutant(**each["mutant"]).key: each for each in read(options.out)} if options.out.exists() else {}
    wanted = sample(ROOT, options.count, options.seed, options.room)
    again = {key for key, each in known.items() if options.retry and each["verdict"] == "survived"} - set(equivalent())
    left = [m for m in wanted if m.key not in known or m.key in again]
    print(f"{len(wanted)} mutants, {len(left)} to run", flush=True)
    for name in LOADED_ONCE:
        importlib.import_module(name)
    found = Map.read(options.map) if options.map else None
    chance = Chance(found, options.budget if found else options.stage)
    fork = multiprocessing.get_context("fork")
    turn = fork.Value("i", 0)
    workers = [fork.Process(target=work, args=(left, turn, options.out, chance)) for _ in range(options.jobs)]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    if any(each.exitcode for each in workers):
        print("a worker failed; --resume goes on")
        return 2
    keys = {mutant.key for mutant in wanted}
    return report([each for each in read(options.out) if Mutant(**each["mutant"]).key in keys], options.least)


@dataclass
class Chance:
    """What a mutant is put to. seconds: of a processor, for all its tests with a map, for each stage without."""

    found: Map | None
    seconds: float

    def plan(self, root: Path, mutant: Mutant) -> Plan:
        if self.found is None:
            return Plan(-1, [Stage(each) for each in stages(root, mutant.file)])
        return plan(root, self.found, mutant.file, mutant.line, self.seconds)


def work(mutants: list[Mutant], turn: Any, out: Path, chance: Chance) -> None:
    """Take the next mutant until none is left."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Copy(Path(folder) / "tree")
        while True:
            with turn.get_lock():
                number, turn.value = turn.value, turn.value + 1
            if number >= len(mutants):
                return
            record = copy.judge(mutants[number], chance)
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

    def judge(self, mutant: Mutant, chance: Chance) -> dict[str, Any]:
        """Put a mutant to its tests. Returns its record."""
        began, before = time.monotonic(), processor_time()
        path = self.root / mutant.file
        text = path.read_text()
        done: list[dict[str, Any]] = []
        verdict, test = "survived", ""
        plan = chance.plan(self.root, mutant)
        for stage in plan.stages:
            arguments = stage.arguments
            while verdict == "survived":
                spent = processor_time() - before if chance.found is not None else 0.0
                self.write(path, mutant.apply(text))
                ended, test = self.tests(Stage(arguments, stage.order, stage.known), chance.seconds - spent)
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
            chosen = {} if stage.order is None else {"chosen": len(stage.order)}
            done.append({"tests": arguments, **chosen, "ended": ended})
            if verdict != "survived":
                break
        took = {"seconds": round(processor_time() - before, 1), "wall_seconds": round(time.monotonic() - began, 1)}
        test = test if verdict != "survived" else ""
        executing = {} if plan.executing < 0 else {"executing": plan.executing}
        return {"mutant": asdict(mutant), "verdict": verdict, "test": test, **executing, **took, "stages": done}

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
            self.passes[key] = self.tests(Stage(chosen), 10 * HANGS)[0] in ("passed", "none")
        return self.passes[key]

    def tests(self, stage: Stage, seconds: float) -> tuple[str, str]:
        """Run tests in a fork. Returns how they ended (passed, failed, hangs, cut, none), and at which test."""
        log = self.root.with_name("log")
        log.write_text("")
        pid = os.fork()
        if pid == 0:
            _child(self.root, stage, log)
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


class Order:
    """A plugin of pytest: what a stage names runs, in its order, and what the map does not know before it."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.stage.order is not None:
            rank = {name: number for number, name in enumerate(self.stage.order)}
            own = [each for each in items if each.nodeid in rank or each.nodeid not in self.stage.known]
            items[:] = sorted(own, key=lambda each: rank.get(each.nodeid, -1))


def _child(root: Path, stage: Stage, log: Path) -> None:
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
        options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider"]
        code = int(pytest.main([*options, *stage.arguments], plugins=[Watch(log), Order(stage)]))
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


if __name__ == "__main__":
    sys.exit(main())
