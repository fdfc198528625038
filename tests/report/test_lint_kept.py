"""The words of drawn tables of `compress` claim nothing that the data do not part; what is wrong in them is found."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from contextlab.evaluation.intervals import Interval, share_bounds
from contextlab.evaluation.results import COMPRESS_COLUMNS, table
from contextlab.report import compress_words, kept
from contextlab.report.kept_cells import Mean
from contextlab.report.lint_kept import lint_kept

HELD = ("tova", "h2o:window=4", "keydiff:sinks=2,window=4", "random:sinks=2,window=4", "snapkv:window=4|fp8")
READ, OTHERS = ("quest:page=8", "block_topk:page=8"), ("star_attention", "oracle", "quantize:bits=4")
TASKS = (("needle", 512), ("mqar:pairs=16", 512), ("needle", 256))
CHANCE, PROMPTS = 0.1, 24


def draw(seed: int) -> pd.DataFrame:
    """Accuracies of policies of all kinds at two budgets on one to three tasks, from one or more seeds; some are tied,
    some at chance, some perfect, and some serve fewer tasks."""
    rng, rows = np.random.default_rng(seed), []
    tasks, seeds = TASKS[: 1 + seed % 3], 1 + seed % 2
    tie = float(rng.choice([0.1, 0.5, 1.0]))
    full = {on: 0.1 if i == 2 else float(rng.choice([0.9, 1.0])) for i, on in enumerate(tasks)}
    settings = [(name, budget) for name in (*HELD, *READ, "star_attention", "oracle") for budget in ("25%", "10%")]
    settings = [("full", "full"), ("quantize:bits=4", "own"), *settings]
    means = {key: tie if rng.random() < 0.4 else float(rng.uniform(0.1, 0.9)) for key in settings}
    missing = {(settings[2], tasks[-1])} if len(tasks) > 1 else set()
    for of in range(seeds):
        for task, length in tasks:
            hard = rng.uniform(size=PROMPTS)
            for key in settings:
                if (key, (task, length)) in missing:
                    continue
                name, budget = key
                mean = full[task, length] if name == "full" else min(means[key], full[task, length])
                values = (hard < mean).astype(float) if rng.random() < 0.8 else rng.binomial(1, mean, PROMPTS) * 1.0
                half = 2.07 * values.std(ddof=1) / PROMPTS**0.5
                low, high = (float(x[0]) for x in share_bounds(*map(np.atleast_1d, (values.mean(), half, PROMPTS))))
                who = {"run": "m", "model": name, "kind": "policy", "seed": of, "task": task, "length": length}
                who |= {"split": budget, "tokenizer": "bytes", "prompts": f"seed {of}"}
                row = {"metric": "accuracy", "value": values.mean(), "ci_low": low, "ci_high": high, "n": PROMPTS}
                rows.append({**who, **row, "chance": CHANCE, "values": values})
                part = {"full": 1000.0, "own": 240.0, "25%": 250.0, "10%": 100.0}[budget]
                held = part if name in (*HELD, "oracle", "quantize:bits=4") else 1000.0
                for metric, cost in (("state_bytes", held), ("kl", 0.0)):
                    rows.append({**who, "metric": metric, "value": cost, "ci_low": cost, "ci_high": cost, "n": PROMPTS})
    return table(rows, COMPRESS_COLUMNS).assign(values=[row.get("values") for row in rows])


@pytest.fixture(scope="module")
def drawn() -> list[tuple[pd.DataFrame, list[str]]]:
    """Tables and what is said of them."""
    return [(found, compress_words(found)) for found in map(draw, range(6))]


def test_the_words_of_drawn_tables_are_clean(drawn) -> None:
    for found, words in drawn:
        assert lint_kept(words, found) == []
    words = [sentence for _, each in drawn for sentence in each]
    for said in ("is the best policy", "not told apart", "full cache itself", "knows what follows", "Not compared",
                 "read 25% of it a token", "for a token of the prompt", "one seed", "2 seeds"):  # fmt: skip
        assert any(said in each for each in words), said


def parted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Interval, "parts", True)


def never_parted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Interval, "parts", False)


def twice(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kept, "_part", lambda mean: f"{2 * mean.quality.value:.1%} ± 1.0%")


def worst_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kept, "sorted", lambda group, key: sorted(group, key=key)[::-1], raising=False)


def other_bytes(patch: pytest.MonkeyPatch) -> None:
    def changed(cells, tasks):
        found = mean_of(cells, tasks)
        return None if found is None else Mean(found.quality, found.bytes / 3, found.words, found.cells)

    mean_of = kept.mean_of
    patch.setattr(kept, "mean_of", changed)


def everyone_knows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(kept, "knows_what_follows", lambda name: name in ("oracle", "tova"))


@pytest.mark.parametrize("change", [parted, never_parted, twice, worst_first, other_bytes, everyone_knows])
def test_a_writer_with_a_fault_is_caught(change: Callable[[pytest.MonkeyPatch], None], drawn, monkeypatch) -> None:
    for found, words in drawn:
        with monkeypatch.context() as patch:
            change(patch)
            told = compress_words(found)
        if told != words and lint_kept(told, found):
            return
    raise AssertionError("no fault was found")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (r"^(At \S+), (.*?) are not told apart \(.*?\): .*", r"\1, tova is the best policy: it keeps all."),
        (r"(keeps [^;:]*)\.$", r"\1, and loses least of all policies."),
        (r" keeps (\d)", r" keeps 9\1"),
        (r"over (\d+) prompts", r"over 7\1 prompts"),
        (r"^needle at 256 tokens: the full cache itself.*", "needle at 256 tokens: hard."),
        (r"in (\d+\.\d)% of its bytes", "in 1.5% of its bytes"),
        (r" and [\w:=,|]+ are not told apart \(largest", " are not told apart (largest"),
    ],
)
def test_a_sentence_with_a_fault_is_caught(old: str, new: str, drawn) -> None:
    changed = 0
    for found, words in drawn:
        for sentence in words:
            if (other := re.sub(old, new, sentence)) != sentence:
                changed += 1
                assert lint_kept([other], found), other
                break
        if changed == 2:
            return
    assert changed
