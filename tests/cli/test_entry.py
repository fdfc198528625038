"""How the command line ends."""

from __future__ import annotations

import pytest

from contextlab.cli import entry


def test_a_reader_that_has_enough_is_no_fault(monkeypatch):
    """`contextlab list task | head -1`: typer and rich end with code 1 then, which says here that a part has failed."""

    def ends(standalone_mode):
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904

    monkeypatch.setattr(entry, "app", ends)
    monkeypatch.setattr(entry, "yield_cores", lambda: None)
    monkeypatch.setattr(entry.signal, "signal", lambda *args: None)
    monkeypatch.setattr(entry.sys, "argv", ["contextlab"])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 0
