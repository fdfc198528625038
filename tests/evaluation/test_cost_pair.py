"""Two models timed in turns."""

from __future__ import annotations

import time

import pytest

from contextlab.evaluation import time_pair
from contextlab.models import build_model

SPEC = {"width": 16, "depth": 1, "heads": 2, "read_in": "token", "input_size": 9, "output_size": 9}


@pytest.fixture
def slow():
    """A model that sleeps for each call."""
    model = build_model(SPEC)
    model.register_forward_pre_hook(lambda *_: time.sleep(0.004))
    read = model.read
    model.read = lambda *args, **more: (time.sleep(0.004), read(*args, **more))[1]
    return model


def test_the_slower_model_takes_longer_and_all_is_told(slow):
    quick = build_model(SPEC).train()
    prefill, decode = time_pair(quick, slow, 8, seconds=0.0)
    assert [(each.what, each.length, each.batch, each.turns) for each in (prefill, decode)] == [
        ("prefill", 8, 1, 3),
        ("decode", 8, 1, 3),
    ]
    for each in (prefill, decode):
        assert each.after[0] >= 0.004
        assert each.ratio[1] > 1.5
        assert each.before == tuple(sorted(each.before))
    assert quick.training


def test_models_take_no_more_than_they_can():
    short = build_model({**SPEC, "position": "learned", "max_length": 6})
    assert {each.length for each in time_pair(short, short, 256, seconds=0.0)} == {3}
    whole = build_model({**SPEC, "pool": "mean"})
    assert time_pair(whole, whole, 8) == []
