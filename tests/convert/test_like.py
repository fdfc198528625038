"""Layers as another model has them."""

from __future__ import annotations

import pytest

from contextlab.convert import build_conversion, convert
from contextlab.convert.like import LikeModel
from contextlab.errors import InputError
from contextlab.models import ModelSpec
from contextlab.tasks import build_task

from .teachers import same, teacher

TASK = build_task("associative_recall", vocabulary=12, pairs=3, length=16)


def like(*layers, **more):
    """As a model of other width and heads has them."""
    spec = {"width": 24, "depth": len(layers), "heads": 2, "layers": list(layers)}
    return LikeModel(target=ModelSpec.parse(spec), **more)


def layer(mixer, **options):
    return {"mixer": mixer, "options": options}


def test_layers_become_what_stands_at_their_place():
    model = teacher(depth=4)
    wanted = ("attention", layer("gated_delta_net", short_conv=2, heads=2), layer("attention", kv_heads=2), "gla")
    found = convert(model, like(*wanted), TASK, budget=2, prompts=2, train={"batch": 2})
    pattern = found.model.spec.pattern()
    assert [each.mixer for each in pattern] == ["attention", "gated_delta_net", "attention", "gla"]
    assert (pattern[1].options["short_conv"], pattern[1].options["heads"], pattern[2].options["kv_heads"]) == (2, 4, 2)
    assert (found.layers, [stage.name for stage in found.stages]) == ([1, 2, 3], ["attention", "logits"])
    assert found.record()["options"]["mixers"] == [each.mixer for each in pattern]


def test_it_is_the_conversions_by_name_each_alone():
    model = teacher()
    made = like(layer("sliding_window", window=5, sinks=1), layer("mla", rank=6))(model).model
    window = build_conversion("window", window=5, sinks=1, layers=[0])(model).model
    latent = build_conversion("mla", rank=6, layers=[1])(model).model
    for i, other in enumerate((window, latent)):
        ours, theirs = (each.blocks[i].mixer.state_dict() for each in (made, other))
        assert all(ours[name].equal(theirs[name]) for name in ours)
        assert made.spec.pattern()[i] == other.spec.pattern()[i]
    assert not like(layer("sliding_window", window=5), "attention").needs


def test_a_window_longer_than_the_text_is_exact_and_layers_are_chosen():
    model = teacher(depth=3)
    made = like(*[layer("sliding_window", window=64)] * 3, layers="0,2")(model).model
    assert [each.mixer for each in made.spec.pattern()] == ["sliding_window", "attention", "sliding_window"]
    same(model, made, 1e-12)
    found = convert(model, like(*["gla"] * 3), TASK, layers="auto:1", budget=0, prompts=2)
    assert sum(each.mixer == "gla" for each in found.model.spec.pattern()) == 1


@pytest.mark.parametrize("option", [{"kv_heads": 1}, {"dilation": 2}])
def test_a_window_that_would_be_another_is_refused(option):
    with pytest.raises(InputError, match=f"window of layer 0 has {next(iter(option))} .* in the other model"):
        like(layer("sliding_window", window=5, **option), "attention").plan(teacher().spec)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["gla"] * 3, "to: the other model has 3 layers, this one 2"),
        (["attention"] * 2, "to: the layers are those of the other model already"),
        (["s4d", "attention"], "'s4d' cannot take the weights of attention"),
        ([layer("attention", kv_heads=1), layer("gla", expand_v=3)], "expand_v"),
        (["none", "attention"], "to: layer 0 of the other model has no mixer or no keys of its own"),
    ],
)
def test_what_cannot_take_the_weights_is_told_in_one_line(layers, message):
    with pytest.raises(InputError) as error:
        like(*layers)(teacher())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_other_layers_than_attention_stay_or_are_refused():
    with pytest.raises(InputError, match="layer 0 is 'gla' and would have to become 'kda'; only attention can"):
        like("kda", "kda")(convert(teacher(), "gla", layers=[0], budget=0).model)
