"""The smallest sizes of every option of every task: they work, or one line says what would."""

from __future__ import annotations

import pytest

import contextlab.tasks  # noqa: F401  (registers every task)
from contextlab import registry
from contextlab.testing.tasks import hold_to_small_sizes, sizes

OPTIONS = [(entry.name, name) for entry in registry.entries("task") for name in sizes(entry.factory)]


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=lambda value: value)
def test_small_sizes_work_or_are_refused_with_what_would(name: str, option: str) -> None:
    hold_to_small_sizes(registry.lookup("task", name), option)
