"""A naive form and its fast one are called alike: arguments of the same name have the same default."""

from __future__ import annotations

import inspect
from inspect import Parameter

import pytest

from contextlab import ops

PAIRS = sorted(name for name in dir(ops) if hasattr(ops, f"naive_{name}") and callable(getattr(ops, name)))


@pytest.mark.parametrize("name", PAIRS)
def test_defaults_are_those_of_the_naive_form(name: str) -> None:
    fast, naive = (inspect.signature(getattr(ops, each)).parameters for each in (name, f"naive_{name}"))
    shared = [each for each in naive if each in fast]
    assert shared
    found = {each: fast[each].default for each in shared if fast[each].default is not Parameter.empty}
    assert found == {each: naive[each].default for each in found}
