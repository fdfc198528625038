"""A fixture that runs the command line."""

from __future__ import annotations

import functools
import sys

import pytest
import typer.main

from contextlab import cli

# The same commands each time; from hundreds of annotations they take longer to make than most of them to run.
COMMANDS = functools.cache(typer.main.get_command)


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Run the command line in a temporary folder. Returns exit code, output, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(typer.main, "get_command", COMMANDS)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))  # the command line heeds it

    def invoke(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["contextlab", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return invoke
