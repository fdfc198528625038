"""Which tests execute which line of the sources: the map by which `mutants.py --map` chooses tests.

    pip install coverage
    python -m tests.soak.executed --out map.json                   # every test, a folder of tests after the other
    python -m tests.soak.executed --out map.json tests/models      # these alone; what the map has of others stays
    python -m tests.soak.executed --out map.json --since COMMIT    # no test runs: the map follows the sources

Tests run as ever, under coverage.py, in one process a folder. What a test starts is traced, too (`sitecustomize` begins
it), unless it is killed or runs with a PYTHONPATH of its own. What a fixture of a whole file runs counts for all tests
that use it. Seconds are of a processor, the tracing included; those of a file are what collecting it takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = Path("src/contextlab")
CONTEXT = "SOAK_CONTEXT"
SHARED = "fixture "
IN_CHILDREN = """import os
if os.environ.get("SOAK_CONTEXT"):
    import atexit, multiprocessing.util, coverage
    traced = coverage.Coverage(
        os.environ["SOAK_DATA"], data_suffix=True, config_file=False, source=[os.environ["SOAK_SOURCES"]],
        context=os.environ["SOAK_CONTEXT"], messages=False,
    )
    traced.start()
    def save():
        traced.stop()
        traced.save()
    atexit.register(save)
    multiprocessing.util.Finalize(None, save, exitpriority=1000)  # workers leave without atexit
"""


@dataclass
class Map:
    """tests: name -> seconds; files: of tests, name -> seconds; lines: source -> line -> bits of the tests' numbers.

    `imported` has the lines that run when no test does; `texts` a digest of each source.
    """

    tests: dict[str, float] = field(default_factory=dict)
    files: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[int, int]] = field(default_factory=dict)
    imported: dict[str, list[int]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Map:
        found = cls(**json.loads(path.read_text()))
        found.lines = {file: {int(n): int(bits, 16) for n, bits in own.items()} for file, own in found.lines.items()}
        return found

    def write(self, path: Path) -> None:
        """The whole file or none of it."""
        data = dict(vars(self))
        data["lines"] = {file: {n: f"{bits:x}" for n, bits in own.items()} for file, own in self.lines.items()}
        half = path.with_suffix(".part")
        half.write_text(json.dumps(data))
        half.replace(path)

    def knows(self, root: Path, file: str) -> bool:
        """Whether a source is the one that was traced."""
        return self.texts.get(file) == digest(root / file)

    def of(self, bits: int) -> list[str]:
        """The names of the tests of some bits."""
        return [name for number, name in enumerate(self.tests) if bits >> number & 1]

    def forget(self, files: set[str]) -> None:
        """Take out what tests of these files executed; they are about to be run again."""
        kept = [name for name in self.tests if name.split("::")[0] not in files]
        old = {name: number for number, name in enumerate(self.tests)}
        gone = sum(1 << old[name] for name in old.keys() - set(kept))
        if gone:
            new = {old[name]: number for number, name in enumerate(kept)}
            for own in self.lines.values():
                for line, bits in own.items():
                    left = bits & ~gone
                    own[line] = sum(1 << new[n] for n in range(left.bit_length()) if left >> n & 1)
            self.tests = {name: self.tests[name] for name in kept}

    def add(self, found: dict[str, Any], executed: dict[str, dict[int, set[str]]], root: Path) -> None:
        """Add what `Recorder` wrote and the contexts in which each line ran."""
        self.forget(set(found["files"]))
        self.files |= found["files"]
        self.tests |= {name: own["seconds"] for name, own in found["tests"].items()}
        bit = {name: 1 << number for number, name in enumerate(self.tests)}
        users: dict[str, int] = {}
        for name, own in found["tests"].items():
            for fixture in own["shared"]:
                users[fixture] = users.get(fixture, 0) | bit[name]
        for file, lines in executed.items():
            own = self.lines.setdefault(file, {})
            imported = set(self.imported.get(file, ()))
            for line, contexts in lines.items():
                for context in contexts:
                    if context:
                        own[line] = own.get(line, 0) | (bit.get(context) or users.get(context, 0))
                    else:
                        imported.add(line)
            self.imported[file] = sorted(imported)
            self.texts[file] = digest(root / file)


def digest(text: Path | bytes) -> str:
    """Of a file, "" where there is none, or of what it holds."""
    if isinstance(text, Path):
        return digest(text.read_bytes()) if text.exists() else ""
    return sha256(text).hexdigest()[:16]


class Recorder:
    """A plugin of pytest: says to coverage.py which test runs, and takes its time."""

    def __init__(self, traced: Any) -> None:
        self.traced = traced
        self.tests: dict[str, dict[str, Any]] = {}
        self.files: dict[str, float] = {}

    @contextlib.contextmanager
    def context(self, name: str) -> Iterator[None]:
        before = os.environ.get(CONTEXT, "")
        self.traced.switch_context(name)
        os.environ[CONTEXT] = name
        try:
            yield
        finally:
            self.traced.switch_context(before)
            os.environ[CONTEXT] = before

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Any:
        began = seconds()
        try:
            return (yield)
        finally:
            if isinstance(collector, pytest.Module):
                self.files[collector.nodeid] = round(seconds() - began, 3)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        began = seconds()
        with self.context(item.nodeid):
            try:
                return (yield)
            finally:
                definitions = getattr(item, "_fixtureinfo", None)
                several = definitions.name2fixturedefs.values() if definitions is not None else ()
                shared = [_named(each[-1]) for each in several if each[-1].scope != "function"]
                self.tests[item.nodeid] = {"seconds": round(seconds() - began, 3), "shared": shared}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        if fixturedef.scope == "function":
            return (yield)
        with self.context(_named(fixturedef)):
            return (yield)


def _named(fixture: Any) -> str:
    return f"{SHARED}{fixture.baseid}::{fixture.argname}"


def seconds() -> float:
    """Of a processor, of this process and of those that it waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def record(folder: Path, tests: list[str]) -> int:
    """In a process of its own: run tests under coverage.py, and leave what was seen in a folder."""
    import coverage

    sources = str(ROOT / SOURCES)
    (folder / "sitecustomize.py").write_text(IN_CHILDREN)
    data = str(folder / "data")
    path = os.pathsep.join(filter(None, (str(folder), str(ROOT / "src"), os.environ.get("PYTHONPATH", ""))))
    os.environ.update(SOAK_DATA=data, SOAK_SOURCES=sources, PYTHONPATH=path, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    traced = coverage.Coverage(data, data_suffix="main", config_file=False, source=[sources], messages=False)
    recorder = Recorder(traced)
    traced.start()
    code = int(pytest.main(["-q", "--tb=line", "-p", "no:cacheprovider", *tests], plugins=[recorder]))
    traced.stop()
    traced.save()
    (folder / "tests.json").write_text(json.dumps({"tests": recorder.tests, "files": recorder.files}))
    return code


def executed(folder: Path) -> dict[str, dict[int, set[str]]]:
    """The contexts of each line of each source, of all processes."""
    from coverage import CoverageData

    found: dict[str, dict[int, set[str]]] = {}
    for path in sorted(folder.glob("data.*")):
        data = CoverageData(str(path))
        try:
            data.read()
        except Exception as error:  # coverage's own: a process was killed while it wrote
            print(f"{path.name} is left out: {error}")
            continue
        for name in (each for each in data.measured_files() if each.endswith(".py")):
            own = found.setdefault(str(Path(name).relative_to(ROOT)), {})
            for line, contexts in data.contexts_by_lineno(name).items():
                own.setdefault(line, set()).update(contexts)
    return found


def shards() -> list[str]:
    """The folders of tests, and the files beside them."""
    inside = sorted(p for p in (ROOT / "tests").iterdir() if p.is_dir() and p.name not in ("soak", "__pycache__"))
    return [str(p.relative_to(ROOT)) for p in (*inside, *sorted((ROOT / "tests").glob("test_*.py")))]


def follow(out: Path, commit: str) -> int:
    """See `carried.py`."""
    from tests.soak.carried import carry

    found = Map.read(out)
    followed, unknown = carry(found, ROOT, commit)
    found.write(out)
    print(f"{followed} changed files followed; of {unknown} the map knows nothing: they were traced at another commit")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="folders or files of tests; without: all, a folder after the other")
    parser.add_argument("--out", type=Path, default=Path("map.json"))
    parser.add_argument(
        "--since", metavar="COMMIT", help="bring a map of this commit to the sources that there are now"
    )
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.since:
        return follow(options.out, options.since)
    try:
        import coverage  # noqa: F401
    except ImportError:
        parser.error("this needs coverage.py: pip install coverage")
    if options.record:
        return record(options.record, options.tests)
    found = Map.read(options.out) if options.out.exists() else Map()
    for shard in [options.tests] if options.tests else [[each] for each in shards()]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="executed-") as folder:
            command = [sys.executable, "-m", "tests.soak.executed", "--record", folder, *shard]
            code = subprocess.run(command, cwd=ROOT, check=False).returncode
            if not (Path(folder) / "tests.json").exists():
                print(f"{' '.join(shard)}: pytest ended early (code {code}); the map is without these tests")
                continue
            own = json.loads((Path(folder) / "tests.json").read_text())
            found.add(own, executed(Path(folder)), ROOT)
            found.write(options.out)
        took = sum(each["seconds"] for each in own["tests"].values())
        said = f"{len(own['tests'])} tests, {took:.0f} s of a processor, {time.monotonic() - began:.0f} s of the clock"
        print(f"{' '.join(shard)}: {said}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
