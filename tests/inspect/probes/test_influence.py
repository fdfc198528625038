"""The probe of influence: it finds the induction heads' work in mixers that are read alike, and none in fresh ones."""

from __future__ import annotations

from contextlab import build_model, build_task
from contextlab.inspect import look
from contextlab.inspect.probes.influence import spaced
from contextlab.models import preset

OPTIONS = "influence:prompts=4,places=16"


def values(table, measure="share"):
    return table[table["measure"] == measure].set_index(["site", "what"])["value"]


def test_the_work_of_induction_heads_is_seen_without_matrices():
    task = build_task("induction_head", length=32)
    model = build_model("induction_construction", vocabulary=task.input_size, length=32)
    found = look(model, task, [OPTIONS])
    share = values(found.table)
    assert share["blocks.0.mixer", "previous"] > 0.99
    assert share["blocks.1.mixer", "induction"] > 0.6  # where nothing came before, it looks at the first token
    assert share["logits", "induction"] > 0.99  # asked where the answer counts
    assert "What training has made it rest on most is what followed the same symbol: 1.00" in " ".join(found.words)


def test_fresh_weights_rest_on_nothing_of_the_kind():
    task = build_task("induction_head", length=32)
    for name in ("transformer", "gated_delta_net", "mamba2"):
        found = look(build_model(preset(name, width=16, depth=2, heads=2).for_task(task)), task, [OPTIONS])
        assert values(found.table)["logits", "induction"] < 0.2


def test_a_shift_by_one_token_reaches_one_token_back():
    task = build_task("linear_regression", dimensions=2, examples=6)
    spec = preset("transformer", width=8, depth=1, heads=1, layers=["token_shift"], mlp="none", norm="none")
    found = look(build_model(spec.for_task(task)), task, [OPTIONS]).table
    assert values(found, "share by distance")["logits", "2 to 3"] == 0
    assert 0 < values(found, "tokens back")["logits", "mean"] < 1


def test_places_are_spaced_from_the_last_one():
    assert spaced(list(range(10)), 4) == [0, 3, 6, 9]
    assert spaced([3, 5, 9], 64) == [3, 5, 9]
    assert spaced(list(range(128)), 64)[-1] == 127
