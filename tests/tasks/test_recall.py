"""Recall prompts hold what they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from contextlab import TaskSpec, build_task
from contextlab.errors import InputError
from contextlab.experiments import load_recipe
from contextlab.learners import Induction


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_every_target_is_the_value_bound_to_its_key(data: st.DataObject) -> None:
    pairs = data.draw(st.integers(1, 10))
    slots = data.draw(st.integers(1, 14))
    queries = data.draw(st.none() | st.integers(1, min(pairs, slots)))
    vocabulary = data.draw(st.integers(2 * pairs, 40))
    filler = data.draw(st.sampled_from(["random", "blank", "any"]))
    task = build_task(
        "associative_recall",
        vocabulary=vocabulary,
        pairs=pairs,
        length=2 * (pairs + slots),
        queries=queries,
        filler=filler,
    )
    prompt = task.sample(3, generator(data.draw(st.integers(0, 999))))
    assert prompt.inputs.shape == prompt.targets.shape == prompt.scored.shape == prompt.shot.shape
    assert prompt.inputs.max() < task.input_size
    for row, targets, scored, shot in zip(prompt.inputs, prompt.targets, prompt.scored, prompt.shot, strict=True):
        keys, values = row[0 : 2 * pairs : 2].tolist(), row[1 : 2 * pairs : 2].tolist()
        assert len(set(keys)) == len(set(values)) == pairs
        assert max(keys) < vocabulary // 2 <= min(values)
        assert max(values) < vocabulary
        at = scored.nonzero().squeeze(1).tolist()
        assert len(at) == (min(pairs, slots) if queries is None else queries)
        assert all(t >= 2 * pairs and t % 2 == 0 for t in at)
        asked = row[at].tolist()
        assert len(set(asked)) == len(asked)
        assert targets[at].tolist() == [dict(zip(keys, values, strict=True))[key] for key in asked]
        assert (shot[at] == pairs).all()
        rest = [t for t in range(2 * pairs, len(row)) if t not in at]
        filled = row[rest]
        if filler != "any":
            assert ((filled == vocabulary) if filler == "blank" else (filled >= vocabulary // 2)).all()


def test_filled_with_any_symbol_it_is_zoologys() -> None:
    """What followed a key's last occurrence is its value as often as in the public code, within four standard errors.

    There it is in 0.9181 (2000 prompts of 128 tokens, 256 symbols and 16 pairs; standard deviation 0.0684), and
    0.5004 of the filler are keys: multiquery_ar of zoology/data/multiquery_ar.py, github.com/HazyResearch/zoology at
    commit d88d6f5474f36998d82d5c3bd58a190248d0a669.
    """
    task = build_task("associative_recall", vocabulary=256, pairs=16, length=128, filler="any")
    prompt = task.sample(500, generator(4))
    right = task.errors(Induction(256)(prompt), prompt)["accuracy"] * prompt.scored
    share = right.sum(1) / prompt.scored.sum(1)
    assert abs(share.mean().item() - 0.9181) < 4 * 0.0684 * (1 / 500 + 1 / 2000) ** 0.5
    assert share.std().item() == pytest.approx(0.0684, rel=0.15)
    filled = prompt.inputs[:, 32:][~prompt.scored[:, 32:]]
    assert abs((filled < 128).float().mean().item() - 0.5004) < 4 * 0.5 * (2 / len(filled)) ** 0.5
    assert task.errors(task.learners()["lookup"](prompt), prompt)["accuracy"][prompt.scored].min() == 1
    others = task.replace(filler="random")
    prompt = others.sample(50, generator(4))
    assert others.errors(Induction(256)(prompt), prompt)["accuracy"][prompt.scored].min() == 1


def test_zoologys_recipe_fills_with_any_symbol() -> None:
    tasks = load_recipe("zoology").tasks.values()
    assert [entry.options["filler"] for entry in tasks] == ["any"] * 4


def test_the_look_up_makes_no_error_on_any_split() -> None:
    for name, task in build_task("associative_recall").splits().items():
        prompt = task.sample(32, generator())
        answer = task.learners()["lookup"](prompt)
        assert task.errors(answer, prompt)["accuracy"][prompt.scored].min() == 1, name
        assert task.loss(answer, prompt) < 1e-4


def test_splits_change_the_pairs_and_the_length_and_keep_what_fits() -> None:
    splits = build_task("associative_recall", vocabulary=128, pairs=16, length=96).splits()
    assert list(splits) == ["train", "pairs=8", "pairs=16", "pairs=32", "length=192"]
    assert [task.sample(1, generator()).scored.sum().item() for task in splits.values()] == [
        16,
        8,
        16,
        16,
        16,
    ]
    assert splits["length=192"].sample(1, generator()).length == 192
    assert list(build_task("associative_recall", vocabulary=40, test_pairs=(4, 20)).splits())[1:3] == [
        "pairs=4",
        "pairs=20",
    ]
    assert "pairs=32" not in build_task("associative_recall", vocabulary=40).splits()


def test_loss_is_the_cross_entropy_at_the_queries() -> None:
    task = build_task("associative_recall", vocabulary=16, pairs=4, length=20, queries=3)
    prompt = task.sample(5, generator())
    logits = torch.randn(5, 20, 16, generator=generator(1), requires_grad=True)
    expected = F.cross_entropy(logits[prompt.scored], prompt.targets[prompt.scored])
    loss = task.loss(logits, prompt)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(task.errors(logits, prompt)["cross_entropy"][prompt.scored].mean(), expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[~prompt.scored].abs().max() == 0


def test_gaps_follow_the_power_law() -> None:
    """With one query the slot's distribution is s ** (power - 1), normalised; six standard errors are allowed."""
    count = 20_000
    for power in (0.01, 1.0):
        task = build_task("associative_recall", vocabulary=8, pairs=2, length=16, queries=1, power=power)
        slot = (task.sample(count, generator(3)).scored.int().argmax(1) - 4) // 2
        expected = torch.arange(1, 7).double() ** (power - 1)
        expected /= expected.sum()
        seen = torch.bincount(slot, minlength=6) / count
        assert ((seen - expected).abs() < 6 * (expected / count).sqrt()).all()


def test_the_same_generator_state_draws_the_same_prompts() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    task = build_task("associative_recall")
    one, two, three = task.sample(4, generator(1)), task.sample(4, generator(1)), task.sample(4, generator(2))
    assert torch.equal(one.inputs, two.inputs)
    assert torch.equal(one.scored, two.scored)
    assert not torch.equal(one.inputs, three.inputs)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 80, "length": 400}, "pairs 80 do not fit: vocabulary 128 holds 64 keys; at most 64"),
        ({"pairs": 48}, "at most 47"),
        ({"length": 95}, "use 96"),
        ({"queries": 17}, "leave room for 16"),
        ({"test_pairs": (8, 100)}, "pairs 100"),
        ({"pairs": 0}, "greater than 0"),
        ({"length": -2}, "greater than 0"),
        ({"vocabulary": 1, "pairs": 1}, "use vocabulary 2 or more"),
        ({"filler": "blnk"}, "did you mean 'blank'"),
        ({"pair": 3}, "did you mean 'pairs'"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_task("associative_recall", **options)
    with pytest.raises(InputError, match=message):
        TaskSpec.parse({"name": "associative_recall", "options": options})


def test_task_spec_builds_and_names_the_key() -> None:
    spec = TaskSpec.parse({"name": "associative_recall", "options": {"pairs": 4}})
    assert spec.build() == build_task("associative_recall", pairs=4)
    with pytest.raises(InputError, match="did you mean 'associative_recall'"):
        TaskSpec.parse({"name": "associative_recal"})
    with pytest.raises(InputError, match=r"options: .*did you mean .pairs"):
        TaskSpec.parse({"name": "associative_recall", "options": {"pair": 4}})
