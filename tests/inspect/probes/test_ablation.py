"""Ablation: what a mechanism that is written down cannot do without, and nothing where nothing was learned."""

from __future__ import annotations

import pytest
import torch

from contextlab import build_model, build_task, capture, patch
from contextlab.errors import InputError
from contextlab.inspect import Subject, look, only
from contextlab.inspect.probe import parse_probe
from contextlab.models import preset

V, T = 8, 12


@pytest.fixture(scope="module")
def task():
    return build_task("induction_head", vocabulary=V, length=T, trigger="any")


def fresh(task, name="transformer"):
    return build_model(preset(name, width=16, depth=2, heads=2, mlp_ratio=2).for_task(task)).double().eval()


def test_induction_needs_both_heads_whatever_stands_in_their_place(task):
    model = build_model("induction_construction", vocabulary=V, length=T).double().eval()
    found = look(model, task, "ablation:prompts=64,metric=accuracy")
    table = found.table.set_index(["what", "site"])["value"]
    assert table["intact"].item() == 1
    for kind in ("zero", "resample"):
        for layer in (0, 1):
            assert table[kind, f"blocks.{layer}.mixer.heads"] > 0.5
            assert table[kind, f"blocks.{layer}.mixer.output"] > 0.5
    assert table["mean", "blocks.1.mixer.heads"] > 0.5
    assert any("head 1.0" in sentence and "another prompt's values" in sentence for sentence in found.words)


@pytest.mark.parametrize("name", ["transformer", "gated_delta_net", "lstm"])
def test_nothing_is_missed_that_was_not_learned(task, name):
    (said,) = look(fresh(task, name), task, "ablation:prompts=64,metric=accuracy").words
    assert "it has learned nothing that a part could be missed for" in said


@torch.no_grad()
@pytest.mark.parametrize("name", ["transformer", "mamba2"])
def test_each_value_is_that_of_one_part_taken_away_by_hand(task, name):
    model = fresh(task, name)
    subject = Subject(model, task)
    table = parse_probe("ablation:prompts=5,metric=cross_entropy").measure(subject)
    prompt = subject.prompts(5)
    heads, mlp = "blocks.1.mixer.heads", "blocks.0.mlp.output"
    sites = [heads] if name == "mamba2" else [heads, mlp]

    def loss():
        errors = task.errors(model(prompt.inputs), prompt)["cross_entropy"]
        return errors[prompt.scored].double()

    with capture(model, sites) as taken:
        intact = loss()
    change = {
        "zero": torch.zeros_like,
        "mean": lambda v: v.mean(0, True).expand_as(v),
        "resample": lambda v: v.roll(1, 0),
    }
    for kind, make in change.items():
        for site in sites:
            part = {"heads": [1]} if site == heads else {}
            with patch(model, {site: only(make(taken[site]).contiguous(), **part)}):
                lost = loss() - intact
            row = table[(table["what"] == kind) & (table["site"] == site)]
            row = row[row["head"] == 1] if part else row
            assert row["value"].item() == pytest.approx(lost.mean().item(), abs=1e-9)
            half = 1.959964 * lost.std().item() / 5**0.5
            assert row["ci_high"].item() - row["value"].item() == pytest.approx(half, abs=1e-9)
    assert set(table["measure"]) == {"cross_entropy", "cross_entropy lost"}


def test_errors_are_worse_when_they_grow_and_accuracies_when_they_fall(task):
    model = build_model("induction_construction", vocabulary=V, length=T).double().eval()
    for metric in ("accuracy", "cross_entropy"):
        table = parse_probe(f"ablation:prompts=16,metric={metric}").measure(Subject(model, task))
        assert table[table["what"] == "zero"]["value"].min() > 0


def test_a_metric_that_the_task_does_not_tell(task):
    with pytest.raises(InputError, match="unknown metric 'acuracy'; did you mean 'accuracy'"):
        parse_probe("ablation:prompts=4,metric=acuracy").measure(Subject(fresh(task), task))
    with pytest.raises(InputError, match="use 2 or more"):
        look(fresh(task), task, "ablation:prompts=1")
