"""Which tests a mutant is put to by a map of `executed.py`: those that execute its line, nearest first, then cheapest.

A line outside the functions runs when it is imported, which tells nothing of who uses it. A default belongs to the
tests X
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.soak.chosen import DEFAULTS, Stage, mirrors, stages
from tests.soak.executed import Map

FIRST = 12.0
"""Seconds of tests that are run before all others are so much as collected: most mutants die of them."""
NEAR_CASES = 3
"""So many cases of each test that mirrors the file come before the first case of a test that does not."""
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass
class Plan:
    """executing: how many tests run the line, -1 where the map does not tell."""

    executing: int
    stages: list[Stage] = field(default_factory=list)


def plan(root: Path, found: Map, file: str, line: int, seconds: float) -> Plan:
    """The tests of a line, in the order in which they are run, as many as fit into `seconds` by the map's measure.

    Where no test executes the line, or the map is of another text, tests are chosen by names: those that start
    processes, which may have run untraced, or all.
    """
    if not found.knows(root, file):
        return Plan(-1, [Stage(each) for each in stages(root, file)])
    executing, also = tests_of(root, found, file, line)
    near = set(mirrors(root, file))
    where = place(ast.parse((root / file).read_text()), line)
    order = [*ordered(found, executing, near, where.words), *ordered(found, also & ~executing, near, where.words)]
    new = sorted(near)  # what the map does not know of these files runs, too
    if not where.inside:
        order = [*(name for name in found.tests if name.startswith(DEFAULTS)), *order]
        new += [DEFAULTS] if (root / DEFAULTS).exists() else []
    result = Plan(executing.bit_count())
    known = frozenset(found.tests)
    for chosen in _within(found, order, seconds):
        files = dict.fromkeys([*(name.split("::")[0] for name in chosen), *(() if result.stages else new)])
        result.stages.append(Stage(list(files), chosen, known))
    if executing:
        return result
    starting = [t for each in stages(root, file) for t in each if t.endswith(".py") and _starts_processes(root, t)]
    left = [name for name in found.tests if name.split("::")[0] in set(starting) and name not in set(order)]
    if left:
        result.stages.append(Stage(list(dict.fromkeys(starting)), sorted(left, key=found.tests.__getitem__), known))
    return result


def tests_of(root: Path, found: Map, file: str, line: int) -> tuple[int, int]:
    """Bits of the tests that execute a line, and of others that its change may reach.

    The others are tests beside them that may use what those left in a cache; where the line is outside of
    functions, all tests of the file.
    """
    where = place(ast.parse((root / file).read_text()), line)
    own = found.lines.get(file, {})
    inside = _functions(root, file)[1]
    everywhere = _union(bits for n, bits in own.items() if n in inside) or _union(own.values())
    if where.inside:
        bits = _union(own.get(n, 0) for n in where.lines)
        if not bits and set(found.imported.get(file, ())) & set(where.lines):
            return everywhere, 0
        cached = {name.split("::")[0] for name in found.of(bits)}
        if not _caches(root, file):
            cached = {test for test in cached if _caches(root, test)}
        return bits, _union(1 << n for n, name in enumerate(found.tests) if name.split("::")[0] in cached)
    bits = _union(own.get(n, 0) for n in where.body)
    if not bits and where.names:
        bits = _naming(root, found, file, where.names)
        bits = bits or _union(_naming(root, found, each, where.names) for each in found.lines if each.endswith(".py"))
    return bits or everywhere, everywhere


@dataclass
class Place:
    """Where a line stands.

    inside: of a function; lines: of its statement; body: a function's, if the line is in its head; names: what the
    statement assigns; words: names of components, outside of functions the first arguments of calls around the line.
    """

    inside: bool
    lines: range
    body: range = range(0)
    names: frozenset[str] = frozenset()
    words: frozenset[str] = frozenset()


def place(tree: ast.Module, line: int) -> Place:
    around = [each for each in ast.walk(tree) if isinstance(each, ast.stmt) and line in _lines(each)]
    if not around:
        return Place(False, range(line, line + 1))
    own = min(around, key=lambda each: len(_lines(each)))
    head = _lines(own)
    if body := getattr(own, "body", None):
        head = range(head.start, body[0].lineno)
    if line not in head:  # that of `else`, `except` or `finally`
        head = range(line, line + 1)
    if isinstance(own, FUNCTIONS):
        return Place(False, head, range(own.body[0].lineno, _lines(own).stop))
    targets = [getattr(own, "target", None), *getattr(own, "targets", ())]
    words = (word for target in targets if target is not None for word in ast.walk(target))
    names = frozenset(word.id for word in words if isinstance(word, ast.Name))
    if any(isinstance(each, FUNCTIONS) for each in around):
        return Place(True, head)
    calls = (each for each in ast.walk(own) if isinstance(each, ast.Call) and line in _lines(each) and each.args)
    firsts = (each.args[0].value for each in calls if isinstance(each.args[0], ast.Constant))
    words = frozenset(each for each in firsts if isinstance(each, str) and each.isidentifier())
    return Place(False, head, names=names, words=words)


def _lines(node: ast.stmt | ast.expr) -> range:
    first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
    return range(first, (node.end_lineno or first) + 1)


def ordered(found: Map, bits: int, near: set[str], words: Iterable[str] = ()) -> list[str]:
    """In the order in which they are run: tests whose names have one of the words; a few cases of each test that
    mirrors the file; the cheapest case of the cheapest test of each file, then of its second, and so on; further cases.
    """
    cases: dict[str, list[str]] = defaultdict(list)
    for name in sorted(found.of(bits), key=found.tests.__getitem__):
        cases[name.split("[")[0]].append(name)
    position: dict[str, int] = {}
    of_file: dict[str, int] = defaultdict(int)
    for function in cases:  # the cheapest first
        position[function] = of_file[function.split("::")[0]]
        of_file[function.split("::")[0]] += 1
    word = re.compile(r"(?<![a-z0-9])(" + "|".join(map(re.escape, words)) + r")(?![a-z0-9])") if words else None
    ranks: dict[str, tuple[int, int, float]] = {}
    for function, names in cases.items():
        for case, name in enumerate(names):
            is_near = function.split("::")[0] in near
            first = (0, case) if is_near and case < NEAR_CASES else (1 + case, position[function])
            if word is not None and word.search(name):
                first = (-1, case)
            ranks[name] = (*first, found.tests[name])
    return sorted(ranks, key=ranks.__getitem__)


def _within(found: Map, order: list[str], seconds: float) -> list[list[str]]:
    """What fits into the seconds, collecting included; the first few seconds of it apart."""
    parts: list[list[str]] = [[], []]
    spent = 0.0
    collected: set[str] = set()
    for name in order:
        file = name.split("::")[0]
        cost = found.tests[name] + (0.0 if file in collected else found.files.get(file, 0.0))
        if spent + cost <= seconds:
            collected.add(file)
            spent += cost
            parts[spent > FIRST].append(name)
    return [part for part in parts if part]


def _union(bits: Iterable[int]) -> int:
    result = 0
    for each in bits:
        result |= each
    return result


def _naming(root: Path, found: Map, file: str, names: frozenset[str]) -> int:
    """Bits of the tests that execute a line of a file's functions in which one of the names stands."""
    word = re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")\b")
    lines, inside = _functions(root, file)
    own = found.lines.get(file, {})
    return _union(bits for n, bits in own.items() if n in inside and n <= len(lines) and word.search(lines[n - 1]))


@cache
def _functions(root: Path, file: str) -> tuple[list[str], frozenset[int]]:
    """A file's lines, and the numbers of those in the bodies of functions."""
    text = (root / file).read_text()
    bodies = (node for node in ast.walk(ast.parse(text)) if isinstance(node, FUNCTIONS))
    inside = {n for node in bodies for n in range(node.body[0].lineno, (node.end_lineno or 0) + 1)}
    return text.splitlines(), frozenset(inside)


@cache
def _caches(root: Path, file: str) -> bool:
    """Whether a file keeps what its functions returned: then the first test alone executes them."""
    return re.search(r"^ *@(functools\.)?(lru_)?cache", (root / file).read_text(), re.M) is not None


@cache
def _starts_processes(root: Path, test: str) -> bool:
    return re.search(r"subprocess|multiprocessing|Popen", (root / test).read_text()) is not None
