"""Vectors that are a task where the answer is the same for every query, and are none where it is not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from contextlab import build_model, build_task
from contextlab.inspect import Subject
from contextlab.inspect.probe import records
from contextlab.inspect.probes.task_vector import NONE, OTHER, TaskVector, _asking, _by_function, _read
from contextlab.models import preset
from contextlab.tasks.regression import LinearRegression


@dataclass(frozen=True)
class Constant(LinearRegression):
    """The same x in every example, so that a context's function is one number."""

    def _draw_xs(self, batch, generator, device):
        return super()._draw_xs(batch, generator, device) * 0 + 1


PLAIN = build_task("linear_regression", dimensions=3, examples=12)
DESCENT = build_model("gd_construction", dimensions=3, learning_rate=0.1).double()


def test_a_number_that_the_stream_holds_is_a_task_vector():
    task = Constant(dimensions=3, examples=12)
    found = TaskVector(contexts=40, queries=2).measure(Subject(DESCENT, task)).set_index("what")
    for what in (OTHER, NONE):
        row = found.loc[what]
        assert row["value"] == pytest.approx(1, abs=1e-9)
        assert abs(row["control"]) < 0.4
        assert row["layer"] == 0


def test_the_answer_to_one_query_is_no_task_vector():
    probe = TaskVector(contexts=200, queries=20)
    found = probe.measure(Subject(DESCENT, PLAIN))
    assert found["value"].abs().max() < 0.15  # w . x of other x; what is left is the mean over few x
    assert found["control"].abs().max() < 0.15


def test_queries_follow_contexts_as_the_task_lays_them_out():
    drawn = PLAIN.sample(3, torch.Generator().manual_seed(0)).to(torch.float64)
    queries = torch.randn(2, 3, dtype=torch.float64)
    asked = _asking(drawn, queries, PLAIN, True)
    assert torch.equal(asked.prompt.inputs[:, :-1], drawn.inputs[:, :-1].repeat_interleave(2, 0))
    assert torch.equal(asked.prompt.inputs[:, -1, :3], queries.repeat(3, 1))
    assert torch.equal(asked.prompt.inputs[:, -1, 3:], drawn.inputs[:, -1, 3:].repeat_interleave(2, 0))
    alone = _asking(drawn, queries, PLAIN.replace(layout="interleaved"), False)
    assert alone.place == 0
    assert torch.equal(alone.prompt.inputs[:, 0], torch.cat([queries.repeat(3, 1), torch.zeros(6, 1).double()], 1))


@torch.no_grad()
def test_a_vector_that_is_put_in_is_what_its_context_says():
    """The whole stream of a context, put into another one after the last layer, answers as that context does."""
    drawn = PLAIN.sample(4, torch.Generator().manual_seed(0)).to(torch.float64)
    asked = _asking(drawn, torch.randn(1, 3, dtype=torch.float64), PLAIN, True)
    streams, answers = _read(DESCENT, asked)
    site = "blocks.0.output"
    other = torch.tensor([1, 2, 3, 0])
    _, moved = _read(DESCENT, asked, {site: streams[site][other, 0] - streams[site][:, 0]})
    torch.testing.assert_close(moved, answers[other])


def test_contexts_of_one_function_share_a_vector():
    task = PLAIN.replace(pool=2)
    drawn = task.sample(12, torch.Generator().manual_seed(0))
    vectors = torch.randn(12, 5)
    found = _by_function(drawn, vectors)
    same = (drawn.hidden["weights"] == drawn.hidden["weights"][0]).flatten(1).all(1)
    torch.testing.assert_close(found[0], vectors[same].mean(0))
    assert len(found.unique(dim=0)) == 2
    assert _by_function(PLAIN.sample(12, torch.Generator().manual_seed(0)), vectors) is vectors


def test_what_cannot_be_asked_is_refused():
    recall = build_task("associative_recall", vocabulary=16, pairs=2, length=12)
    model = build_model(preset("transformer", width=8).for_task(recall))
    assert "no (x, y) examples" in TaskVector().refusal(Subject(model, recall))
    words = TaskVector().words(records(TaskVector(contexts=8, queries=2).measure(Subject(DESCENT, PLAIN))))
    assert len(words) == 2
