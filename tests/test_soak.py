"""The harness of mutants: it changes the line that it names, and chooses tests of the changed file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.soak.carried import follow
from tests.soak.chosen import stages
from tests.soak.covering import ordered, place, plan
from tests.soak.executed import Map, digest
from tests.soak.mutate import Mutant, mutants

SOURCE = '''"""A fold < 3."""


def fold(x: int, least: int = 2) -> int:
    """Not 5, and not x + 1."""
    if x < least:
        raise ValueError(f"expected {least + 1} or more")
    self.read = x
    return max(x, 1) - 1 if x else least
'''


def test_a_mutant_is_another_program_in_its_line_alone():
    found = [each for line in mutants(SOURCE, "fold.py").values() for each in line]
    changed = {(each.line, each.after.strip()) for each in found}
    assert {
        (4, "def fold(x: int, least: int = 3) -> int:"),
        (6, "if x <= least:"),
        (6, "if not (x < least):"),
        (8, "pass"),
        (9, "return min(x, 1) - 1 if x else least"),
        (9, "return max(x, 1) + 1 if x else least"),
        (9, "return (least) if x else (max(x, 1) - 1)"),
    } <= changed
    assert not {line for line, _ in changed} & {1, 2, 3, 5, 7}  # nothing that is told to a person
    for each in found:
        text = each.apply(SOURCE)
        pairs = zip(SOURCE.splitlines(), text.splitlines(), strict=True)
        assert [number for number, (one, other) in enumerate(pairs, 1) if one != other] == [each.line]
        assert each.is_real(SOURCE)
        ast.parse(text)


def test_a_mutant_of_another_line_is_refused():
    with pytest.raises(ValueError, match="fold.py:1 is not 'x = 1'"):
        Mutant("fold.py", 1, "constant", "x = 1", "x = 2").apply("y = 1\n")


def test_a_file_is_put_to_its_mirror_first_and_to_the_laws_of_its_components():
    root = Path(__file__).parent.parent
    plan = stages(root, "src/contextlab/mixers/linear/gla.py")
    assert "tests/mixers/linear/test_gla.py" in plan[0]
    law = next(stage for stage in plan if "-k" in stage)
    assert "tests/mixers/test_laws.py" in law
    assert "gla" in law[-1].split(" or ")
    files = [name for stage in plan if "-k" not in stage for name in stage]
    assert len(files) == len(set(files))


@pytest.mark.parametrize(
    ("file", "test"),
    [
        ("tasks/text/ruler_tracing.py", "tests/tasks/text/test_ruler.py"),  # a part of what the test is named after
        ("tasks/waves.py", "tests/tasks/test_time_series.py"),  # no test has its name, and this one tests its task
    ],
)
def test_a_part_of_a_file_is_put_to_the_tests_of_the_whole(file: str, test: str):
    assert test in stages(Path(__file__).parent.parent, f"src/contextlab/{file}")[0]


TRACED = "src/contextlab/mixers/gate.py"
GATE = """LEAST = 2


class Gate:
    slope: float = 1.0

    def open(self, x, wide=False):
        if x < LEAST:
            return (
                x
            )
        return self.slope * x


TABLE = (
    Row("shut", 0),
    Row("ajar", 1),
)
"""


@pytest.fixture
def traced(tmp_path: Path) -> tuple[Path, Map]:
    """A tree with one source, and the map that its tests would give."""
    source = tmp_path / TRACED
    tests = {
        "mixers/test_gate.py": "",
        "mixers/test_laws.py": "",
        "test_cli.py": "import subprocess\nimport contextlab.mixers.gate\n",
    }
    for path, text in ((source, GATE), *((tmp_path / "tests" / name, text) for name, text in tests.items())):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    names = ["mixers/test_gate.py::opens", "mixers/test_laws.py::split[ajar]", "mixers/test_laws.py::split[shut]"]
    found = Map()
    found.add(
        {
            "files": {f"tests/{name}": 0.5 for name in tests},
            "tests": {
                f"tests/{name}": {"seconds": seconds, "shared": ["fixture tests::run"] * (seconds == 9.0)}
                for name, seconds in zip([*names, "test_cli.py::runs"], [5.0, 1.0, 2.0, 9.0], strict=True)
            },
        },
        {
            TRACED: {
                1: {""},
                8: {f"tests/{name}" for name in names},
                9: {f"tests/{names[1]}"},
                12: {f"tests/{names[0]}", "fixture tests::run"},
            }
        },
        tmp_path,
    )
    return tmp_path, found


def chosen(traced: tuple[Path, Map], line: int, seconds: float = 60.0) -> list[str]:
    return [name.split("/")[-1] for stage in plan(*traced, TRACED, line, seconds).stages for name in stage.order or ()]


def test_a_mutant_is_put_to_the_tests_that_execute_its_line(traced: tuple[Path, Map]):
    gate, ajar, shut = "test_gate.py::opens", "test_laws.py::split[ajar]", "test_laws.py::split[shut]"
    cli = "test_cli.py::runs"
    assert chosen(traced, 8) == [gate, ajar, shut]  # the mirror, then the cheapest
    assert chosen(traced, 10) == [ajar]  # a part of the statement in line 9
    assert chosen(traced, 12) == [gate, cli]  # which shares a fixture that runs it
    assert chosen(traced, 7) == [gate, ajar, cli, shut]  # a default: all that run the function
    assert chosen(traced, 5) == [gate, cli, ajar, shut]  # an attribute: first the lines that read it
    assert chosen(traced, 1) == [gate, ajar, shut, cli]
    assert chosen(traced, 16)[0] == shut  # a row of a table: first the tests named after it
    assert chosen(traced, 17)[0] == ajar
    (traced[0] / "tests/test_defaults.py").write_text("")
    assert plan(*traced, TRACED, 7, 60.0).stages[0].arguments[-1] == "tests/test_defaults.py"
    assert "tests/test_defaults.py" not in plan(*traced, TRACED, 8, 60.0).stages[0].arguments
    assert chosen(traced, 8, seconds=4.0) == [ajar, shut]  # 0.5 s to collect the file, 1 s and 2 s


def test_a_line_that_no_test_executes_is_left_to_tests_that_start_processes(traced: tuple[Path, Map]):
    root, found = traced
    source = root / TRACED
    source.write_text(
        GATE.replace("return self.slope * x", "if x > 9:\n            return x\n        return self.slope * x")
    )
    assert plan(root, found, TRACED, 13, 60.0).executing == -1  # another text: the map knows nothing of it
    found.texts[TRACED] = digest(source)
    untraced = plan(root, found, TRACED, 13, 60.0)
    assert untraced.executing == 0
    assert [stage.arguments for stage in untraced.stages] == [["tests/test_cli.py"]]


def test_a_map_is_read_as_it_was_written_and_tests_that_run_again_replace_their_part(traced: tuple[Path, Map]):
    root, found = traced
    found.write(root / "map.json")
    again = Map.read(root / "map.json")
    assert again == found
    again.add({"files": {"tests/mixers/test_gate.py": 0.1}, "tests": {}}, {}, root)
    assert [name.split("/")[-1] for name in again.tests] == [
        "test_laws.py::split[ajar]",
        "test_laws.py::split[shut]",
        "test_cli.py::runs",
    ]
    assert again.of(again.lines[TRACED][8]) == list(again.tests)[:2]
    assert again.of(again.lines[TRACED][12]) == ["tests/test_cli.py::runs"]


def test_cases_of_one_test_leave_others_their_turn():
    tests = {f"tests/test_laws.py::split[{n}]": 0.1 for n in range(4)} | {"tests/a/test_a.py::a": 2.0}
    tests |= {"tests/test_laws.py::cut": 3.0, "tests/b/test_b.py::b[0]": 1.0}
    order = ordered(Map(tests=tests), 127, set())
    assert order[:4] == [
        "tests/test_laws.py::split[0]",
        "tests/b/test_b.py::b[0]",
        "tests/a/test_a.py::a",
        "tests/test_laws.py::cut",
    ]


@pytest.mark.parametrize(
    ("line", "inside", "lines", "body"),
    [(5, False, [5], []), (7, False, [7], [8, 9, 10, 11, 12]), (8, True, [8], []), (11, True, [9, 10, 11], [])],
)
def test_the_place_of_a_line(line: int, inside: bool, lines: list[int], body: list[int]):
    found = place(ast.parse(GATE), line)
    assert (found.inside, list(found.lines), list(found.body)) == (inside, lines, body)


def test_a_map_follows_its_sources(traced: tuple[Path, Map]):
    root, found = traced
    gate, ajar, shut = "test_gate.py::opens", "test_laws.py::split[ajar]", "test_laws.py::split[shut]"
    cli = "test_cli.py::runs"
    changed = GATE.replace("x < LEAST", "x <= LEAST").replace("LEAST = 2\n", "LEAST = 2\nMOST = 3\n")
    (root / TRACED).write_text(changed + "\n\ndef close(x):\n    return -x\n")
    follow(found, TRACED, GATE, (root / TRACED).read_text())
    assert chosen(traced, 13) == [gate, cli]  # moved by a line, else as it was
    assert chosen(traced, 9) == [gate, ajar, cli]  # changed: the tests of its function's other lines
    assert set(chosen(traced, 23)) == {gate, ajar, shut, cli}  # new, as is its function: those of the whole file
    assert found.imported[TRACED] == [1]
