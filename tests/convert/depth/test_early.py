"""Models that answer before their last block: what is left of them, and what is told."""

from __future__ import annotations

import pytest
import torch

from contextlab import build_model
from contextlab.convert import Calibration, build_conversion
from contextlab.convert.depth.early import THRESHOLDS
from contextlab.errors import InputError
from contextlab.models.stack import Within
from contextlab.prompt import Prompt
from contextlab.testing.conversions import calibration, small_model, tokens
from tests.convert.depth.test_risk import naive

SIZES = {"width": 16, "heads": 2, "input_size": 12, "output_size": 12, "read_in": "token", "depth": 4}


@torch.no_grad()
def test_the_read_out_answers_after_the_first_blocks():
    model, x, hidden = small_model(depth=4), tokens(), []
    model(x, within=Within(hidden=hidden))
    made = build_conversion("exit_at")(model)
    torch.testing.assert_close(made.model(x), model.read_out(model.read_out_norm(hidden[2])))
    assert [line.layer for line in made.lines] == ["blocks.2", "blocks.3"]
    with pytest.raises(InputError, match="blocks: the model has 4, got 5"):
        build_conversion("exit_at", blocks=5).plan(model.spec)


@torch.no_grad()
def test_the_line_tells_layers_and_answers_that_changed():
    model, data = small_model(depth=4), calibration()
    made = build_conversion("calm", threshold=0.1)(model, data)
    layers = differ = count = 0
    for prompt, _ in data.batches:
        used = []
        early = made.model(prompt.inputs, within=Within(used=used))
        layers, count = layers + int(used[0].sum()), count + used[0].numel()
        differ += int((early.argmax(-1) != model(prompt.inputs).argmax(-1)).sum())
    (line,) = made.lines
    assert line.did == f"a token goes through {layers / count:.2f} of 4 layers"
    assert count < layers < 4 * count
    assert line.error == pytest.approx(differ / count)
    assert line.error > 0
    assert model.spec.exit is None


@torch.no_grad()
def test_answers_of_vectors_are_compared_by_size():
    model = build_model({**SIZES, "read_in": "vector", "input_size": 5, "output_size": 2}).double().eval()
    x, y = torch.randn(2, 9, 5, dtype=torch.float64), torch.randn(2, 9, 2, dtype=torch.float64)
    scored = torch.arange(9).expand(2, 9) > 4
    prompt = Prompt(x, y, scored, torch.zeros(2, 9, dtype=torch.int64))
    data = Calibration(((prompt, lambda answers, prompt: answers.square().mean()),))
    made = build_conversion("calm", by="saturation", threshold=0.3)(model, data)
    whole, early = model(x)[scored], made.model(x)[scored]
    assert made.lines[0].error == pytest.approx(float((early - whole).norm() / whole.norm()))
    assert made.lines[0].error > 0
    with pytest.raises(InputError, match=r"exit\.by: the predictions of a model that reads vectors"):
        build_conversion("calm").plan(model.spec)


@torch.no_grad()
def test_with_a_risk_the_threshold_is_the_lowest_that_passes_the_test():
    model, task = small_model(depth=4), Calibration.of_tokens(torch.randint(12, (96, 6)), batch=50)
    made = build_conversion("calm", risk=0.2, confidence=0.9)(model, task)
    whole = [model(p.inputs).argmax(-1) for p, _ in task.batches]
    best, risk, early = 1.0, 0.0, small_model(depth=4)
    for threshold in THRESHOLDS["softmax"]:
        early.spec = build_conversion("calm", threshold=threshold).plan(model.spec)
        each = [
            (early(p.inputs).argmax(-1) != y).double().mean(1) for (p, _), y in zip(task.batches, whole, strict=True)
        ]
        mean = float(torch.cat(each).mean())
        if naive(mean, 96, 0.2) > 1 - 0.9:
            break
        best, risk = threshold, mean
    assert made.model.spec.exit.threshold == best
    assert 0 < best < 0.99
    (line,) = made.lines
    assert f"; threshold {best:g}, the lowest that is sure to change at most 0.2 of a prompt's answers" in line.did
    assert f"with confidence 0.9 ({risk:.3g} of 96 prompts, p " in line.did
    assert line.error == pytest.approx(risk)


def test_where_nothing_is_sure_no_token_leaves_and_few_prompts_are_refused():
    model, data = small_model(depth=4), Calibration.of_tokens(torch.randint(12, (90, 9)))
    with torch.no_grad():
        model.read_out.weight.mul_(1000)  # sure of everything after any layer
    made = build_conversion("calm", risk=0.03, confidence=0.9)(model, data)
    assert made.model.spec.exit.threshold == 1
    assert "; threshold 1, as none below it is sure to change at most 0.03" in made.lines[0].did
    with pytest.raises(InputError, match=r"risk: 0.02 at confidence 0.9 takes 114 prompts at least.*\(--prompts 114\)"):
        build_conversion("calm", risk=0.02, confidence=0.9)(model, data)
    for options, words in (
        ({"risk": 0.1, "threshold": 0.9}, "threshold: with risk the data set it"),
        ({"confidence": 0.9}, "confidence: of which bound"),
    ):
        with pytest.raises(InputError, match=words):
            build_conversion("calm", **options).plan(model.spec)
    with pytest.raises(InputError, match="risk: bounds the share of other answers"):
        build_conversion("calm", by="saturation", risk=0.1).plan(build_model({**SIZES, "read_in": "vector"}).spec)
