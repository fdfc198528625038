"""What of attention goes where in other mixers, and what is refused."""

from __future__ import annotations

import pytest
import torch

from contextlab.convert import Calibration, Linearize, build_conversion
from contextlab.convert.linearize.carry import TARGETS
from contextlab.convert.mixing import output_errors
from contextlab.errors import InputError
from contextlab.models import ModelSpec
from contextlab.testing.models import noisy

from ..teachers import SYMBOLS, teacher, tokens


@torch.no_grad()
@pytest.mark.parametrize("conv", [0, 3])
@pytest.mark.parametrize("name", TARGETS)
def test_queries_keys_and_values_are_the_teachers(name, conv):
    """Also of grouped heads and behind a short convolution: what the new mixer projects is what the old one does."""
    model = teacher(kv_heads=2, short_conv=conv)
    made = Linearize(mixer=name)(model).model
    old, new = model.blocks[1].mixer, made.blocks[1].mixer
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    takes = getattr(new, "conv", None) is not None
    qkv = old.qkv_proj(x)
    if takes and conv:
        qkv = old.conv(qkv, None, False)[0]
    q, k, v = qkv.split((16, 8, 8), -1)
    k, v = (part.unflatten(-1, (2, 4)).repeat_interleave(2, 2).flatten(2) for part in (k, v))
    got = new.in_proj(x)[..., TARGETS[name].after * 16 :][..., :48]
    if takes:
        taps = new.conv.weight.shape[1]
        padded = torch.nn.functional.pad(got, (0, 0, taps - 1, 0)).unfold(1, taps, 1)
        got = (padded * new.conv.weight[:48]).sum(-1)
    parts = dict(zip(TARGETS[name].order, got.split(16, -1), strict=True))
    for part, expected in (("q", q), ("k", k), ("v", v)):
        torch.testing.assert_close(parts[part], expected)
    assert torch.equal(new.out_proj.weight, old.out_proj.weight)


@torch.no_grad()
def test_linear_attention_with_no_feature_map_is_attention_without_its_softmax():
    model = teacher(depth=1, position="none")
    options = {"feature_map": "identity", "normalise": False}
    made = Linearize(mixer="linear_attention", mixer_options=options)(model).model
    old, x = model.blocks[0].mixer, torch.randn(2, 7, 16, dtype=torch.float64)
    q, k, v = old.qkv_proj(x).unflatten(-1, (3, 4, 4)).unbind(2)
    scores = torch.einsum("bthd,bshd->bhts", q, k).tril() / 2
    expected = old.out_proj(torch.einsum("bhts,bshd->bthd", scores, v).flatten(2))
    torch.testing.assert_close(made.blocks[0].mixer(x)[0], expected)


@torch.no_grad()
def test_a_window_takes_all_of_attention():
    model = teacher(qk_norm=True, bias=True)
    made = Linearize(mixer="sliding_window", mixer_options={"window": 20})(model).model
    torch.testing.assert_close(made(tokens()), model(tokens()))


@torch.no_grad()
def test_liger_has_no_weight_of_its_own():
    model = teacher(kv_heads=2, qk_norm=True, bias=True, output_gate=True)
    made = build_conversion("liger", window=4, gate_rank=4)(model)
    theirs, ours = (each.state_dict() for each in (model, made.model))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(each, ours[name]) for name, each in theirs.items())
    assert all("new" not in line.did and "dropped" not in line.did for line in made.lines)


def test_output_projections_are_fitted_where_there_are_data():
    model = teacher()
    seen, unseen = (Calibration.of_tokens(tokens(25, batch=32, seed=seed)) for seed in (1, 2))
    method = Linearize(mixer="gated_delta_net")
    drawn, fitted = method(model), method(model, seen)
    before, after = (output_errors(model, each.model, [0, 1], unseen) for each in (drawn, fitted))
    assert all(after[i] < 0.8 * before[i] for i in (0, 1))
    weights = drawn.model.state_dict()
    differs = {name for name, each in fitted.model.state_dict().items() if not torch.equal(each, weights[name])}
    assert differs == {f"blocks.{i}.mixer.out_proj.weight" for i in (0, 1)}


def test_half_leaves_the_last_of_each_two():
    made = Linearize(mixer="gla", layers="half").plan(teacher(depth=5).spec)
    assert [layer.mixer for layer in made.pattern()] == ["gla", "attention"] * 2 + ["gla"]
    assert len(made.layers) == 2


def test_what_is_left_behind_is_told():
    model = teacher(qk_norm=True, bias=True, output_gate=True, short_conv=3)
    (line, _) = Linearize(mixer="rwkv7")(model).lines
    assert line.did.endswith("dropped positions (rope), biases, qk_norm, output_gate, short_conv")
    assert line.of == "outputs of random inputs"


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {"mixer": "linformer"}, "'linformer' reads both ways"),
        ({}, {"mixer": "gru"}, "'gru' cannot take the weights of attention"),
        ({}, {"mixer": "gated_delta_nett"}, "did you mean 'gated_delta_net'?"),
        ({}, {"mixer_options": {"head_dim": 8}}, "gated_delta_net: 4 heads with keys of 8 and values of 8 cannot take"),
        ({"head_dim": 8}, {"mixer": "gla"}, "gla: its heads fill the width 16, the teacher's 4 heads of 8 are 32 wide"),
        ({"short_conv": 3}, {"mixer_options": {"short_conv": 2}}, "short_conv 2 is narrower than the teacher's; use 3"),
        ({}, {"layers": [5]}, "layers: 5 is out of range; the model has layers 0 to 1"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(given, options, message):
    with pytest.raises(InputError) as error:
        Linearize(**options).plan(teacher(**given).spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loops": 2}, "layers: the model is looped (loops 2)"),
        ({"atoms": 2}, "layers: the model shares the atoms"),
        ({"pool": "mean"}, "layers: the model pools or reads both ways"),
        ({"layers": ["mamba2", "gla"]}, "layers: layer 0 is 'mamba2', not 'attention' or 'sliding_window'; no layer"),
        ({"layers": ["attention", {"mixer": "attention", "kv": "shared"}]}, "shares its keys and values with another"),
        ({"layers": [{"mixer": "attention", "share": "a"}]}, "layer 0 is used several times"),
    ],
)
def test_models_that_cannot_be_converted_are_refused(changes, message):
    spec = {"width": 16, "depth": 2, "read_in": "token", "input_size": SYMBOLS, "output_size": SYMBOLS, **changes}
    with pytest.raises(InputError) as error:
        Linearize().plan(ModelSpec.parse(spec))
    assert message in str(error.value)


def test_the_gate_rank_divides_the_keys():
    with pytest.raises(InputError, match="gate_rank 5 does not divide the keys' 16 channels; the nearest is 4"):
        build_conversion("liger", gate_rank=5)(noisy(teacher().spec))
