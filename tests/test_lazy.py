"""Imports without the warnings that packages log."""

from __future__ import annotations

import logging

import pytest

from contextlab.lazy import without_logs


def test_warnings_are_unlogged_within_alone(caplog):
    log = logging.getLogger("a package")
    with pytest.raises(ImportError), without_logs():
        log.warning("a kernel is missing")
        log.error("broken")
        raise ImportError
    log.warning("later")
    assert [record.getMessage() for record in caplog.records] == ["broken", "later"]
