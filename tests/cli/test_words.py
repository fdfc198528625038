"""How the command line says times."""

from __future__ import annotations

import pytest

from contextlab.cli.run import seconds_in_words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        *((0.25, "0.25 s"), (9.94, "9.9 s"), (59, "59 s"), (60, "1 min"), (90, "1.5 min"), (3600, "1 h")),
        *((47 * 3600, "47 h"), (48 * 3600, "2.0 days")),
    ],
)
def test_seconds_are_said_in_the_largest_unit_that_holds_one(seconds: float, words: str) -> None:
    assert seconds_in_words(seconds) == words
