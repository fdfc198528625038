"""The registry: names, near misses, option checks."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal, get_args

import pytest
from pydantic import PositiveInt

from contextlab import Mixer, kinds, registry
from contextlab.errors import InputError

SOURCE = Path(registry.__file__).parent


class Example:
    """A component for the tests.

    size: how large it is,
        in two lines.
    shape: what it looks like.
    """

    def __init__(self, size: PositiveInt, shape: Literal["round", "square"] = "round") -> None:
        self.size, self.shape = size, shape


@pytest.fixture
def example():
    registry.register("learner", "example_for_tests", papers=("0000.00000",), cases=({"size": 2},))(Example)
    yield registry.lookup("learner", "example_for_tests")
    del registry._entries["learner"]["example_for_tests"]


def test_builds_with_checked_options(example):
    built = example.build(size=3, shape="square")
    assert (built.size, built.shape) == (3, "square")


def test_parameters_come_from_signature_and_docstring(example):
    size, shape = example.parameters
    assert size.required
    assert size.help == "how large it is, in two lines."
    assert shape.default == "round"
    assert example.summary == "A component for the tests."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sise": 1}, "unknown option 'sise' of learner 'example_for_tests'; did you mean 'size'?"),
        ({}, "size: learner 'example_for_tests' requires it, such as 2"),
        ({"size": 0}, "size: input should be greater than 0, got int 0"),
        ({"size": True}, "size: expected a number, got bool True"),
        ({"size": "many"}, "size: input should be a valid integer"),
        ({"size": 1, "shape": "rond"}, "did you mean 'round'?"),
        ({"size": 2**31}, "size: whole numbers are at most 2147483647, got int 2147483648"),
        ({"size": 10**5000}, "size: whole numbers are at most 2147483647, got int of 16610 bits"),
    ],
)
def test_bad_options_are_refused_in_one_line(example, options, message):
    with pytest.raises(InputError) as caught:
        example.build(**options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_dataclass_makes_anew_is_its_default(example):
    @dataclass(frozen=True)
    class Made:
        """One. options: of it."""

        size: int = 3
        options: dict[str, int] = field(default_factory=lambda: {"a": 1})

    entry = dataclasses.replace(example, factory=Made)
    assert {each.name: each.default for each in entry.parameters} == {"size": 3, "options": {"a": 1}}
    for kind in registry.kinds():
        for other in registry.entries(kind):
            assert not any("factory>" in repr(each.default) for each in other.parameters), other.name


def test_unknown_names_suggest_the_nearest(example):
    with pytest.raises(InputError, match="did you mean 'example_for_tests'"):
        registry.lookup("learner", "exampel_for_test")
    with pytest.raises(InputError, match="unknown kind"):
        registry.names("lerner")


def test_a_name_is_taken_once(example):
    with pytest.raises(InputError, match=r"registered already, by tests\.test_registry\.Example; take another name"):
        registry.register("learner", "example_for_tests")(lambda: None)
    elsewhere = type("Example", (), {"__module__": "contextlab.prompt"})  # of the same name, from another file
    with pytest.raises(InputError, match="registered already"):
        registry.register("learner", "example_for_tests")(elsewhere)
    registry.register("learner", "example_for_tests")(Example)  # imported again it is the same
    assert registry.lookup("learner", "example_for_tests").factory is Example


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="unknown kind 'mixr'; did you mean 'mixer'"):
        registry.register("mixr", "example_for_tests")


@pytest.mark.parametrize(
    ("kind", "base"),
    [("mixer", "Mixer"), ("task", "Task"), ("policy", r"policies\.Policy"), ("conversion", r"convert\.Conversion")],
)
def test_what_is_no_class_of_its_kind_is_refused(kind, base):
    with pytest.raises(
        InputError, match=rf"{kind} 'mine': expected a class derived from contextlab\.{base}, got <func"
    ):
        registry.register(kind, "mine")(lambda: None)


def _mixer(forward):
    return registry.Entry("mixer", "mine", type("Mine", (Mixer,), {"forward": forward}))


@pytest.mark.parametrize(
    ("forward", "taken"),
    [
        (lambda self, x: x, "self, x"),
        (lambda self, x, mask, state, keep_state: x, "self, x, mask, state, keep_state"),  # another order
        (lambda self, x, state, mask, keep_state, more: x, "self, x, state, mask, keep_state, more"),
    ],
)
def test_a_method_that_takes_less_or_other_than_the_base_is_refused_where_the_component_is_built(forward, taken):
    said = rf"mixer 'mine': forward takes \({taken}\); expected what Mixer.forward takes, \(self, x, state, mask"
    with pytest.raises(InputError, match=said):
        _mixer(forward).build(width=4)


def test_a_method_may_take_more_options_or_whatever_there_is():
    for forward in (lambda self, *args, **kwargs: None, lambda self, x, state, mask, keep_state, tokens=None: None):
        assert _mixer(forward).check({"width": 4}) == {"width": 4}


def test_an_unknown_name_that_is_like_no_other_asks_for_the_plugin():
    import_module("contextlab.tasks")
    with pytest.raises(InputError, match="one of your own is found where --plugin names its file"):
        registry.lookup("task", "zzzzqqqq")
    with pytest.raises(InputError) as told:
        registry.lookup("task", "nedle")
    assert "--plugin" not in str(told.value)


def test_options_that_a_base_documents_are_told_too():
    import contextlab.tasks  # noqa: F401

    told = {p.name: p.help for p in registry.lookup("task", "boolean_function").parameters}
    assert told["dimensions"] == "d, the size of x."
    assert told["examples"].startswith("n, the (x, y) problems")


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_every_component_of_ours_declares_its_family(kind):
    import_module(kinds.room(kind))
    ours = [e for e in registry.entries(kind) if e.factory.__module__.startswith("contextlab.")]
    assert ours
    assert [entry.name for entry in ours if not entry.family] == []


def test_the_kinds_are_those_that_can_be_registered():
    assert list(get_args(kinds.Kind)) == list(kinds.KINDS) == registry.kinds()


def test_tasks_are_documented_on_the_page_of_their_family():
    import contextlab.tasks  # noqa: F401

    families = {e.family for e in registry.entries("task") if e.factory.__module__.startswith("contextlab.")}
    assert {f"{family.replace(' ', '-')}.md" for family in families} == {
        path.name for path in (SOURCE.parent.parent / "docs" / "tasks").glob("*.md")
    }


def test_importing_a_room_registers_what_is_in_each_of_its_files():
    """A new file that nobody imports would go unnoticed: here it fails, by name."""
    rooms = sorted({kinds.room(kind) for kind in kinds.KINDS})
    code = f"import sys, importlib; [importlib.import_module(room) for room in {rooms}]; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    for room in rooms:
        for path in (SOURCE / room.split(".")[1]).rglob("*.py"):
            if re.search(r"^@?register\(", path.read_text(), re.MULTILINE):
                module = ".".join(("contextlab", *path.relative_to(SOURCE).with_suffix("").parts))
                assert module in loaded, f"{module} registers something, but importing {room} does not import it"
