"""LayerSkip: the loss and the dropped layers written from the paper's equations, and trainings that use them."""

from __future__ import annotations

import math

import pytest
import torch

from contextlab import build_model, build_task, train
from contextlab.convert import shrink
from contextlab.convert.heal import heal_with
from contextlab.convert.students import Watched
from contextlab.errors import InputError
from contextlab.models.within import Within
from contextlab.training import TrainSpec
from contextlab.training.ensemble import Member, train_together
from contextlab.training.layer_skip import LayerSkipSpec, Skips
from contextlab.training.step import loss_and_gradients

TASK = build_task("associative_recall", vocabulary=12, pairs=2, length=8)
SIZES = {"width": 8, "depth": 4, "heads": 2, "mlp_ratio": 1, "input_size": TASK.input_size,
         "output_size": TASK.output_size, "read_in": "token"}  # fmt: skip
QUICK = {"steps": 3, "batch": 4, "checkpoint_every": 0, "warmup": 1}


def prompts(batch=4):
    return TASK.sample(batch, torch.Generator().manual_seed(1))


def test_rates_and_weights_are_the_papers():
    skipping = LayerSkipSpec(dropout=0.2, scale=0.5)
    assert skipping.rates(4) == pytest.approx([0.2 * (2 ** (layer / 3) - 1) for layer in range(4)])
    rising = LayerSkipSpec(dropout=0.2, rising=True)
    assert rising.rates(4, 5, 11)[-1] == pytest.approx(0.2 * (math.sqrt(2) - 1))
    assert [rising.rates(4, step, 11)[-1] for step in (0, 10)] == pytest.approx([0, 0.2])
    e = [0, 0.5 * 1, 0.5 * (1 + 2), 3 + 0.5 * (1 + 2)]
    assert skipping.weights(4) == pytest.approx([each / sum(e) for each in e])
    turning = LayerSkipSpec(scale=0.5, rotate=2)
    assert turning.weights(4, 0) == pytest.approx([0, 0, e[2] / (e[2] + e[3]), e[3] / (e[2] + e[3])])
    assert turning.weights(4, 1) == pytest.approx([0, e[1] / (e[1] + e[3]), 0, e[3] / (e[1] + e[3])])
    assert LayerSkipSpec(scale=0).weights(3) == [0, 0, 1]
    assert LayerSkipSpec().weights(1) == [1]
    assert LayerSkipSpec().rates(1) == [0]


@pytest.mark.parametrize("parts", [1, 2])
def test_the_step_minimises_the_weighted_losses_of_layers_that_prompts_skip(parts):
    model = build_model(SIZES, seed=3).double().train()
    prompt, spec = prompts(), TrainSpec(batch=4, accumulate=parts, layer_skip={"dropout": 0.9, "scale": 1})
    skips = Skips.drawn(model.spec, spec, 4, 0, torch.Generator().manual_seed(0))
    assert not skips.dropped[0].any()
    assert skips.dropped.any()
    total = 0
    for row in range(4):
        x = embedded = model.read_in(prompt.inputs[row : row + 1])
        for layer, block in enumerate(model.blocks):
            if not skips.dropped[layer, row]:
                x, _ = block(x, None, None, False, embedded, None)
            logits = model.read_out(model.read_out_norm(x))
            scored = int(prompt.scored[row].sum()) / int(prompt.scored.sum())
            total = total + skips.weights[layer] * scored * TASK.loss(logits, prompt.rows(row, row + 1))
    params = dict(model.named_parameters())
    loss, gradients = loss_and_gradients(model, TASK, spec, params, prompt, skips)
    assert float(loss) == pytest.approx(float(total.detach()), rel=1e-6)
    expected = torch.autograd.grad(total, list(params.values()), allow_unused=True, materialize_grads=True)
    for name, gradient in zip(params, expected, strict=True):
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_trainings_are_those_of_their_seed_and_go_on_as_if_never_stopped(tmp_path):
    spec = {**QUICK, "layer_skip": {"dropout": 0.5}}
    models = [build_model(SIZES, seed=0) for _ in range(3)]
    train(models[0], TASK, spec, progress=False)
    train(models[1], TASK, spec, folder=tmp_path / "run", pause=2, progress=False)
    train(models[1], TASK, spec, folder=tmp_path / "run", resume=True, progress=False)
    train(models[2], TASK, QUICK, progress=False)
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


@torch.no_grad()
def test_early_answers_are_those_of_the_read_out():
    model, early, hidden = build_model(SIZES).eval(), {1: None}, []
    model(prompts().inputs, within=Within(early=early, hidden=hidden))
    assert torch.equal(early[1], model.read_out(model.read_out_norm(hidden[2])))


def test_a_shrunk_model_is_healed_so():
    assert heal_with("layer_skip:dropout=0.2,rotate=2") == {"layer_skip": {"dropout": 0.2, "rotate": 2}}
    model = build_model(SIZES)
    found = shrink(model, "exit_at:blocks=2", TASK, prompts=4, heal={"steps": 2, "batch": 4, "layer_skip": {}})
    assert found.healed.status == "finished"


def test_what_cannot_be_is_refused():
    for options, words in (({"dropout": 1}, "dropout"), ({"scale": 2}, "scale"), ({"rotate": 0}, "rotate")):
        with pytest.raises(InputError, match=f"layer_skip.{words}: "):
            TrainSpec.parse({"layer_skip": options}, "train")
    shared = {**SIZES, "layers": ["attention", {"mixer": "attention", "kv": "shared"}]}
    spec = {**QUICK, "layer_skip": {}}
    with pytest.raises(InputError, match="layer_skip: layers that read the keys of others need them"):
        train(build_model(shared), TASK, spec, progress=False)
    train(build_model(shared), TASK, {**spec, "steps": 1, "layer_skip": {"dropout": 0}}, progress=False)
    with pytest.raises(InputError, match="layer_skip: layers that read the keys of others need them"):
        shrink(build_model(shared), "magnitude", TASK, prompts=4, heal=spec)
    with pytest.raises(InputError, match="layer_skip: a model learns so from its task"):
        train(Watched(build_model(SIZES)), TASK, spec, progress=False)
    with pytest.raises(InputError, match="train_together: layer_skip"):
        train_together([Member(build_model(SIZES), TASK, spec), Member(build_model(SIZES, seed=1), TASK, spec)])
