"""Strings of random automata hold what they promise."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scipy import stats

from contextlab import build_task
from contextlab.errors import InputError
from contextlab.experiments import load_recipe
from contextlab.learners import AutomatonOracle
from contextlab.tasks.automata import draw_automata, fingerprint, pool_of


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("pool", [4, None])
def test_every_string_is_a_walk_of_the_hidden_automaton(pool: int | None) -> None:
    task = build_task("random_automata", vocabulary=6, states=5, edges=3, string_length=7, length=60, pool=pool)
    prompt = task.sample(5, generator())
    assert torch.equal(prompt.inputs[:, 1:], prompt.targets[:, :-1])
    for row, automaton, shot in zip(
        prompt.inputs.tolist(), prompt.hidden["automaton"].tolist(), prompt.shot.tolist(), strict=True
    ):
        assert row[0] == 6
        strings = [list(group) for end, group in itertools.groupby(row, lambda token: token == 6) if not end]
        assert all(len(string) <= 7 for string in strings)
        assert shot[-1] == row.count(6) - 1
        for string in strings:
            state = 0
            for symbol in string:
                state = automaton[state][symbol]
                assert state >= 0


def test_automata_have_the_edges_they_should() -> None:
    task = build_task("random_automata", vocabulary=7, states=6, fewest_states=4, edges=3)
    automata = draw_automata(task, 4000, generator(), "cpu")
    edge = automata >= 0
    degree = edge.sum(2)
    used = degree > 0
    assert degree.max() == 3
    sizes = used.sum(1)
    assert stats.chisquare(torch.bincount(sizes)[4:7]).pvalue > 1e-4
    assert stats.chisquare(torch.bincount(degree[used])[1:]).pvalue > 1e-4
    for automaton, size in zip(automata[:300].tolist(), sizes[:300].tolist(), strict=True):
        for state, row in enumerate(automaton):
            ahead = [after for after in row if after >= 0]
            assert len(set(ahead)) == len(ahead)
            assert state not in ahead
            assert all(after < size for after in ahead)
        assert len({symbol for row in automaton for symbol, after in enumerate(row) if after >= 0}) <= 7


def test_edges_are_taken_evenly_and_lengths_are_uniform() -> None:
    task = build_task("random_automata", vocabulary=6, states=4, edges=3, string_length=4, length=200, pool=1)
    prompt = task.sample(300, generator(1))
    automaton = prompt.hidden["automaton"][0]
    first = prompt.targets[prompt.inputs == 6]
    counts = torch.bincount(first, minlength=6)
    allowed = automaton[0] >= 0
    assert counts[~allowed].sum() == 0
    assert stats.chisquare(counts[allowed]).pvalue > 1e-4
    # a string that begins before position 190 is whole
    ends = (prompt.inputs == 6).nonzero()
    length = (ends[1:, 1] - ends[:-1, 1] - 1)[(ends[1:, 0] == ends[:-1, 0]) & (ends[:-1, 1] < 190)]
    assert stats.chisquare(torch.bincount(length)[1:5]).pvalue > 1e-4


def language(automaton: list[list[int]], length: int) -> set[tuple[int, ...]]:
    """The strings of at most so many symbols."""
    found, edge = set(), [((), 0)]
    for _ in range(length):
        edge = [((*s, v), after) for s, q in edge for v, after in enumerate(automaton[q]) if after >= 0]
        found |= {string for string, _ in edge}
    return found


def test_fingerprints_tell_languages_apart_and_nothing_else() -> None:
    """Two automata of 3 states differ, if at all, on a string of at most 6 symbols."""
    task = build_task("random_automata", vocabulary=3, states=3, fewest_states=2, edges=1)
    automata = draw_automata(task, 60, generator(2), "cpu")
    numbers = fingerprint(automata).tolist()
    languages = [frozenset(language(automaton, 6)) for automaton in automata.tolist()]
    same = {(a, b) for a, b in itertools.combinations(range(60), 2) if languages[a] == languages[b]}
    assert same == {(a, b) for a, b in itertools.combinations(range(60), 2) if numbers[a] == numbers[b]}
    assert len(same) > 10
    twin = torch.tensor([[[1, -1], [0, -1], [-1, -1]], [[2, -1], [0, 0], [0, -1]], [[1, 0], [0, -1], [0, 0]]])
    assert fingerprint(twin).unique().numel() == 2  # a renamed, a longer loop and an unreachable state change nothing


def test_train_and_test_automata_are_different_languages() -> None:
    train = build_task("random_automata", vocabulary=5, states=3, edges=2, pool=40, string_length=5, length=30)
    test = train.splits()["new automata"]
    parts = [fingerprint(pool_of(task, "cpu")).tolist() for task in (train, test)]
    assert len({*parts[0], *parts[1]}) == 80
    drawn = [fingerprint(task.sample(200, generator(3)).hidden["automaton"]).tolist() for task in (train, test)]
    assert set(drawn[0]) <= set(parts[0])
    assert set(drawn[1]) <= set(parts[1])
    languages = [{frozenset(language(a, 6)) for a in pool_of(task, "cpu").tolist()} for task in (train, test)]
    assert languages[0].isdisjoint(languages[1])
    other = train.replace(pool_seed=1)
    assert not torch.equal(pool_of(other, "cpu"), pool_of(train, "cpu"))


def test_the_posterior_is_calibrated_and_beats_what_knows_less() -> None:
    """The optimum's loss is the entropy of its own prediction, on average; four standard errors."""
    task = build_task("random_automata", vocabulary=6, states=4, edges=2, string_length=8, length=48, pool=30)
    prompt = task.sample(1500, generator(5))
    log_p = task.learners()["automata_posterior"](prompt).double()
    loss = task.errors(log_p, prompt)["cross_entropy"].double()
    gap = (loss + (log_p.exp() * log_p).sum(-1)).mean(1)
    assert gap.mean().abs() < 4 * gap.std() / len(gap) ** 0.5
    errors = {n: task.errors(a(prompt), prompt)["cross_entropy"].mean() for n, a in task.learners().items()}
    assert errors["automaton_oracle"] < errors["automata_posterior"] < errors["baum_welch"]
    new = task.splits()["new automata"]
    errors = {n: new.errors(a(p := new.sample(200, generator(6))), p) for n, a in new.learners().items()}
    loss = {name: error["cross_entropy"].mean() for name, error in errors.items()}
    assert next(iter(loss)) == "kneser_ney" == min(loss, key=lambda name: loss[name] + 9 * (name == "automaton_oracle"))
    assert loss["automaton_oracle"] < loss["kneser_ney"] < loss["train_posterior"]
    assert errors["automaton_oracle"]["total_variation"].max() < 1e-4


PUBLIC = {
    "states": (8.06, 2.574, 4000),
    "edges of a state": (2.006, 0.8157, 32258),
    "length of a string": (24.95, 14.10, 58303),
    "states of the minimal automaton": (6.944, 2.461, 2000),
}
"""Mean, standard deviation and number of what src/dataloaders/dfa.py draws with configs/dataset/icl_dfa.yaml.

Of github.com/berlino/seq_icl at commit 9b9223d15348b5a415fb453ed988ed5f7ab9fbdc, run with pythomata 0.3.2.
"""


def published(**changes: Any) -> Any:
    """The task of the recipe."""
    entry = load_recipe("regbench").tasks["automata"]
    return build_task(entry.task, **{**entry.options, **changes})


def minimal_states(automaton: list[list[int]]) -> int:
    """How many of the states that a string can reach differ in what may follow."""
    reached = [0]
    for state in reached:
        reached += {after for after in automaton[state] if after >= 0} - set(reached)
    kind = dict.fromkeys(reached, 0)
    for _ in reached:
        rows = {q: tuple(kind[a] if a >= 0 else None for a in automaton[q]) for q in reached}
        number = {row: i for i, row in enumerate(dict.fromkeys(rows.values()))}
        kind = {q: number[rows[q]] for q in reached}
    return len(set(kind.values()))


def test_the_recipe_draws_as_the_public_code_does() -> None:
    """Means within five standard errors of the difference, ranges exactly."""
    task = published(pool=None)
    prompt = task.sample(400, generator(7))
    automata = draw_automata(task, 4000, generator(8), "cpu")
    degree = (automata >= 0).sum(2)
    ends = (prompt.inputs == 18).nonzero()
    whole = (ends[1:, 0] == ends[:-1, 0]) & (ends[:-1, 1] < 512 - 50)
    drawn = {
        "states": (degree > 0).sum(1),
        "edges of a state": degree[degree > 0],
        "length of a string": (ends[1:, 1] - ends[:-1, 1] - 1)[whole],
        "states of the minimal automaton": torch.tensor([minimal_states(each) for each in automata[:2000].tolist()]),
    }
    for name, (mean, spread, count) in PUBLIC.items():
        own = drawn[name].double()
        error = spread * (1 / count + 1 / len(own)) ** 0.5
        assert abs(own.mean().item() - mean) < 5 * error, name
        assert own.std().item() == pytest.approx(spread, rel=0.06), name
    extremes = {name: (int(values.min()), int(values.max())) for name, values in drawn.items()}
    assert extremes["states"] == (4, 12)
    assert extremes["edges of a state"] == (1, 3)
    assert extremes["length of a string"] == (1, 49)


def test_allowed_accuracy_is_the_accuracy_of_the_public_code() -> None:
    """The largest logit continues a string of the language; separators are neither counted nor an answer."""
    task = published(pool=None, length=90)
    prompt = task.sample(6, generator(9))
    prediction = torch.randn(6, 90, 19, generator=generator(10))
    prediction[..., 18] += 1
    automata, chosen = prompt.hidden["automaton"].tolist(), prediction.argmax(-1).tolist()
    counted, right = 0, 0
    for row, targets, answers, automaton in zip(
        prompt.inputs.tolist(), prompt.targets.tolist(), chosen, automata, strict=True
    ):
        state = 0
        for token, target, answer in zip(row, targets, answers, strict=True):
            state = 0 if token == 18 else automaton[state][token]
            if target != 18:
                counted += 1
                right += answer != 18 and automaton[state][answer] >= 0
    errors = task.errors(prediction, prompt)
    assert next(iter(errors)) == "allowed_accuracy"
    assert counted == prompt.scored.sum()
    assert right == errors["allowed_accuracy"][prompt.scored].sum()
    assert 0 < right < counted
    exact = (prediction.argmax(-1) == prompt.targets)[prompt.scored].float().mean()
    assert errors["accuracy"][prompt.scored].mean() == exact


def test_what_may_come_includes_the_separator_only_where_it_is_scored() -> None:
    task = published(pool=None, length=200)
    prompt = task.sample(50, generator(11))
    always = torch.zeros(50, 200, 19)
    always[..., 18] = 1
    assert task.errors(always, prompt)["allowed_accuracy"].sum() == 0
    scored = task.replace(separators=True)
    assert scored.sample(2, generator()).scored.all()
    allowed = scored.errors(always, prompt)["allowed_accuracy"]
    assert torch.equal(allowed == 0, prompt.inputs == 18)  # no string is empty
    assert next(iter(scored.errors(always, prompt))) == "accuracy"


def test_the_oracle_in_the_papers_accuracy() -> None:
    """With 12 states and up to 4 edges, 0.998 if it foresees ends, where 0.508 of its answers are what came next."""
    task = build_task("random_automata", states=12, edges=4, string_length=50, length=512, pool=None, separators=False)
    prompt = task.sample(300, generator(12))
    errors = task.errors(AutomatonOracle(50)(prompt), prompt)
    of_prompts = (errors["allowed_accuracy"] * prompt.scored).sum(1) / prompt.scored.sum(1)
    assert of_prompts.mean().item() == pytest.approx(0.9982, abs=0.0007)
    assert errors["accuracy"].mean().item() == pytest.approx(0.508, abs=0.03)
    known = task.learners()["automaton_oracle"](prompt)
    assert task.errors(known, prompt)["allowed_accuracy"][prompt.scored].min() == 1


def test_without_separators_the_posterior_is_calibrated_over_symbols() -> None:
    """Its loss is the entropy of its own prediction, on average, to four standard errors; only the oracle beats it."""
    task = build_task(
        "random_automata", vocabulary=6, states=4, edges=2, string_length=8, length=48, pool=30, separators=False
    )
    prompt = task.sample(600, generator(13))
    log_p = task.learners()["automata_posterior"](prompt).double()
    assert log_p[..., 6].max() < -10
    gap = task.errors(log_p, prompt)["cross_entropy"].double() + (log_p.exp() * log_p).sum(-1)
    gap = (gap * prompt.scored).sum(1) / prompt.scored.sum(1)
    assert gap.mean().abs() < 4 * gap.std() / len(gap) ** 0.5
    loss = {name: task.loss(learner(prompt), prompt).item() for name, learner in task.learners().items()}
    assert sorted(loss, key=lambda name: loss[name])[:2] == ["automaton_oracle", "automata_posterior"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edges": 12}, "at most 11"),
        ({"fewest_states": 4}, "4 edges need 5 to 12"),
        ({"vocabulary": 5}, "use at least 6"),
        ({"pool": None, "part": "test"}, "use part 'train'"),
        ({"part": "tset"}, "did you mean 'test'"),
        ({"edges": 0}, "greater than 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_task("random_automata", **options)


def test_a_pool_of_more_languages_than_there_are_is_refused() -> None:
    task = build_task("random_automata", vocabulary=2, states=2, edges=1, pool=50, string_length=4, length=20)
    with pytest.raises(InputError, match="pool 50 is too large"):
        task.sample(1, generator())
