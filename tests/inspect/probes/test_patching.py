"""Patching names the heads of a mechanism that is written down, and nothing where there is none."""

from __future__ import annotations

import pytest
import torch

from contextlab import build_model, build_task, capture, patch
from contextlab.inspect import Subject, look, only, patch_effects
from contextlab.inspect.causal import patch_scores
from contextlab.inspect.looking import over_seeds
from contextlab.inspect.pairs import pairs_of
from contextlab.inspect.probe import parse_probe, records
from contextlab.models import preset

V, T = 8, 12


@pytest.fixture(scope="module")
def task():
    return build_task("induction_head", vocabulary=V, length=T, trigger="any")


@pytest.fixture(scope="module")
def written():
    return build_model("induction_construction", vocabulary=V, length=T).double().eval()


def fresh(task, name="transformer", **options):
    return build_model(preset(name, width=16, depth=2, heads=2, **options).for_task(task)).double().eval()


def test_both_heads_of_induction_carry_the_whole_answer(written, task):
    found = look(written, task, "patching:prompts=16")
    parts = found.table[found.table["measure"] == "share of the effect"]
    assert parts["value"].tolist() == pytest.approx([1, 1], abs=1e-6)
    assert (parts["control"] < 0.7).all()
    assert found.words[0].startswith("Head 0.0, put back alone, brings back 100% [100%, 100%] of the answer")
    assert "head 1.0 (100% [100%, 100%])" in found.words[1]


def test_the_stream_carries_the_answer_from_place_to_place(written, task):
    subject = Subject(written, task)
    pairs = pairs_of(subject, 8)
    table = parse_probe("patching:prompts=8,by=places").measure(subject)
    last = table[(table["place"] == T - 1)].set_index("site")["value"]
    assert last["blocks.0.input"] == pytest.approx(0, abs=1e-9)  # the same token asks
    assert table[table["site"] == "blocks.0.input"]["value"].sum() > 0.5
    assert set(table["place"].dropna()) == set(range(pairs.clean.length))


@pytest.mark.parametrize("name", ["transformer", "gated_delta_net", "mamba2"])
def test_of_a_fresh_model_no_head_is_named(task, name):
    (said,) = look(fresh(task, name), task, "patching:prompts=32").words
    assert said.startswith("The model's answers do not tell the clean context from the corrupted one (margin ")


@torch.no_grad()
def test_scores_are_those_of_one_patch_after_the_other(task):
    model = fresh(task, "gated_delta_net")
    pairs = pairs_of(Subject(model, task), 5)
    site = "blocks.0.mixer.heads"
    found = patch_scores(model, pairs.clean.inputs, pairs.corrupted.inputs, pairs.score, {site: ("heads",)})
    with capture(model, site) as taken:
        model(pairs.clean.inputs)
    for head in range(2):
        for values, scores in ((taken[site], found.scores), (taken[site].roll(1, 0), found.controls)):
            with patch(model, {site: only(values, heads=[head])}):
                one = pairs.score(model(pairs.corrupted.inputs))
            torch.testing.assert_close(scores[site][head], one)
    means = patch_effects(model, pairs.clean.inputs, pairs.corrupted.inputs, pairs.score, site, ("heads",))
    assert means["score"].tolist() == pytest.approx(found.scores[site].mean(1).tolist())


def test_a_mixer_without_heads_is_patched_as_a_whole(task):
    model = fresh(task, "lstm")
    table = parse_probe("patching:prompts=4").measure(Subject(model, task))
    told = set(table["site"].dropna())
    assert told == {"blocks.0.mixer.output", "blocks.1.mixer.output"}


def test_it_says_what_three_seeds_say(written, task):
    import pandas as pd

    table = look(written, task, "patching:prompts=8").table
    whole = pd.concat([table.assign(seed=seed) for seed in range(3)])
    said = parse_probe("patching:prompts=8").words(records(over_seeds(whole)))
    assert "100%" in said[0]
