"""Runs in one report have names that tell them apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from contextlab.cli.report import _names
from contextlab.errors import InputError


def test_runs_of_one_name_are_told_apart_by_as_much_of_their_paths_as_it_takes():
    """Rows of two runs under one name would count as seeds of one."""
    assert _names(["a", "b"], [Path("runs/x"), Path("other/x")]) == ["a", "b"]
    assert _names(["a", "a"], [Path("runs/x"), Path("runs/y")]) == ["x", "y"]
    assert _names(["a", "a"], [Path("runs/x"), Path("other/x")]) == ["runs/x", "other/x"]
    assert _names(["a", "a"], [Path("."), Path("runs")])[0] == Path.cwd().name


def test_one_run_is_not_given_twice():
    with pytest.raises(InputError, match="runs/x: given twice; expected different runs"):
        _names(["a", "a"], [Path("runs/x"), Path("runs/x")])
    with pytest.raises(InputError, match="given twice .as runs/x, too"):
        _names(["a", "a"], [Path("runs/x"), Path("runs/y/../x")])
