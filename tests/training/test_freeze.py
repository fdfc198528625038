"""Frozen parameters: no gradient, no state, no decay; resumed exactly; alone and together alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Sums, Tiny

from contextlab.errors import InputError
from contextlab.models import ModelSpec, build_model
from contextlab.tasks import build_task
from contextlab.training import Member, TrainSpec, TrainState, train, train_together
from contextlab.training.freeze import frozen, to_freeze

SPEC = TrainSpec(steps=12, batch=4, warmup=2, weight_decay=0.1, freeze=("blocks.0.*", "read_in.bias"))
FROZEN = {"blocks.0.up.weight", "blocks.0.up.bias", "blocks.0.down.weight", "read_in.bias"}


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "torch.optim.AdamW"])
def test_the_frozen_stay_bit_for_bit_and_the_others_learn(optimizer: str) -> None:
    model = Tiny()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model, Sums(), SPEC.model_copy(update={"optimizer": optimizer}))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in FROZEN)
        assert parameter.requires_grad  # what was frozen for this training is free for the next


def test_the_frozen_have_neither_gradient_nor_state() -> None:
    model = Tiny()
    with frozen(model, SPEC.freeze):
        state = TrainState.start(model, SPEC)
        assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == FROZEN
    assert set(state.params) == {name for name, _ in model.named_parameters()} - FROZEN
    assert not any(key.endswith(tuple(FROZEN)) for key in state.optimizer)


def test_a_stopped_training_goes_on_exactly(tmp_path: Path) -> None:
    whole, resumed = Tiny(), Tiny(seed=7)
    train(whole, Sums(), SPEC)
    train(Tiny(), Sums(), SPEC, folder=tmp_path, pause=5)
    train(resumed, Sums(), SPEC, folder=tmp_path, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_those_that_train_together_are_frozen_as_alone() -> None:
    task = build_task("linear_regression", dimensions=2, examples=3)
    form = ModelSpec(width=8, depth=2, heads=2).for_task(task)
    spec = TrainSpec(steps=4, batch=4, precision="float32", freeze=("blocks.0.*",))
    members = [Member(build_model(form, seed=seed), task, spec, seed) for seed in (0, 1)]
    train_together(members)
    for seed, member in enumerate(members):
        alone = build_model(form, seed=seed)
        train(alone, task, spec, seed=seed)
        for (name, own), other in zip(member.model.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
            if name.startswith("blocks.0."):
                assert torch.equal(own, build_model(form, seed=seed).get_parameter(name))
            assert own.requires_grad
    other = Member(build_model(form), task, spec.model_copy(update={"freeze": None}))
    with pytest.raises(InputError, match=r"train.freeze is \('blocks.0.\*',\) and None; expected one for all"):
        train_together([Member(build_model(form), task, spec), other])


def test_a_tensor_of_two_names_is_frozen_by_either() -> None:
    spec = ModelSpec(width=8, depth=1, heads=2, read_in="token", input_size=5, output_size=5, tied=True)
    model = build_model(spec)
    assert to_freeze(model, ["read_out.weight"]) == [model.read_in.weight]


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (["blocks.0.upp.*"], "'blocks.0.upp.*' matches no parameter; did you mean 'blocks.0.up"),
        (["blocks.1"], "'blocks.1' matches no parameter; did you mean 'blocks.1.*'?"),
        ("zzz", "'zzz' matches no parameter (such as read_in.weight, read_in.bias, blocks.0.up.weight)"),
        (["*"], "* freezes all parameters; leave some to be trained"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(freeze: Any, message: str) -> None:
    model = Tiny()
    with pytest.raises(InputError) as caught:
        train(model, Sums(), {"steps": 1, "freeze": freeze})
    assert message in str(caught.value)
    assert all(parameter.requires_grad for parameter in model.parameters())
