"""Lizard and LAWCAT: what is carried, what is trained when, and what is told."""

from __future__ import annotations

import pytest
import torch

from contextlab.convert import Linearize, build_conversion
from contextlab.convert.transfer import transfer
from contextlab.errors import InputError
from contextlab.tasks import build_task

from ..teachers import same, teacher

TASK = build_task("associative_recall", vocabulary=12, pairs=3, length=16)
NEW = {
    "lizard": {"feature.q_weight", "feature.k_weight", "decay_proj.weight", "meta", "alpha"},
    "lawcat": {
        "feature.q_weight", "feature.k_weight", "decay_in.weight", "decay_out.weight", "decay_out.bias", "conv.weight",
    },
}  # fmt: skip
ADAPTED = {"lizard": {"qkv_proj.weight"}, "lawcat": {"qkv_proj.weight", "out_proj.weight"}}


@torch.no_grad()
@pytest.mark.parametrize("name", NEW)
def test_what_attention_has_is_kept_but_for_its_positions(name):
    model = teacher(kv_heads=2, qk_norm=True, bias=True, output_gate=True)
    made = build_conversion(name)(model)
    for old, new, line in zip(model.blocks, made.model.blocks, made.lines, strict=True):
        theirs, ours = old.mixer.state_dict(), new.mixer.state_dict()
        assert all(torch.equal(each, ours[key]) for key, each in theirs.items())
        assert ours.keys() - theirs.keys() == NEW[name]
        assert line.did.endswith("; dropped positions (rope)")
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    whole = teacher(depth=1, position="none")
    near = build_conversion("lizard", window=20, meta_tokens=0)(whole)
    assert "dropped" not in near.lines[0].did
    mixer = near.model.blocks[0].mixer  # the window's part is the attention itself
    before = mixer(x)[0]
    mixer.alpha += 1
    torch.testing.assert_close(mixer(x)[0] - before, whole.blocks[0].mixer(x)[0], rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("conv", [0, 3])
def test_convolutions_start_as_the_teachers_or_pass_tokens_on(conv):
    model = teacher(depth=1, short_conv=conv)
    mixer = build_conversion("lawcat")(model).model.blocks[0].mixer
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    old = model.blocks[0].mixer
    found = (each._project_in(x, None, None, False)[:2] for each in (mixer, old))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    window = Linearize(mixer="sliding_window", mixer_options={"window": 20, "short_conv": 4})(model).model
    same(model, window)


@pytest.mark.parametrize("name", NEW)
def test_new_parts_learn_from_the_attention_and_adapters_from_the_task(name):
    pytest.importorskip("peft")
    model = teacher(depth=1).float()
    made = build_conversion(name)(model).model
    for stage, wanted in zip(build_conversion(name).stages, (NEW[name], ADAPTED[name]), strict=True):
        before = {key: each.clone() for key, each in made.state_dict().items()}
        transfer(model, made, [TASK], [stage], layers=[0], budget=2, train_spec={"batch": 4})
        moved = {key for key, each in made.state_dict().items() if not torch.equal(each, before[key])}
        assert moved == {f"blocks.0.mixer.{each}" for each in wanted}


def test_a_convolution_narrower_than_the_teachers_is_refused():
    with pytest.raises(InputError, match=r"^lawcat: short_conv 2 is narrower than the teacher's; use 3 or more$"):
        build_conversion("lawcat", short_conv=2).plan(teacher(short_conv=3).spec)
