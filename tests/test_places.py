"""Where nothing can be written is known before any work, and nothing is left there by asking."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from contextlab.errors import ContextlabError
from contextlab.models import build_model, save_model
from contextlab.places import require_free, require_place
from tests.cli.conftest import call  # noqa: F401

SIZES = {"read_in": "token", "input_size": 16, "output_size": 16, "width": 8, "depth": 1, "heads": 2}


def test_a_place_that_is_free_is_left_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for path in ("new", "there", "new/and/deeper"):
        require_place(tmp_path / path)
    require_free(tmp_path / "new" / "deeper")
    assert [each.name for each in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize("path", ["file", "file/below", "lost", "/proc/none/below", "x" * 300 + "/y", "nul\0/y"])
def test_a_place_where_nothing_can_be_made_is_refused_in_one_line(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.symlink("nowhere", tmp_path / "lost")
    for check in (require_place, require_free):
        with pytest.raises(ContextlabError) as error:
            check(tmp_path / path)
        assert "\n" not in str(error.value)
    assert {each.name for each in tmp_path.iterdir()} == {"file", "lost"}


COMMANDS = [
    ("convert", "small", "--to", "gqa:kv_heads=1"),
    ("shrink", "small", "--method", "rtn"),
    ("merge", "small", "--method", "stack"),
    ("compress", "small", "--weights", "rtn"),
    ("advise", "small", "--memory", "1MB", "--length", "8"),
    ("cost", "transformer", "--lengths", "8"),
    ("learners", "linear_regression"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_no_command_works_for_what_it_cannot_write(command, call, tmp_path, monkeypatch):  # noqa: F811
    save_model(build_model("transformer", **SIZES), tmp_path / "small")
    for name in (
        "convert.base.Conversion.__call__",
        "models.stack.Model._run",
        "evaluation.evaluate_learners",
    ):
        monkeypatch.setattr(f"contextlab.{name}", lambda *_, **__: pytest.fail("it works already"))
    code, out, err = call(*command, "--out", "small/model.json/below")
    assert (code, out, err.count("\n"), "is a file" in err) == (2, "", 1, True), err
