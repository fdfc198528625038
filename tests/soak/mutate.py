"""One changed line: which mutants a file of Python has, found by `ast`, and a sample of them that a seed fixes."""

from __future__ import annotations

import ast
import itertools
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OPERATORS: dict[type[ast.AST], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.And: ("and", "or"),
    ast.Or: ("or", "and"),
}
SWAPPED_NAMES = {
    one: other
    for pair in (("min", "max"), ("minimum", "maximum"), ("amin", "amax"), ("argmin", "argmax"), ("cummin", "cummax"))
    for one, other in (pair, pair[::-1])
}
MESSAGES = {"InputError", "ResourceError", "ValueError", "print", "echo", "warn", "debug", "info", "warning", "error"}
"""Calls whose arguments are told to a person."""
NOT_HERE = ("cuda", "fla", "triton", "TYPE_CHECKING")
"""A condition that names one of these guards lines that no CPU runs."""


@dataclass(frozen=True)
class Mutant:
    """One line of one file, changed. file: relative to the repository; before and after: the whole line."""

    file: str
    line: int
    kind: str
    before: str
    after: str

    @property
    def room(self) -> str:
        return room_of(self.file)

    @property
    def key(self) -> tuple[str, str, str]:
        """What stays the same when lines above it are added: file, line and change."""
        return self.file, self.before.strip(), self.after.strip()

    def apply(self, text: str) -> str:
        """The file's text with the line changed. Raises ValueError where the line is another one."""
        lines = text.splitlines(keepends=True)
        if lines[self.line - 1].rstrip("\n") != self.before:
            raise ValueError(f"{self.file}:{self.line} is not {self.before!r}")
        lines[self.line - 1] = self.after + "\n"
        return "".join(lines)

    def is_real(self, text: str) -> bool:
        """Whether the changed file is Python, and another program."""
        try:
            return ast.dump(ast.parse(self.apply(text))) != ast.dump(ast.parse(text))
        except SyntaxError:
            return False


def room_of(file: str) -> str:
    parts = Path(file).parts  # src/contextlab/ROOM/...
    return parts[2] if len(parts) > 3 else "top"


def sample(root: Path, count: int, seed: int, room: str | None = None) -> list[Mutant]:
    """`count` mutants, a room after the other in turn, so that each beginning of the list is a fair sample, too.

    Within a room each line that has mutants is as likely as another, and of a line one mutant is taken.
    """
    rooms: dict[str, list[str]] = defaultdict(list)
    texts = {}
    for path in sorted((root / "src" / "contextlab").rglob("*.py")):
        file = str(path.relative_to(root))
        texts[file] = path.read_text()
        rooms[room_of(file)].append(file)
    if room is not None and room not in rooms:
        raise SystemExit(f"--room: expected one of {', '.join(sorted(rooms))}, got {room!r}")
    turns = [
        _of_room({file: texts[file] for file in files}, random.Random(f"{seed} {name}"))
        for name, files in sorted(rooms.items())
        if room in (None, name)
    ]
    found: list[Mutant] = []
    while turns and len(found) < count:
        turn = turns.pop(0)
        if (mutant := next(turn, None)) is not None:
            found.append(mutant)
            turns.append(turn)
    return found


def _of_room(texts: dict[str, str], chance: random.Random) -> Iterator[Mutant]:
    """A room's mutants in random order; only the files that a line is drawn from are read as Python."""
    lines = [(file, number) for file, text in texts.items() for number in range(1, text.count("\n") + 1)]
    chance.shuffle(lines)
    read: dict[str, dict[int, list[Mutant]]] = {}
    for file, number in lines:
        if file not in read:
            read[file] = mutants(texts[file], file)
        line = read[file].get(number, [])
        real = (each for each in chance.sample(line, len(line)) if each.is_real(texts[file]))
        yield from itertools.islice(real, 1)


def mutants(text: str, file: str) -> dict[int, list[Mutant]]:
    """All mutants of a file, by line."""
    lines = [line.encode() for line in text.splitlines()]
    found: dict[int, list[Mutant]] = defaultdict(list)
    for number, begin, end, new, kind in sorted(set(_Edits(lines).of(ast.parse(text)))):
        line = lines[number - 1]
        after = line[:begin] + new.encode() + line[end:]
        found[number].append(Mutant(file, number, kind, line.decode(), after.decode()))
    return found


Edit = tuple[int, int, int, str, str]
"""Line, first and last byte in it, what stands there instead, and the kind of mutant."""


class _Edits:
    def __init__(self, lines: list[bytes]) -> None:
        self.lines = lines

    def of(self, tree: ast.AST) -> Iterator[Edit]:
        """The edits of a tree, but for what is told to a person, and for types."""
        left = [tree]
        while left:
            node = left.pop()
            if _skipped(node):
                continue
            edits = getattr(self, type(node).__name__, None)
            if edits is not None:
                yield from edits(node)
            left += _children(node)

    def source(self, node: ast.expr | ast.stmt) -> str | None:
        if node.lineno != node.end_lineno:
            return None
        return self.lines[node.lineno - 1][node.col_offset : node.end_col_offset].decode()

    def replace(self, node: ast.expr | ast.stmt, new: str, kind: str) -> Iterator[Edit]:
        if node.lineno == node.end_lineno and node.end_col_offset is not None:
            yield node.lineno, node.col_offset, node.end_col_offset, new, kind

    def operator(self, left: ast.expr, right: ast.expr, operator: ast.AST, kind: str) -> Iterator[Edit]:
        """The operator stands between the two, where both are on one line; brackets and spaces are all else there."""
        if type(operator) not in OPERATORS or left.end_lineno != right.lineno:
            return
        old, new = OPERATORS[type(operator)]
        assert left.end_col_offset is not None
        at = self.lines[right.lineno - 1].find(old.encode(), left.end_col_offset, right.col_offset)
        if at >= 0:
            yield right.lineno, at, at + len(old), new, kind

    def Compare(self, node: ast.Compare) -> Iterator[Edit]:
        sides = [node.left, *node.comparators]
        for left, right, operator in zip(sides, sides[1:], node.ops, strict=False):
            yield from self.operator(left, right, operator, "comparison")

    def BinOp(self, node: ast.BinOp) -> Iterator[Edit]:
        texts = (ast.JoinedStr, ast.Constant)
        of_text = any(
            isinstance(side, texts) and isinstance(getattr(side, "value", ""), str | None)
            for side in (node.left, node.right)
        )
        if not of_text:
            yield from self.operator(node.left, node.right, node.op, "arithmetic")

    def BoolOp(self, node: ast.BoolOp) -> Iterator[Edit]:
        for left, right in zip(node.values, node.values[1:], strict=False):
            yield from self.operator(left, right, node.op, "and, or")

    def Constant(self, node: ast.Constant, kind: str = "constant") -> Iterator[Edit]:
        if isinstance(node.value, bool):
            yield from self.replace(node, str(not node.value), kind)
        elif isinstance(node.value, int):
            yield from self.replace(node, str(node.value + 1), kind)
        elif isinstance(node.value, float):
            yield from self.replace(node, repr(node.value * 1.5 if node.value else 1.0), kind)

    def negated(self, test: ast.expr) -> Iterator[Edit]:
        if (text := self.source(test)) is not None:
            yield from self.replace(test, f"not ({text})", "negated condition")

    def If(self, node: ast.If | ast.While) -> Iterator[Edit]:
        yield from self.negated(node.test)

    While = If

    def comprehension(self, node: ast.comprehension) -> Iterator[Edit]:
        for test in node.ifs:
            yield from self.negated(test)

    def IfExp(self, node: ast.IfExp) -> Iterator[Edit]:
        body, test, other = map(self.source, (node.body, node.test, node.orelse))
        if None not in (body, test, other):
            yield from self.replace(node, f"({other}) if {test} else ({body})", "swapped branches")

    def Assign(self, node: ast.Assign) -> Iterator[Edit]:
        if any(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            yield from self.replace(node, "pass", "dropped statement")

    def AugAssign(self, node: ast.AugAssign) -> Iterator[Edit]:
        yield from self.replace(node, "pass", "dropped statement")

    def Expr(self, node: ast.Expr) -> Iterator[Edit]:
        if isinstance(node.value, ast.Call):
            yield from self.replace(node, "pass", "dropped statement")

    def FunctionDef(self, node: ast.FunctionDef) -> Iterator[Edit]:
        names = [each.arg for each in (*node.args.posonlyargs, *node.args.args) if each.arg not in ("self", "cls")]
        for each in ast.walk(node):
            if isinstance(each, ast.Return) and isinstance(each.value, ast.Name):
                for name in names:
                    if name != each.value.id:
                        yield from self.replace(each.value, name, "returned other argument")
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if isinstance(default, ast.Constant):
                yield from self.Constant(default, "default")

    def ClassDef(self, node: ast.ClassDef) -> Iterator[Edit]:
        for each in node.body:
            if isinstance(each, ast.AnnAssign) and isinstance(each.value, ast.Constant):
                yield from self.Constant(each.value, "default")

    def Name(self, node: ast.Name) -> Iterator[Edit]:
        if node.id in SWAPPED_NAMES:
            yield from self.replace(node, SWAPPED_NAMES[node.id], "swapped min, max")

    def Attribute(self, node: ast.Attribute) -> Iterator[Edit]:
        if node.attr in SWAPPED_NAMES and node.end_lineno is not None and node.end_col_offset is not None:
            end = node.end_col_offset
            yield node.end_lineno, end - len(node.attr), end, SWAPPED_NAMES[node.attr], "swapped min, max"


def _skipped(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return True
    if isinstance(node, ast.Call):
        return _name(node.func) in MESSAGES
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant) or (isinstance(node.value, ast.Call) and _skipped(node.value))
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)
    return False


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _children(node: ast.AST) -> list[ast.AST]:
    """All below a node but types, decorators (what is declared) and what only a GPU runs."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        defaults = (each for each in (*node.args.defaults, *node.args.kw_defaults) if each is not None)
        return [*(each for each in defaults if not isinstance(each, ast.Constant)), *node.body]
    if isinstance(node, ast.ClassDef):
        return list(node.body)
    if isinstance(node, ast.AnnAssign):
        return [node.value] if node.value is not None else []
    if isinstance(node, ast.If) and any(word in ast.unparse(node.test) for word in NOT_HERE):
        return list(node.orelse)
    if isinstance(node, ast.Call) and _name(node.func) in ("isinstance", "cast", "TypeVar"):
        return list(node.args[:1])
    return list(ast.iter_child_nodes(node))
