"""Circuits: exact at both ends, the written mechanism and nothing else, and none where nothing was learned."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch

from contextlab import build_model, build_task, capture, patch
from contextlab.errors import InputError
from contextlab.inspect import Subject, look
from contextlab.inspect.circuits import Graph, not_a_graph
from contextlab.inspect.pairs import pairs_of
from contextlab.inspect.probe import parse_probe, records
from contextlab.models import preset
from contextlab.tasks.induction_head import InductionHead

V, T = 8, 12


@dataclass(frozen=True)
class Later(InductionHead):
    """The trigger is never the first token, which the construction treats as its own predecessor."""

    def sample(self, batch, generator, device="cpu"):
        prompt = super().sample(4 * batch, generator, device)
        return prompt.take((prompt.hidden["at"] > 0).nonzero()[:batch, 0])

    def corrupt(self, prompt, generator):
        found = super().corrupt(prompt, generator)
        first = (found.hidden["at"] == 0)[:, None]
        inputs, targets = (
            torch.where(first, getattr(prompt, each), getattr(found, each)) for each in ("inputs", "targets")
        )
        return dataclasses.replace(found, inputs=inputs, targets=targets)


def fresh(task, name="transformer", **options):
    return build_model(preset(name, width=16, depth=2, heads=2, mlp_ratio=2).for_task(task), **options).double().eval()


def graph_of(model, task, count=5):
    pairs = pairs_of(Subject(model, task), count)
    return Graph(model, pairs.clean.inputs, pairs.corrupted.inputs, pairs.score), pairs


TASK = Later(vocabulary=V, length=T, trigger="any")


def test_it_is_the_previous_token_head_and_the_induction_head_and_nothing_else():
    model = build_model("induction_construction", vocabulary=V, length=T).double().eval()
    probe = parse_probe("circuit:prompts=24")
    table = probe.measure(Subject(model, TASK))
    edges = table[table["measure"] == "effect when taken away"]
    assert edges["what"].tolist() == ["tokens to mixer 0", "head 0.0 to mixer 1", "head 1.0 to the answer"]
    assert edges["value"].tolist() == pytest.approx([1, 1, 1], abs=1e-6)
    share = table[table["measure"] == "share of the effect"].iloc[0]
    assert share["value"] == pytest.approx(1, abs=1e-6)
    assert share["control"] < 0.5
    (said,) = probe.words(records(table))
    assert said.startswith("3 of 10 edges keep 100% [100%, 100%] of the answer on fresh prompts")
    assert said.endswith("tokens to mixer 0, head 0.0 to mixer 1 and head 1.0 to the answer.")
    estimate = table[table["measure"] == "estimate"].set_index("what")["value"]
    assert abs(estimate["head 0.0 to mixer 1"]) < 1e-9  # behind a sure softmax gradients tell nothing


@pytest.mark.parametrize("name", ["transformer", "gated_delta_net", "mamba2"])
def test_in_a_fresh_model_there_is_none(name):
    task = build_task("induction_head", vocabulary=V, length=T)
    (said,) = look(fresh(task, name), task, "circuit:prompts=16").words
    assert said.endswith("so that no part is named.")


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformer", "gated_delta_net", "mamba2", "lstm", "mambaformer"])
def test_all_edges_are_the_clean_text_and_none_the_corrupted_one(name):
    model = fresh(TASK, name)
    graph, pairs = graph_of(model, TASK)
    torch.testing.assert_close(graph.run(set(graph.edges)), pairs.score(model(pairs.clean.inputs)))
    torch.testing.assert_close(graph.run(set()), pairs.score(model(pairs.corrupted.inputs)))
    torch.testing.assert_close(graph.run(set(graph.edges), clean=False), graph.corrupted_score)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    split = {sender.head is not None for sender in graph.senders if ".mixer." in sender.site}
    assert (True in split) == (name in ("transformer", "mambaformer"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformer", "gated_delta_net"])
def test_an_edge_to_the_answer_is_taken_away_as_by_hand(name):
    model = fresh(TASK, name)
    graph, pairs = graph_of(model, TASK)
    with capture(model, "blocks.0.mixer.output") as taken:
        model(pairs.clean.inputs)
        clean = taken["blocks.0.mixer.output"]
        model(pairs.corrupted.inputs)
    apart = clean - taken["blocks.0.mixer.output"]
    with patch(model, {"blocks.1.output": lambda value: value - apart}):
        by_hand = pairs.score(model(pairs.clean.inputs))
    last = len(graph.receivers) - 1
    mixer = [s for s, sender in enumerate(graph.senders) if sender.site.startswith("blocks.0.mixer")]
    kept = set(graph.edges) - {(s, last) for s in mixer}
    torch.testing.assert_close(graph.run(kept), by_hand)


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformer", "gated_delta_net", "mamba2"])
def test_estimates_are_exact_to_first_order(name):
    """Of a clean text that is next to the corrupted one, what a receiver is given moves the score as is estimated."""
    task = build_task("linear_regression", dimensions=3, examples=6)
    model = fresh(task, name)
    generator = torch.Generator().manual_seed(0)
    corrupted = torch.randn(4, 6, task.input_size, generator=generator, dtype=torch.float64)
    clean = corrupted + 1e-6 * torch.randn(corrupted.shape, generator=generator, dtype=torch.float64)
    graph = Graph(model, clean, corrupted, lambda y: y[:, -1, 0])
    guess = graph.estimates()
    assert set(guess) == set(graph.edges)
    for s, r in graph.edges:
        exact = graph.run(set(graph.edges), clean=False, nudges={r: graph._apart[s]}) - graph.corrupted_score
        torch.testing.assert_close(guess[s, r], exact, rtol=1e-3, atol=1e-11)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_models_that_are_no_such_graph_are_refused():
    for name, options, said in (
        ("transformer", {"block": "parallel"}, "layer 0 does not add x + mixer"),
        ("transformer", {"loops": 2}, "read their layers once"),
        ("zamba", {}, ""),
    ):
        spec = preset(name, **{"width": 16, "heads": 2, **({} if name == "zamba" else {"depth": 2}), **options})
        model = build_model(spec.for_task(TASK))
        assert said in not_a_graph(model)
        assert not_a_graph(model)
        with pytest.raises(InputError):
            look(model, TASK, "circuit:prompts=4")
    with pytest.raises(InputError, match="expected a share below 1"):
        look(fresh(TASK), TASK, "circuit:keep=1.5")
