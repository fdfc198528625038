"""LoLCATs and SUPRA: what is exact, what is trained when, and that adapters are merged."""

from __future__ import annotations

import pytest
import torch

from contextlab.convert import Distil, Stage, build_conversion
from contextlab.convert.linearize.kept_rotary import Lolcats
from contextlab.convert.transfer import transfer
from contextlab.errors import InputError
from contextlab.tasks import build_task
from contextlab.training.adapters import Adapters
from contextlab.training.spec import LoraSpec

from ..teachers import same, teacher, tokens

TASK = build_task("associative_recall", vocabulary=12, pairs=3, length=16)


@pytest.mark.parametrize(
    ("depth", "options"),
    [
        (2, {}),
        (1, {"kv_heads": 2, "qk_norm": True, "bias": True, "output_gate": True, "rope_fraction": 0.5}),
        (1, {"short_conv": 3, "rope_base": 500.0}),
    ],
)
def test_lolcats_answers_as_before_within_the_window(depth, options):
    model = teacher(depth=depth, **options)
    made = build_conversion("lolcats", window=20)(model)
    same(model, made.model)
    for line in made.lines:
        assert "dropped" not in line.did
    assert all(layer.mixer == "window_linear" for layer in made.model.spec.pattern())


def test_lolcats_without_positions():
    model = teacher(depth=1, position="none")
    same(model, build_conversion("lolcats", window=20)(model).model)


def test_supra_keeps_rotary_positions():
    model = teacher(depth=1, rope_base=300.0, rope_fraction=0.5)
    made = build_conversion("supra")(model)
    mixer = made.model.blocks[0].mixer
    assert (mixer.rotary, mixer.rope_base) == (2, 300.0)
    assert "positions" not in made.lines[0].did
    torch.testing.assert_close(mixer.in_proj.weight, model.blocks[0].mixer.qkv_proj.weight)


def test_lolcats_first_learns_its_maps_and_shares_then_adapters_that_are_merged(monkeypatch):
    pytest.importorskip("peft")
    model = teacher(depth=2).float()
    made = Lolcats(window=4)(model).model
    before = {name: each.clone() for name, each in made.state_dict().items()}
    first, second = Lolcats.stages
    transfer(model, made, [TASK], [first], layers=[0, 1], budget=2, train_spec={"batch": 4})
    moved = {name for name, each in made.state_dict().items() if not torch.equal(each, before[name])}
    assert moved == {
        f"blocks.{i}.mixer.{name}" for i in (0, 1) for name in ("feature.q_weight", "feature.k_weight", "share")
    }
    before = {name: each.clone() for name, each in made.state_dict().items()}
    answers = []
    leave = Adapters.leave

    def seen(adapters):
        with torch.no_grad():
            answers.append(made.eval()(tokens()))
        leave(adapters)

    monkeypatch.setattr(Adapters, "leave", seen)
    transfer(model, made, [TASK], [second], layers=[0, 1], budget=3, train_spec={"batch": 4})
    moved = {name for name, each in made.state_dict().items() if not torch.equal(each, before[name])}
    assert moved == {f"blocks.{i}.mixer.{name}.weight" for i in (0, 1) for name in ("qkv_proj", "out_proj")}
    with torch.no_grad():  # merged, it answers as with its adapters
        torch.testing.assert_close(made(tokens()), answers[0], rtol=0, atol=1e-6)
    change = made.blocks[0].mixer.qkv_proj.weight - before["blocks.0.mixer.qkv_proj.weight"]
    assert int(torch.linalg.matrix_rank(change.detach().double(), rtol=1e-4)) <= 8
    assert all(parameter.requires_grad for parameter in made.parameters())


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage("a", Distil(attention=1.0), trains="new", only=("features.*",)), "'features.*' names no parameter of"),
        (Stage("a", Distil(task=1.0), trains="lora", lora=LoraSpec(targets=("*.gone",))), "'*.gone' matches no linear"),
        (Stage("a", Distil(task=1.0), trains="lora", lora=LoraSpec(rank=99)), "rank: 99 is more than any matrix"),
    ],
)
def test_patterns_that_name_nothing_are_refused_before_anything_is_trained(stage, message):
    pytest.importorskip("peft")
    model = teacher(depth=1)
    made = build_conversion("lolcats", window=4)(model).model
    with pytest.raises(InputError) as error:
        transfer(model, made, [TASK], [Stage("b", Distil(logits=1.0)), stage], layers=[0], budget=4)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_other_positions_are_refused_in_one_line():
    with pytest.raises(InputError, match=r"^lolcats: layer 0 has the positions 'alibi'; expected rope or none$"):
        build_conversion("lolcats").plan(teacher(depth=1, position="alibi").spec)
