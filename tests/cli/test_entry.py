"""How the command line ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from contextlab.cli import entry


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
