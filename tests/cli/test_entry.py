"""How the command line ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from contextlab.cli import entry
from contextlab.models import save_model

from ..convert.teachers import teacher


def test_a_reader_that_has_enough_is_no_fault(monkeypatch, tmp_path):
    """typer and rich end with code 1 then, which says here that a part has failed; a shell has 141 of SIGPIPE."""

    def ends(standalone_mode):
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904

    monkeypatch.setattr(entry, "app", ends)
    monkeypatch.setattr(entry, "yield_cores", lambda: None)
    monkeypatch.setattr(entry.signal, "signal", lambda *args: None)
    monkeypatch.setattr(entry.sys, "argv", ["contextlab"])
    with (tmp_path / "out").open("w") as out:  # its descriptor is replaced, and pytest still reads what it captures
        monkeypatch.setattr(entry.sys, "stdout", out)
        with pytest.raises(SystemExit) as ended:
            entry.main()
    assert ended.value.code == 141


def test_nobody_complains_where_the_output_is_not_read():
    """As with `contextlab list task | head -1`, only that the reader has gone before the first line for certain."""
    code = "from contextlab.cli.entry import main; main()"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code, "list", "task"], **pipes)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


@pytest.mark.parametrize("command", [("shrink", "old", "--method", "rtn", "--out", "new"), ("list", "tasks")])
def test_an_interrupted_command_says_so(command, call, tmp_path, monkeypatch):
    """typer itself would end without a word."""
    save_model(teacher().float(), tmp_path / "old")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for name in ("contextlab.models.io.read_tensors", "contextlab.cli.catalogue.load_components"):
        monkeypatch.setattr(name, interrupted)
    assert call(*command) == (130, "", "interrupted; nothing is kept\n")


def test_an_interrupted_conversion_says_how_to_go_on(call, tmp_path, monkeypatch):
    save_model(teacher().float(), tmp_path / "old")

    def interrupted(*_, folder, **__):
        (folder / "1-attention").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr("contextlab.convert.conversion.convert", interrupted)
    code, _, err = call("convert", "old", "--to", "gla", "--budget", "0", "--out", "new")
    assert (code, err) == (130, "interrupted; the same command goes on where it was, by new.stages\n")
