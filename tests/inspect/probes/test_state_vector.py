"""States handed from one prompt to another: who carries what is known of models without keys and values."""

from __future__ import annotations

import pytest
import torch

from contextlab import build_model, build_task
from contextlab.inspect import Subject
from contextlab.inspect.probe import records
from contextlab.inspect.probes.state_vector import ALL, ALONE, CARRIED, FIXED, GROWING, StateVector, _queries
from contextlab.models import preset
from contextlab.testing.models import noisy

REGRESSION = build_task("linear_regression", dimensions=3, examples=24)
RECALL = build_task("associative_recall", vocabulary=16, pairs=3, length=12)


def measured(model, task, prompts=40):
    found = StateVector(prompts=prompts).measure(Subject(model.double(), task))
    return found.set_index(["what", "measure"]).sort_index(), StateVector().words(records(found))


@pytest.mark.parametrize("name", ["gated_delta_net", "mamba2", "rwkv7", "lstm"])
def test_without_keys_and_values_the_states_carry_everything(name):
    found, words = measured(noisy(preset(name, width=16, depth=2, heads=2).for_task(RECALL)).eval(), RECALL)
    assert found.loc[(FIXED, CARRIED), "value"].item() == pytest.approx(1, abs=1e-6)
    assert abs(found.loc[(FIXED, CARRIED), "control"].item()) < 0.5
    assert (GROWING, CARRIED) not in found.index
    assert words[0].startswith("The states that do not grow (it has no others) carry 100 [100, 100]%")


def test_the_state_of_a_written_step_of_descent_is_its_weights():
    model = build_model("gd_construction", dimensions=3, learning_rate=0.3)
    found, _ = measured(model, REGRESSION, prompts=200)
    alone = found.loc[(ALONE, CARRIED)]
    assert alone["value"].item() == pytest.approx(1, abs=1e-9)
    assert abs(alone["control"].item()) < 0.25
    own, others = (found.loc[(ALL, "squared_error"), name].item() for name in ("value", "control"))
    assert own < 0.8 * others  # of the weights that it was given, not of those that were there


def test_the_written_induction_heads_memory_is_in_its_second_layer():
    task = build_task("induction_head", vocabulary=8, length=16)
    model = build_model("induction_construction", vocabulary=task.input_size, length=16)
    found = StateVector(prompts=100).measure(Subject(model.double(), task)).set_index(["site", "what", "measure"])
    first, second = (found.loc[(f"blocks.{i}.mixer.state", ALONE, CARRIED)] for i in (0, 1))
    # The first layer's keys tell what stands before the query alone; the second finds the earlier symbol.
    assert second["value"] > 0.9
    assert abs(first["value"]) < 0.1
    assert abs(second["control"]) < 0.3


def test_all_states_together_answer_as_the_whole_text_does():
    model = noisy(preset("mambaformer", width=16, depth=3, heads=2).for_task(RECALL)).eval()
    subject, probe = Subject(model, RECALL), StateVector(prompts=20)
    found = probe.measure(subject)
    a = subject.prompts(60).rows(0, 20)
    at = _queries(a)
    with torch.no_grad():
        right = RECALL.errors(model(a.inputs), a)["accuracy"][torch.arange(20), at]
    told = found[(found["what"] == ALL) & (found["measure"] == "accuracy")]["value"].item()
    assert told == pytest.approx(right.mean().item())
    whats = set(found["what"])
    assert {FIXED, GROWING, ALL, ALONE} == whats


def test_queries_are_scored_and_late():
    prompt = RECALL.sample(30, torch.Generator().manual_seed(0))
    at = _queries(prompt)
    assert prompt.scored[torch.arange(30), at].all()
    assert (_queries(REGRESSION.sample(5, torch.Generator().manual_seed(0))) == 23).all()


def test_models_without_states_are_refused():
    task = build_task("linear_regression", dimensions=3, examples=8, query="random")
    model = build_model(preset("transformer", width=8, pool="mean").for_task(task))
    assert "reads prompts whole" in StateVector().refusal(Subject(model, task))
