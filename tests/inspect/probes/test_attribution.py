"""The probe of attribution: it names the tokens that a written model rests on, and estimates that find them."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from contextlab import build_model, build_task
from contextlab.inspect import look
from contextlab.inspect.probes.attribution import asked_in, correlation
from contextlab.models import preset

OPTIONS = "attribution:prompts=8,steps=16,points=8"


def values(table):
    return table.set_index(["measure", "what"])["value"]


def test_the_induction_heads_rest_on_the_pair_and_the_question():
    task = build_task("induction_head", length=32)
    found = look(build_model("induction_construction", vocabulary=task.input_size, length=32), task, [OPTIONS])
    share = values(found.table)
    for what in ("same", "duplicate", "induction"):  # without any of the three there is no answer
        assert share["share", what] > 0.2
    assert sum(share["share", what] for what in ("same", "duplicate", "induction")) > 0.9
    assert 2.9 < share["tokens", "number"] < 4.5
    assert share["insertion", "left_out"] > share["insertion", "gradient"]  # a sure softmax has no slope
    assert share["correlation", "gradient"] < 0.9


def test_fresh_weights_rest_on_no_pair():
    task = build_task("induction_head", length=32)
    model = build_model(preset("gated_delta_net", width=16, depth=2, heads=2).for_task(task))
    assert values(look(model, task, [OPTIONS]).table)["share", "induction"] < 0.15


def test_correlations_are_those_of_pandas():
    a, b = torch.randn(2, 9).double(), torch.randn(2, 9).double().round()  # with ties
    may = torch.arange(9) < torch.tensor([[9], [6]])
    for rank, method in ((False, "pearson"), (True, "spearman")):
        for row, count in enumerate((9, 6)):
            wanted = pd.Series(a[row, :count]).corr(pd.Series(b[row, :count]), method=method)
            assert correlation(a, b, may, rank)[row].item() == pytest.approx(wanted)


def test_the_answer_is_asked_where_it_counts_last():
    prompt = build_task("associative_recall").sample(3, torch.Generator().manual_seed(0))
    prompt.scored[0, -2:] = False
    prompt.scored[1] = False
    at = asked_in(prompt)
    assert at[0] < prompt.length - 2
    assert prompt.scored[0, at[0]]
    assert at[1] == prompt.length - 1
