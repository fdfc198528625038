"""Which tests a mutant of a file is put to: those that mirror it, its laws, its room, all that name what it defines."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LIKENESSES = 12
"""A file that more components import than this is put to all laws, not to those of its components."""


DEFAULTS = "tests/test_defaults.py"
"""These hold defaults of everything, whatever file they stand in."""


@dataclass
class Stage:
    """One run of pytest. arguments: its own; order: names of the tests to run, in this order, all where it is None.

    Tests of these files that are not among the `known` ones are new, and run first.
    """

    arguments: list[str]
    order: list[str] | None = None
    known: frozenset[str] = frozenset()


def stages(root: Path, file: str) -> list[list[str]]:
    """pytest's arguments, a list a stage, nearest first; no test file stands in two stages, but for laws.

    file: relative to `root`, below src/contextlab.
    """
    tests = _tests(root)
    inner = Path(file).relative_to("src/contextlab")
    module = ".".join(("contextlab", *inner.with_suffix("").parts)).removesuffix(".__init__")
    folder = Path("tests") / inner.parent
    importing = [t for t in tests if module in _imports(root, t)]
    importing.sort(key=lambda t: not t.startswith(str(folder)))
    near = [t for t in tests if Path(t).parent == folder and folder != Path("tests")]
    room = [t for t in tests if len(inner.parts) > 1 and t.startswith(f"tests/{inner.parts[0]}/")]
    naming = [t for t in tests if _defines(root, file) & _used(root, t) or _registered(root, file) & _quoted(root, t)]
    mirror = mirrors(root, file) or [t for t in near if t in naming]
    laws = [t for t in tests if Path(t).name == "test_laws.py"]
    names = _components(root, file, module)
    of_components = [t for t in laws if names and len(names) <= LIKENESSES]
    plan: list[list[str]] = []
    seen = set(laws)
    for files in ([*mirror, *importing[:4]], near, [*importing, *naming], room):
        new = [t for t in dict.fromkeys(files) if t not in seen]
        seen.update(new)
        if new:
            plan.append(new)
    if of_components:
        plan.insert(min(1, len(plan)), [*of_components, "-k", " or ".join(sorted(names))])
    elif names or inner.parts[0] in ("mixers", "ops", "tasks", "learners", "testing") or len(inner.parts) == 1:
        own = [t for t in laws if t.startswith(f"tests/{inner.parts[0]}/")]
        plan.append(own or laws)
    if DEFAULTS in tests and DEFAULTS not in seen:
        plan.append([DEFAULTS])
    return plan


def mirrors(root: Path, file: str) -> list[str]:
    """The test files that are named after a source file."""
    inner = Path(file).relative_to("src/contextlab")
    own = (t for t in _tests(root) if Path(t).parent == Path("tests") / inner.parent)
    return [t for t in own if _mirrors(Path(t).stem, inner.stem)]


def _mirrors(test: str, stem: str) -> bool:
    """Whether a test file is a source file's: test_gla.py of gla.py, test_ruler.py also of ruler_tracing.py."""
    return stem in test or stem.startswith(f"{test.removeprefix('test_')}_")


def _components(root: Path, file: str, module: str) -> set[str]:
    """Names registered in a file; where there is none, in the files that import it."""
    own = _registered(root, file)
    if own:
        return own
    sources = [str(p.relative_to(root)) for p in sorted((root / "src" / "contextlab").rglob("*.py"))]
    return {name for each in sources if module in _imports(root, each) for name in _registered(root, each)}


@cache
def _tests(root: Path) -> list[str]:
    found = (str(p.relative_to(root)) for p in sorted((root / "tests").rglob("test_*.py")))
    return [name for name in found if not name.startswith("tests/soak/")]


@cache
def _text(root: Path, file: str) -> str:
    return (root / file).read_text()


@cache
def _imports(root: Path, file: str) -> frozenset[str]:
    """The modules of the package that a file imports, as dotted names."""
    found = set()
    for names, what in re.findall(r"^\s*from (contextlab[\w.]*) import (\([^)]*\)|.*)$", _text(root, file), re.M):
        found |= {names, *(f"{names}.{each}" for each in re.findall(r"\w+", what))}
    return frozenset(found | set(re.findall(r"^\s*import (contextlab[\w.]*)", _text(root, file), re.M)))


@cache
def _used(root: Path, file: str) -> frozenset[str]:
    """What a file imports from the package, and the attributes that it reads of what it imports."""
    tree = ast.parse(_text(root, file))
    found, modules = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "contextlab":
            found |= {each.name for each in node.names}
            modules |= {each.asname or each.name for each in node.names}
        elif isinstance(node, ast.Import):
            modules |= {each.asname or "contextlab" for each in node.names if each.name.startswith("contextlab")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[0] in modules:
            found.add(node.attr)
    return frozenset(found)


@cache
def _quoted(root: Path, file: str) -> frozenset[str]:
    """The words with which a file's quoted texts begin: "h2o", "h2o:heavy=0.5"."""
    return frozenset(re.findall(r"[\"'](\w+)\b", _text(root, file)))


@cache
def _registered(root: Path, file: str) -> frozenset[str]:
    return frozenset(re.findall(r"@?register\(\s*\"\w+\",\s*\"(\w+)\"", _text(root, file)))


@cache
def _defines(root: Path, file: str) -> frozenset[str]:
    """Public functions and classes of a file."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = {node.name for node in ast.parse(_text(root, file)).body if isinstance(node, kinds)}
    return frozenset(name for name in names if not name.startswith("_"))
