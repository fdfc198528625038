"""Two models timed in turns, by a clock that the models themselves put forward."""

from __future__ import annotations

import pytest

from contextlab.evaluation import cost_pair, time_pair
from contextlab.models import build_model

SPEC = {"width": 16, "depth": 1, "heads": 2, "read_in": "token", "input_size": 9, "output_size": 9}


@pytest.fixture
def models(monkeypatch):
    """Two models whose calls take a second and three, and the list of who was called with how many tokens."""
    clock, calls = [0.0], []

    def model(name, seconds):
        made = build_model(SPEC)
        read = made.read

        def slow(tokens, *state):
            clock[0] += seconds
            calls.append((name, tokens.shape[1]))
            return read(tokens, *state)

        made.read = slow
        return made

    def seconds_of(work, device):
        began = clock[0]
        work()
        return clock[0] - began

    monkeypatch.setattr(cost_pair, "seconds_of", seconds_of)
    return model("one", 1.0).train(), model("other", 3.0), calls


def test_each_is_timed_in_turn_and_all_is_told(models):
    one, other, calls = models
    prefill, decode = time_pair(one, other, 8, seconds=0.0)
    for what, each in (("prefill", prefill), ("decode", decode)):
        assert (each.what, each.length, each.batch, each.turns) == (what, 8, 1, 3)
        assert (each.before, each.after, each.ratio) == ((1.0,) * 3, (3.0,) * 3, (3.0,) * 3)
    who = [name for name, length in calls if length == 8]
    assert who == ["one", "other", "one", "other", "other", "one", "one", "other"]  # the first two are not counted
    assert sum(length == 1 for _, length in calls) == 8 * 16
    assert one.training


def test_models_take_no_more_than_they_can():
    short = build_model({**SPEC, "position": "learned", "max_length": 6})
    assert {each.length for each in time_pair(short, short, 256, seconds=0.0)} == {3}
    whole = build_model({**SPEC, "pool": "mean"})
    assert time_pair(whole, whole, 8) == []
