"""Blocks dropped, merged, stacked, added: against loops written from the papers."""

from __future__ import annotations

import pytest
import torch

import contextlab.mixers  # noqa: F401  (registers every mixer)
from contextlab import build_model, registry
from contextlab.convert import build_conversion
from contextlab.convert.depth.blocks import influences
from contextlab.convert.depth.collapse import collapsed, likeness
from contextlab.convert.depth.drop import without
from contextlab.errors import InputError
from contextlab.testing.conversions import calibration, small_model, tokens

SIZES = {"width": 16, "heads": 2, "input_size": 12, "output_size": 12, "read_in": "token"}


def mixed(**options):
    model = (
        build_model({**SIZES, "depth": 5, "layers": ["attention", "gla"], "mlp_ratio": 1, **options}).double().eval()
    )
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            block.mlp.out_proj.weight.mul_([3, 1, 2, 0.1, 1][i])
    return model


def stream(model, x):
    """The vectors before and after each block, by hand."""
    found = [model.read_in(x)]
    for block in model.blocks:
        found.append(block(found[-1], None, None, False, found[0], x)[0])
    return found


def test_influence_is_one_minus_the_mean_cosine():
    model, data = mixed(), calibration()
    total = torch.zeros(5, dtype=torch.float64)
    for prompt, _ in data.batches:
        seen = stream(model, prompt.inputs)
        for i in range(5):
            total[i] += torch.cosine_similarity(seen[i], seen[i + 1], dim=-1).sum()
    expected = (1 - total / data.tokens).tolist()
    assert influences(model, data) == pytest.approx(expected)
    found = build_conversion("drop_blocks", count=2)(model, data)
    gone = sorted(sorted(range(5), key=expected.__getitem__)[:2])
    assert [line.layer for line in found.lines] == [f"blocks.{i}" for i in gone]
    assert [line.error for line in found.lines] == pytest.approx([expected[i] for i in gone])


def test_what_is_left_is_the_model_without_the_blocks():
    model, x = mixed(), tokens()
    made = without(model, [1, 3])
    y = model.read_in(x)
    embedded = y
    for i in (0, 2, 4):
        y, _ = model.blocks[i](y, None, None, False, embedded, x)
    torch.testing.assert_close(made(x), model.read_out(model.read_out_norm(y)))
    assert [layer.mixer for layer in made.spec.layers] == ["attention"]
    assert made.spec.depth == 3
    assert [layer.mixer for layer in without(model, [0]).spec.layers] == ["gla", "attention"]
    assert len(without(model, [4]).spec.layers) == 2, "the pattern stays"


def test_blocks_are_dropped_by_loss_one_after_the_other():
    model, data = mixed(), calibration()
    gone: list[int] = []
    errors = {}
    for _ in range(2):
        before = data.loss(without(model, gone))
        losses = {i: data.loss(without(model, [*gone, i])) for i in range(5) if i not in gone}
        best = min(losses, key=losses.get)
        gone.append(best)
        errors[f"blocks.{best}"] = losses[best] / before - 1
    found = build_conversion("drop_blocks", count=2, by="loss")(model, data)
    assert {line.layer: line.error for line in found.lines} == pytest.approx(errors)
    assert data.loss(found.model) == pytest.approx(min(losses.values()))


@pytest.mark.parametrize("by", ["influence", "loss"])
def test_none_may_be_dropped(by):
    model = mixed()
    conversion = build_conversion("drop_blocks", count=0, by=by)
    assert conversion.plan(model.spec) == model.spec
    found = conversion(model, calibration())
    assert found.lines == []
    assert torch.equal(found.model(tokens()), model(tokens()))
    assert found.model.spec == model.spec


def test_blocks_that_others_need_stay():
    layers = ["attention", {"mixer": "attention", "kv": "shared"}, "gla"]
    model = build_model({**SIZES, "depth": 3, "layers": layers}).double()
    with torch.no_grad():
        model.blocks[0].mixer.out_proj.weight.zero_()
        model.blocks[0].mlp.out_proj.weight.zero_()
    made = build_conversion("drop_blocks", count=2)(model, calibration()).model
    assert [layer.mixer for layer in made.spec.pattern()] == ["attention"]
    with pytest.raises(InputError, match="count: of 3 blocks at most 2 can go, got 3"):
        build_conversion("drop_blocks", count=3).plan(model.spec)


@pytest.mark.parametrize("options", [{"loops": 2}, {"layers": [{"mixer": "gla", "share": "a"}, "attention"]}])
def test_looped_and_shared_blocks_are_dropped_too(options):
    model = mixed(**options)
    for by in ("influence", "loss"):
        made = build_conversion("drop_blocks", by=by)(model, calibration()).model
        assert len(made.blocks) == 4
        assert made(tokens()).isfinite().all()


@pytest.mark.parametrize("what", ["mixer", "mlp"])
def test_the_sublayers_that_turn_the_stream_least_are_dropped(what):
    model, data = mixed(), calibration()
    total = torch.zeros(5, dtype=torch.float64)
    for prompt, _ in data.batches:
        x = model.read_in(prompt.inputs)
        for i, block in enumerate(model.blocks):
            mixed_in = x + block.mixer(block.mixer_norm(x))[0]
            after = mixed_in + block.mlp(block.mlp_norm(mixed_in))
            before, then = (x, mixed_in) if what == "mixer" else (mixed_in, after)
            total[i] += torch.cosine_similarity(before, then, dim=-1).sum()
            x = after
    turns = (1 - total / data.tokens).tolist()
    gone = sorted(sorted(range(5), key=turns.__getitem__)[:2])
    found = build_conversion("drop_sublayers", count=2, what=what)(model, data)
    assert [(line.layer, line.error) for line in found.lines] == [
        (f"blocks.{i}.{what}", pytest.approx(turns[i])) for i in gone
    ]
    y = model.read_in(tokens())
    for i, block in enumerate(model.blocks):
        y = y if what == "mixer" and i in gone else y + block.mixer(block.mixer_norm(y))[0]
        y = y if what == "mlp" and i in gone else y + block.mlp(block.mlp_norm(y))
    torch.testing.assert_close(found.model(tokens()), model.read_out(model.read_out_norm(y)))
    if what == "mixer":
        kept = sum(model.blocks[i].mixer.state_nbytes(9) for i in range(5) if i not in gone)
        assert found.model.state_nbytes(9) == kept, "its state goes with it"


def test_sublayers_that_cannot_go_are_told():
    build = build_conversion("drop_sublayers", count=3)
    layers = ["attention", {"mixer": "attention", "kv": "shared"}, {"mixer": "gla", "share": "a"}]
    for spec, message in (
        ({"layers": layers, "depth": 3}, "count: at most 1 of the 3 layers can lose theirs, got 3"),
        ({"block": "parallel"}, "block 'parallel' adds mixer and MLP at once"),
        ({"residual": "laurel"}, "residual 'laurel' changes the stream by itself"),
        ({"atoms": 2}, "projections made of atoms belong to all layers"),
    ):
        with pytest.raises(InputError, match=message):
            build.plan(build_model({**SIZES, "depth": 4, **spec}).spec)
    made = build_conversion("drop_sublayers")(build_model({**SIZES, "layers": layers, "depth": 3}), calibration())
    assert made.model.spec.pattern()[1].mixer == "none"


def test_merged_blocks_are_the_first_plus_all_differences():
    model, data = small_model(depth=4), calibration()
    states = [block.state_dict() for block in model.blocks]
    one = collapsed(list(model.blocks[1:4])).state_dict()
    for name, value in one.items():
        first, second, third = (states[i][name] for i in (1, 2, 3))
        torch.testing.assert_close(value, first + (second - first) + (third - first))
    found = build_conversion("merge_blocks")(model, data)
    choices = {}
    for at in (0, 1):
        other = without(model, [at + 1, at + 2])
        other.blocks[at] = collapsed(list(model.blocks[at : at + 3]))
        choices[at] = 1 - likeness(model, other, data), other
    at = min(choices, key=lambda each: choices[each][0])
    assert found.lines[0].error == pytest.approx(choices[at][0])
    assert found.lines[0].did == f"merged with blocks.{at + 1}, blocks.{at + 2}"
    torch.testing.assert_close(found.model(tokens()), choices[at][1](tokens()))
    with pytest.raises(InputError, match="times 2: the model, of 2 blocks by then, has at most 2 alike in"):
        build_conversion("merge_blocks", times=2).plan(model.spec)
    with pytest.raises(InputError, match="has at most 1 alike in a row; none can merge"):
        build_conversion("merge_blocks").plan(mixed().spec)


def test_a_stacked_model_reads_its_blocks_again():
    model, x = mixed(), tokens()
    made = build_conversion("stack", times=2)(model).model
    y = embedded = model.read_in(x)
    for block in [*model.blocks, *model.blocks]:
        y, _ = block(y, None, None, False, embedded, x)
    torch.testing.assert_close(made(x), model.read_out(model.read_out_norm(y)))
    with torch.no_grad():
        made.blocks[5].mlp.up.weight.zero_()
    assert made.blocks[0].mlp.up.weight.any(), "the copies have weights of their own"


OURS = [entry for entry in registry.entries("mixer") if entry.factory.__module__.startswith("contextlab.")]
EXPANDED = [e.name for family in {e.family: 0 for e in OURS} for e in [e for e in OURS if e.family == family][:2]]


def test_an_expanded_model_answers_exactly_as_before_whatever_its_mixer():
    refused = {}
    x = tokens(8)
    for name in EXPANDED:
        spec = {**SIZES, "width": 24, "depth": 1, "mlp_ratio": 1, "layers": [name], "position": "none"}
        try:
            model = build_model(spec).eval()
        except InputError:  # options that it requires
            refused[name] = "not built"
            continue
        try:
            made = build_conversion("expand")(model).model
        except InputError as error:
            refused[name] = str(error)
            continue
        assert len(made.blocks) == 2
        with torch.no_grad():
            assert torch.equal(made(x), model(x)), name
    assert len(EXPANDED) - len(refused) > 0.8 * len(EXPANDED), refused


def test_where_added_blocks_stand():
    made = build_conversion("expand", count=2)(small_model(depth=4))
    assert [line.layer for line in made.lines] == ["blocks.1", "blocks.3"]
    silent = [not block.mlp.out_proj.weight.any() for block in made.model.blocks]
    assert silent == [False, False, True, False, False, True]
    for spec, message in (
        ({"residual": "laurel"}, "residual 'laurel' changes the stream by itself"),
        ({"layers": [{"mixer": "gla", "share": "a"}]}, "layers that share weights or keys"),
        ({"depth": 1}, "count: at most one for each of the 1 blocks, got 2"),
    ):
        with pytest.raises(InputError, match=message):
            build_conversion("expand", count=2).plan(build_model({**SIZES, "depth": 2, **spec}).spec)
