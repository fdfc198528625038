"""Models that read prompts whole: what they see of one, where their one prediction stands, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from contextlab import build_model, tasks
from contextlab.errors import InputError
from contextlab.models import ModelSpec
from contextlab.models.answer import answer
from contextlab.training import train

SMALL = {"width": 16, "depth": 1, "read_in": "token", "input_size": 30, "output_size": 30}
LISTOPS = tasks.build_task("listops", length=24, shortest=5, depth=3, arguments=3)


@pytest.fixture
def prompt():
    return LISTOPS.sample(6, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("pool", ["mean", "last", None])
@pytest.mark.parametrize("layer", ["encoder_attention", "attention"])
def test_a_prompt_is_read_up_to_its_scored_position(prompt, layer, pool):
    """And no farther: the rest may hold the answer."""
    if layer == "attention" and pool is None:
        return
    sizes = {"input_size": LISTOPS.input_size, "output_size": LISTOPS.output_size}
    model = build_model({**SMALL, **sizes}, layers=[layer], pool=pool).double()
    found = answer(model, prompt)
    assert found.shape == (6, prompt.length, LISTOPS.output_size)
    for row, at in enumerate(prompt.scored.int().argmax(1).tolist()):
        alone = model(prompt.inputs[row : row + 1, : at + 1])
        alone = alone[0] if pool else alone[0, at]
        torch.testing.assert_close(found[row, at], alone, rtol=1e-9, atol=1e-9)
    due = F.cross_entropy(found[prompt.scored], prompt.targets[prompt.scored])
    torch.testing.assert_close(LISTOPS.loss(found, prompt), due)


def test_a_model_in_a_wrapper_is_known(prompt):
    sizes = {"input_size": LISTOPS.input_size, "output_size": LISTOPS.output_size}
    model = build_model({**SMALL, **sizes}, pool="mean")
    wrapped = nn.Module()
    wrapped.module, wrapped.forward = model, model.forward
    assert answer(wrapped, prompt).equal(answer(model, prompt))


def test_a_causal_model_reads_the_prompt_as_it_is(prompt):
    model = build_model({**SMALL, "input_size": LISTOPS.input_size})
    assert answer(model, prompt).equal(model(prompt.inputs))


def test_other_tasks_are_refused_before_anything_is_trained():
    copy = tasks.build_task("copy", preset="easy")
    sizes = {"input_size": copy.input_size, "output_size": copy.output_size, "read_in": "token"}
    pooled = build_model({"width": 16, "depth": 1, **sizes}, pool="mean")
    serve = r"a task that scores one prediction a prompt \(bandwidth, .*listops.*text_classification"
    with pytest.raises(InputError, match=f"^pool: a model with pool 'mean' predicts once a prompt; .*{serve}"):
        train(pooled, copy, {"steps": 1, "batch": 2})
    with pytest.raises(InputError, match=f"^layers: 'fnet' reads both ways and would see the answers; .*{serve}"):
        ModelSpec(layers=["fnet"]).for_task(copy)
    assert ModelSpec(layers=["fnet"], pool="first").for_task(LISTOPS).pool == "first"
    with pytest.raises(InputError, match="^pool: the model predicts once a prompt, but .* are to be scored"):
        answer(pooled, copy.sample(2, torch.Generator().manual_seed(0)))
