"""What policies keep above chance, on values by prompt drawn from known means."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from contextlab.evaluation.results import COMPRESS_COLUMNS, read_compressed, table, write_results
from contextlab.report import compress_table, compress_words, kept_tables
from contextlab.report.kept_cells import difference, kept, mean_of
from contextlab.report.lint import lint

CHANCE, PROMPTS = 0.25, 40
ON = ("needle", 512)


def draw(means: dict[str, float], full: float = 0.9, seeds: int = 1, rng: np.random.Generator | None = None):
    """Accuracies of policies at 25% and of the full cache; a prompt is hard for all of them or for none."""
    rng, rows = rng or np.random.default_rng(0), []
    for seed in range(seeds):
        hard = rng.uniform(size=PROMPTS)
        for name, mean in {"full": full, **means}.items():
            plain = name == "full"
            values = ((hard < mean) ^ (rng.uniform(size=PROMPTS) < 0.02)).astype(float)
            half = 2.02 * values.std(ddof=1) / PROMPTS**0.5
            who = {"run": "m", "model": name, "kind": "policy", "seed": seed, "task": ON[0], "length": ON[1]}
            who |= {"split": "full" if plain else "25%", "tokenizer": "bytes", "prompts": f"seed {seed}"}
            value = values.mean()
            bounds = {"value": value, "ci_low": max(0, value - half), "ci_high": min(1, value + half), "n": PROMPTS}
            rows.append({**who, "metric": "accuracy", **bounds, "chance": CHANCE, "values": values})
            for metric, cost in (("state_bytes", 1000.0 if plain else 250.0), ("kl", 0.0), ("decode_ratio", 1.0)):
                rows.append({**who, "metric": metric, "value": cost, "ci_low": cost, "ci_high": cost, "n": 1})
    return table(rows, COMPRESS_COLUMNS).assign(values=[row.get("values") for row in rows])


def test_what_is_kept_is_counted_from_chance(tmp_path) -> None:
    found = draw({"half": 0.575})
    accuracy = found[found["metric"] == "accuracy"].set_index("model")["value"]
    expected = (accuracy["half"] - CHANCE) / (accuracy["full"] - CHANCE)
    cells = kept(found).cells
    assert cells["half", "25%"][ON].quality.value == pytest.approx(expected)
    assert cells["full", "full"][ON].quality == (1.0, 1.0, 1.0)
    path = write_results(found, tmp_path / "c.parquet", COMPRESS_COLUMNS)
    again = kept(read_compressed(path)).cells
    assert again["half", "25%"][ON].quality == pytest.approx(cells["half", "25%"][ON].quality)
    old = found[[name for name in found.columns if name not in ("chance", "tokenizer", "prompts", "values")]]
    write_results(old, tmp_path / "old.parquet")
    before = kept(read_compressed(tmp_path / "old.parquet")).cells["half", "25%"][ON].quality
    assert before.value == pytest.approx(accuracy["half"] / accuracy["full"])


def test_policies_are_ranked_only_where_the_same_prompts_part_them() -> None:
    clear, *_ = compress_words(draw({"a": 0.85, "b": 0.5}))
    assert clear.startswith("At 25%, a is the best policy: it keeps ")
    tied, over = compress_words(draw({"a": 0.7, "b": 0.7, "c": 0.68}))
    assert "are not told apart (" in tied
    assert "best" not in tied
    assert over == "What is kept is told above chance; 95% intervals over 1 prompt alone (one seed)."
    nothing, *_ = compress_words(draw({"a": CHANCE, "b": CHANCE}))
    assert "none of the 2 policies is seen to keep anything" in nothing
    assert lint([clear, tied, over, nothing]) == []


def test_a_difference_on_the_same_prompts_is_narrower_than_its_parts() -> None:
    cells = kept(draw({"a": 0.7, "b": 0.65})).cells
    one, two = (mean_of(cells[name, "25%"], [ON]) for name in "ab")
    assert one is not None
    assert two is not None
    apart = np.hypot(one.quality.high - one.quality.value, two.quality.high - two.quality.value)
    told = difference(one, two)
    assert told.high - told.value < 0.8 * apart


@pytest.mark.parametrize("seeds", [1, 3])
def test_where_the_full_cache_is_at_chance_nothing_is_ranked(seeds: int) -> None:
    found = draw({"a": CHANCE, "b": 0.3}, full=CHANCE, seeds=seeds)
    (only,) = compress_words(found)
    assert only.startswith(
        "needle at 512 tokens: the full cache itself is not seen to be better than chance (accuracy "
    )
    assert only.endswith("is the model trained for this, and is bytes its own tokenizer?")
    assert kept_tables(found) == {}
    both = pd.concat([found, draw({"a": 0.8, "b": 0.5}, seeds=seeds).assign(task="other")], ignore_index=True)
    first, then, *_ = compress_words(both)
    assert first == only
    assert then.startswith("At 25%, ")
    assert list(kept_tables(both)) == ["other at 512 tokens"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_of_what_is_kept_are_calibrated(seeds: int) -> None:
    rng, held = np.random.default_rng(1), 0
    flip = {mean: mean + 0.02 * (1 - 2 * mean) for mean in (0.9, 0.6)}
    truth = (flip[0.6] - CHANCE) / (flip[0.9] - CHANCE)
    for _ in range(80):
        held += kept(draw({"a": 0.6}, seeds=seeds, rng=rng)).cells["a", "25%"][ON].quality.holds(truth)
    assert held / 80 >= 0.9


def test_a_factor_of_one_batch_is_not_printed() -> None:
    found = draw({"a": 0.8}).assign(n=1)
    rates = found[found["metric"] == "decode_ratio"]
    parts = [rates.assign(metric=m) for m in ("prefill_ratio", "decode_tokens_per_second", "prefill_tokens_per_second")]
    whole = pd.concat([found, *parts, rates.assign(metric="peak_bytes")], ignore_index=True)
    assert compress_table(whole)["needle, 512 tokens"][1]["decode"] == ""
    twice = whole.assign(n=2)
    assert compress_table(twice)["needle, 512 tokens"][1]["decode"] == "1x (1-1)"
