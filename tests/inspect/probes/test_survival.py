"""What is forgotten when: decays and windows that are known, exactly."""

from __future__ import annotations

import math

import pytest
import torch

from contextlab import ModelSpec, build_model, registry
from contextlab.inspect import Subject, parse_probe
from contextlab.inspect.looking import look
from contextlab.inspect.probe import by, records
from contextlab.inspect.probes.survival import CHANGE, HALF, LEFT, LOG, OF_HEAD, crossing, doubling
from contextlab.tasks import AssociativeRecall
from contextlab.testing.readings import noisy

TASK = AssociativeRecall(vocabulary=16, pairs=6, length=64)
FAMILIES = {entry.family: entry for entry in registry.entries("mixer")}
SIZES = {"width": 24, "heads": 2, "mlp_ratio": 2, "read_in": "token", "input_size": 16, "output_size": 16}


def model_of(mixer, options=None, **keys):
    layers = [{"mixer": mixer, "options": options or {}}]
    return noisy(build_model(ModelSpec.parse({"depth": 1, **SIZES, "layers": layers, **keys}), seed=0)).eval()


def curve(table, measure, site="blocks.0.mixer.state"):
    own = table[(table["measure"] == measure) & ((table["site"] == site) | table["site"].isna())]
    return own.set_index("place")["value"].to_dict()


def measured(model, task=TASK, options="prompts=6,writes=2"):
    return parse_probe(f"survival:{options}").measure(Subject(model, task))


def test_a_known_decay_leaves_its_powers():
    model = model_of("retention", {"heads": 1}, depth=2).double()  # in the second layer, too, whatever the first reads
    table = measured(model)
    gamma = model.blocks[0].mixer.decay.exp().item()  # a float32, made double
    assert gamma == pytest.approx(1 - 2.0**-5, rel=1e-6)
    for layer in (0, 1):
        left = curve(table, LEFT, f"blocks.{layer}.mixer.state")
        assert list(left)[:5] == [0, 1, 2, 4, 8]
        assert max(left) >= 42
        for distance, value in left.items():
            assert value == pytest.approx(gamma**distance, rel=1e-12)
    half = table[(table["measure"] == HALF)]
    assert half["value"].tolist() == pytest.approx([math.log(2) / -math.log(gamma)] * 2)
    assert (half["ci_high"] - half["ci_low"]).max() < 1e-6


def test_each_head_has_its_own_half_life():
    table = measured(model_of("lightning_attention", {"heads": 4}).double())
    lives = table[table["measure"] == OF_HEAD].set_index("head")["value"]
    rates = [2.0 ** (-8 * (head + 1) / 4) for head in range(4)]  # exp(-2^(-8h/H))
    assert sorted(lives.index) == [0, 1]  # the others keep more than half of it all along
    for head, life in lives.items():
        assert life == pytest.approx(math.log(2) / rates[head])


def test_a_window_keeps_all_and_then_nothing():
    for window, mixer in ((6, "sliding_window"), (6, "sigmoid_window")):
        table = measured(model_of(mixer, {"window": window}).double())
        left = curve(table, LEFT)
        assert all(value == float(distance < window - 1) for distance, value in left.items())
        change = curve(table, CHANGE)
        assert all((value > 1e-9) == (distance < window) for distance, value in change.items() if distance)


def test_keys_and_values_are_kept_and_a_token_of_noise_is_forgotten_at_once():
    table = measured(model_of("attention", {"short_conv": 0}))
    assert set(curve(table, LEFT).values()) == {1.0}
    assert HALF not in set(table["measure"])
    forgets = model_of("token_shift")
    assert curve(measured(forgets), LEFT)[8] == 0


def test_what_is_asked_for_is_told_by_distance():
    model = model_of("attention", depth=2)
    found = by(records(measured(model, options="prompts=40")), "measure")
    assert {row["place"] for row in found["accuracy"]} <= {1, 2, 4, 8, 16, 32}
    assert all(row["value"] < 0 and row["control"] < 0 for row in found[LOG])
    assert all(0 <= row["ci_low"] <= row["value"] <= row["ci_high"] <= 1 for row in found["accuracy"])


def test_a_pair_is_swapped_as_one():
    table = measured(model_of("retention", {"heads": 1}).double(), options="prompts=6,writes=1,tokens=2")
    gamma = 1 - 2.0**-5
    assert curve(table, LEFT)[16] == pytest.approx(gamma**16)


@pytest.mark.parametrize("entry", FAMILIES.values(), ids=lambda entry: entry.name)
def test_every_family_is_measured(entry):
    model = model_of(entry.name, dict(entry.cases[-1]))
    task = AssociativeRecall(vocabulary=16, pairs=4, length=24)
    found = by(records(look(model, task, "survival:prompts=4,writes=1").table), "measure")
    assert all(0 <= row["value"] <= 1 for row in found[CHANGE])
    assert (LEFT in found) == model.blocks[0].mixer.causal
    for row in found.get(LEFT, []):
        assert 0 <= row["value"] <= 1 + 1e-6


def test_where_a_curve_falls_to_a_half():
    places = doubling(20)
    assert places == [0, 1, 2, 4, 8, 16, 19]
    steps = torch.tensor(places).double()
    curves = torch.stack(
        [0.9**steps, torch.ones(7).double(), (steps < 4).double(), torch.where(steps < 2, 0.1, 0.9**steps)]
    )
    found = crossing(places, curves)
    life = math.log(2) / -math.log(0.9)
    assert found.tolist() == pytest.approx([life, math.inf, 3.0, life])
