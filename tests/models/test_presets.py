"""Presets: rows of data that become functions with options, documentation and a ModelSpec."""

from __future__ import annotations

import inspect

import pytest

from contextlab import registry
from contextlab.errors import InputError
from contextlab.models import ModelSpec, preset, presets
from contextlab.models.presets import PRESETS, Option, Preset


def test_every_row_is_registered_under_its_name_and_family():
    ours = [e for e in registry.entries("model") if e.factory.__module__.startswith("contextlab.models.")]
    assert {row.name: (row.family, row.papers) for row in PRESETS} == {e.name: (e.family, e.papers) for e in ours}
    assert len({row.name for row in PRESETS}) == len(PRESETS)


@pytest.mark.parametrize("row", PRESETS, ids=lambda row: row.name)
def test_every_option_is_told_and_changes_the_spec(row):
    entry = registry.lookup("model", row.name)
    assert [(p.name, p.default, p.help) for p in entry.parameters] == [
        (name, option.default, option.help) for name, option in row.options.items()
    ]
    assert entry.doc.startswith(row.doc[:60])
    first = entry.build()
    for p in entry.parameters:
        schema = entry.options_model.model_json_schema()["properties"][p.name]
        others = [v for v in schema.get("enum", [1, 2, 3, 8, 16, False]) if v != p.default]
        assert any(_built(entry, **{p.name: value}) not in (first, None) for value in others), p.name


def _built(entry, **options):
    try:
        return entry.build(**options)
    except InputError:
        return None


@pytest.mark.parametrize(
    ("name", "options", "fields"),
    [
        ("llama3", {"size": "8b"}, {"width": 4096, "depth": 32, "heads": 32, "mlp_ratio": 14336 * 1.5 / 4096}),
        ("qwen3", {"size": "0.6b"}, {"width": 1024, "tied": True, "read_in": "token"}),
        ("mamba", {"width": 32}, {"width": 32, "heads": 1, "position": "none"}),
        ("moeut", {"group": 3, "loops": 5}, {"depth": 3, "loops": 5, "input_injection": False}),
        ("simplified_transformer", {"parallel": False}, {"block": "sequential", "residual": "none"}),
        ("ngram_transformer", {"largest": 3}, {"depth": 5}),
    ],
)
def test_fields(name, options, fields):
    spec = preset(name, **options).model_dump()
    assert {key: spec[key] for key in fields} == fields


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        ("yoco", {"depth": 5}, ["sliding_window"] * 2 + ["attention", "attention shared", "attention shared"]),
        ("zamba", {"every": 2, "depth": 4}, ["mamba", "mamba", "attention", "mamba"]),
        ("zebra", {"group": 2, "local": "blocks", "depth": 3}, ["attention", "block_local", "attention"]),
        ("cross_layer_attention", {"sharing": 3}, ["attention", "attention shared", "attention shared", "attention"]),
        ("griffin", {"depth": 3}, ["rg_lru", "rg_lru", "sliding_window"]),
        ("jamba", {}, ["mamba"] * 4 + ["attention"] + ["mamba"] * 3),
        ("moba", {"depth": 3}, ["moba", "moba", "attention"]),
        ("titans", {"memory": "layer", "depth": 2}, ["titans", "sliding_window"]),
        ("ttt", {"inner": "mlp", "depth": 1}, ["ttt_mlp"]),
        ("segment_memory", {"memory": "sentinel", "depth": 1}, ["sentinel"]),
        ("sse_hybrid", {"every": 2}, ["sse", "attention"] * 2),
    ],
)
def test_layers(name, options, layers):
    found = preset(name, **options).pattern()
    assert [layer.mixer + (" shared" if layer.kv == "shared" else "") for layer in found] == layers


def test_options_reach_the_mixers():
    assert preset("samba", window=7).layers[1].options == {"window": 7}
    assert [layer.options["lower_bound"] for layer in preset("hgrn2", depth=4).layers] == [0, 0.25, 0.5, 0.75]
    assert preset("transformer").layers[0].options == {}
    assert preset("transformer", short_conv=3).layers[0].options == {"short_conv": 3}


def test_a_preset_is_a_function_of_its_options():
    assert presets.mamba(32, depth=2) == preset("mamba", width=32, depth=2)
    assert list(inspect.signature(presets.mamba).parameters) == ["width", "depth", "state_size", "short_conv"]
    with pytest.raises(TypeError, match="widht"):
        presets.mamba(widht=32)
    with pytest.raises(AttributeError, match="no attribute 'mambo'"):
        presets.mambo  # noqa: B018


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mambaformer", {"heads": 3}, "width 64 is not divisible by 3 heads; the nearest that divides it is 2"),
        ("cross_layer_attention", {"sharing": 2**31 - 1}, "sharing: a model has at most 10000 layers, got 2147483647"),
        ("zamba", {"every": 2**31 - 1}, "every: a model has at most 10000 layers, got 2147483647"),
    ],
)
def test_what_does_not_fit_is_one_line(name, options, message):
    with pytest.raises(InputError) as caught:
        preset(name, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_row_of_ones_own():
    row = Preset(
        "mine",
        "softmax",
        (),
        "Mine.\n\nMore of it.",
        {"size": Option("of it.", 2)},
        {"layers": [{"mixer": "lstm"}], "width": "$size"},
    )
    build = row.function()
    assert build(3) == ModelSpec(layers=["lstm"], width=3)
    assert build.__doc__ == "Mine.\n\nMore of it.\n\nsize: of it."
