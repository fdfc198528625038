"""A map of `executed.py` brought to the sources that there are now: lines that stayed keep their tests.

    python -m tests.soak.executed --out map.json --since COMMIT    # the commit at which the map was made; runs no test

A new or changed line gets the tests of its function's other lines; where these are new, too, those of the whole file.
Of files that were not traced the map still knows nothing. Tests whose file is gone leave the map.
"""

from __future__ import annotations

import ast
import difflib
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.soak.executed import Map, digest

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def carry(found: Map, root: Path, commit: str) -> tuple[int, int]:
    """Bring a map to the sources below `root`. Returns how many files it followed, and of how many it knows nothing."""
    found.forget({test for test in found.files if not (root / test).exists()})
    followed = unknown = 0
    for file in sorted(found.texts):
        if not (root / file).exists() or not file.endswith(".py"):
            found.lines.pop(file, None)
        elif not found.knows(root, file):
            before = subprocess.run(["git", "show", f"{commit}:{file}"], cwd=root, capture_output=True, check=False)
            if found.texts[file] != digest(before.stdout):
                unknown += 1
                continue
            follow(found, file, before.stdout.decode(), (root / file).read_text())
            followed += 1
    return followed, unknown


def follow(found: Map, file: str, before: str, now: str) -> None:
    """Give the lines of one file's new text the tests of its old one."""
    old, imported = found.lines.get(file, {}), set(found.imported.get(file, ()))
    same = dict(_stayed(before.splitlines(), now.splitlines()))
    own = {line: old[was] for line, was in same.items() if was in old}
    everything = _union(old.values())
    innermost: dict[int, range] = {}
    nodes = [node for node in ast.walk(ast.parse(now)) if isinstance(node, FUNCTIONS)]
    for node in sorted(nodes, key=lambda each: each.lineno):  # an inner function comes after the outer one
        body = range(node.body[0].lineno, (node.end_lineno or 0) + 1)
        innermost |= dict.fromkeys(body, body)
    guessed = {}
    for line in range(1, len(now.splitlines()) + 1):
        if line not in same and line in innermost:
            guessed[line] = _union(own.get(each, 0) for each in innermost[line]) or everything
    found.lines[file] = own | {line: bits for line, bits in guessed.items() if bits}
    found.imported[file] = [line for line, was in same.items() if was in imported]
    found.texts[file] = digest(now.encode())


def _stayed(before: list[str], now: list[str]) -> Iterator[tuple[int, int]]:
    """The lines, counted from 1, of the new text that stand in the old one, and where."""
    for block in difflib.SequenceMatcher(None, before, now, autojunk=False).get_matching_blocks():
        for k in range(block.size):
            yield block.b + k + 1, block.a + k + 1


def _union(bits: Iterable[int]) -> int:
    result = 0
    for each in bits:
        result |= each
    return result
