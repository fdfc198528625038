"""The harness of mutants: it changes the line that it names, and chooses tests of the changed file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.soak.chosen import stages
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
