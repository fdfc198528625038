"""The probe of groups of heads: it finds the copies that were made, and none where none were."""

from __future__ import annotations

import torch

from contextlab import build_model, build_task
from contextlab.inspect import look
from contextlab.models import preset

TASK = build_task("associative_recall", pairs=3, length=16, vocabulary=16)


def table_of(name, change, heads=4):
    """Of a model whose queries and keys are large enough to look somewhere."""
    model = build_model(preset(name, width=32, depth=2, heads=heads).for_task(TASK))
    with torch.no_grad():
        for block in model.blocks:
            change(block.mixer)
    found = look(model, TASK, ["head_groups:prompts=8"])
    return found.words, found.table.set_index(["measure", "site", "what"])


def sharpen(mixer):
    mixer.qkv_proj.weight[:64] *= 4


def copy(mixer):
    sharpen(mixer)
    for part in (0, 32):  # queries, keys: of width 8 a head
        mixer.qkv_proj.weight[part + 24 : part + 32] = mixer.qkv_proj.weight[part : part + 8]


def test_copies_are_found_and_others_are_not():
    words, table = table_of("transformer", copy)
    for layer in range(2):
        row = table.loc["heads that look different", f"blocks.{layer}.mixer", "different"]
        assert (row["value"], row["ci_low"], row["ci_high"]) == (3, 3, 3)
        assert table.loc["heads", f"blocks.{layer}.mixer", "all"]["value"] == 4
        assert table.loc["correlation in a group", f"blocks.{layer}.mixer", "0+3"]["value"] > 0.999
    assert words[0].startswith("6 of 8 heads look different")
    assert words[1].startswith("Heads 0.0 and 0.3 look alike (correlation 1.00 [1.00, 1.00], control")
    words, table = table_of("transformer", sharpen)
    assert words == [words[0]]
    assert words[0].startswith("8 of 8 heads look different")


def test_other_mixers_are_asked_too():
    words, table = table_of("gated_delta_net", lambda mixer: None, heads=2)
    assert words[0].startswith("4 of 4 heads look different")
    assert table.loc["correlation", "blocks.0.mixer", "mean of pairs"]["value"] < 0.9


def test_one_head_has_no_group():
    model = build_model(preset("transformer", width=16, depth=1, heads=1).for_task(TASK))
    found = look(model, TASK, ["heads:prompts=2", "head_groups:prompts=2"], skip=True)
    assert "two heads or more" in found.left_out[0].why
