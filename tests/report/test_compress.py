"""Tables, sentences and figures of `compress`, on results made by hand."""

from __future__ import annotations

import pandas as pd
import pytest

from contextlab.evaluation.results import table
from contextlab.report import (
    build_report,
    compress_table,
    compress_words,
    kept_tables,
    not_served,
    quality_against_bytes,
    write_compress_page,
)
from contextlab.report.compress import over_seeds
from contextlab.report.lint import lint
from tests.report.conftest import make_results


def results() -> pd.DataFrame:
    """Two tasks; b is better than a at 10%, the quantizer as good and smaller than a's 25%; quest holds everything."""
    settings = [
        ("full", "full", "policy", 1.0, 5.0, 1000), ("a", "25%", "policy", 0.9, 5.2, 240),
        ("a", "10%", "policy", 0.5, 6.0, 95), ("b", "25%", "policy", 0.8, 5.4, 250),
        ("b", "10%", "policy", 0.7, 5.8, 100),
        ("bits", "own", "policy", 0.99, 5.0, 200), ("quest", "10%", "policy", 0.95, 5.1, 1060),
        ("linear", "full", "model", 0.6, 5.5, 90),
    ]  # fmt: skip
    rows = []
    for task in ("needle", "text"):
        for name, budget, kind, accuracy, perplexity, size in settings:
            who = {"run": "m", "model": name, "kind": kind, "seed": 0, "task": task, "split": budget, "length": 512}
            costs = {"state_bytes": size, "peak_bytes": 9e6, "decode_tokens_per_second": 50.0, "decode_ratio": 2.0}
            costs |= {"prefill_tokens_per_second": 900.0, "prefill_ratio": 0.8, "kl": 0.01}
            quality = {"accuracy": accuracy} if task == "needle" else {"accuracy": 0.5, "perplexity": perplexity}
            for metric, value in {**quality, **costs}.items():
                near = 0.001 if metric in quality else 0.1
                spread = {"value": value, "ci_low": (1 - near) * value, "ci_high": (1 + near) * value, "n": 8}
                rows.append({**who, "metric": metric, **spread})
    return table(rows)


def test_a_sentence_names_the_best_policy_of_each_budget() -> None:
    at25, at10, reads, over = compress_words(results())
    assert at25.startswith(
        "At 25%, bits is the best policy: it keeps 99.5% ± 0.1% of the full cache's quality in 20.0%"
    )
    assert at10.startswith("At 10%, b is the best policy: it keeps 78.1% ± 0.1% of the full cache's quality in 10.0%")
    assert "needle at 512 tokens accuracy 70.0% ± 0.1% (full 100.0% (≥ 99.9%))" in at10
    assert "text at 512 tokens perplexity 5.8000 ± 0.0058 (full 5.0000 ± 0.0050)" in at10
    assert reads.startswith(
        "quest, which holds everything and reads 10% of it a token, keeps 96.5% ± 0.1% of the full cache's"
    )
    assert over == "What is kept is told above chance; 95% intervals over 8 prompts alone (one seed)."
    assert lint([at25, at10, reads, over]) == []
    twin = results()
    twin["model"] = twin["model"].replace({"quest": "c"})
    twin.loc[twin["model"].eq("c") & twin["metric"].eq("state_bytes"), "value"] = 100
    twin.loc[twin["model"].eq("b") & twin["metric"].eq("accuracy") & twin["task"].eq("needle"), "value"] = 0.95
    twin.loc[twin["model"].eq("b") & twin["metric"].eq("perplexity"), "value"] = 5.1
    tied = compress_words(twin)[1]
    assert tied.startswith("At 10%, c and b are not told apart (difference -0.02 ± ") or tied.startswith(
        "At 10%, b and c"
    )
    assert "; b keeps 9" in tied or "; c keeps 9" in tied


@pytest.mark.parametrize(("size", "best"), [(245, "bits"), (250, "bits"), (251, "a")])
def test_what_has_no_budget_is_compared_where_some_policy_holds_as_much(size: int, best: str) -> None:
    """At 25%, a holds 240 bytes and b 250."""
    found = results()
    found.loc[found["model"].eq("bits") & found["metric"].eq("state_bytes"), "value"] = size
    assert compress_words(found)[0].startswith(f"At 25%, {best} is the best policy")


def test_what_has_no_budget_is_not_told_as_the_best_where_nothing_else_is_held() -> None:
    """A quantizer's state is compared with the states of policies that keep to a budget, and at 10% there is none."""
    found = results()
    found = found[~(found["split"].eq("10%") & found["model"].isin(["a", "b"]))]
    assert [each.split(",")[0] for each in compress_words(found)[:-1]] == ["At 25%", "quest"]


def test_tables_have_a_row_for_each_setting() -> None:
    tables = compress_table(results())
    assert list(tables) == ["needle, 512 tokens", "text, 512 tokens"]
    first, second, *_ = tables["needle, 512 tokens"]
    assert first["policy"] == "full cache"
    assert first["decode"] == "50/s"
    assert (second["policy"], second["budget"], second["state"], second["decode"]) == (
        "a",
        "25%",
        "240 B",
        "2x (1.8-2.2)",
    )
    assert "perplexity" in tables["text, 512 tokens"][0]


def test_the_figure_joins_what_nothing_beats(tmp_path) -> None:
    figure = quality_against_bytes(results(), "needle", 512)
    lines = {trace.name: trace for trace in figure.data}
    assert list(lines["best for its bytes"].x) == [90, 100, 200, 1000]  # linear, b at 10%, bits, full
    assert list(lines["a"].x) == [95, 240]
    assert {"full cache", "linear (its own state)", "quest"} <= set(lines)
    text = {trace.name: trace for trace in quality_against_bytes(results(), "text", 512).data}
    assert list(text["best for its bytes"].y) == [5.5, 5.0]  # bits is as good as the full cache
    assert figure.layout.yaxis.range is None
    errors = quality_against_bytes(results(), "text", 512).layout.yaxis
    low, high = (10**bound for bound in errors.range)  # what stands out is seen, however bad another policy is
    assert low < 0.999 * 5.0 < 1.001 * 6.0 < high < 2 * 6.0
    page = write_compress_page(results(), tmp_path / "c.html").read_text()
    assert "best policy" in page
    assert "src=" not in page.split("</style>")[1].split("<script")[0]


def test_of_many_policies_those_that_stand_out_have_colours_and_the_others_are_grey() -> None:
    one = results()
    rows = one[(one["model"] == "a") & (one["task"] == "needle")]
    crowd = [rows.assign(model=f"p{i:02}", value=rows["value"] * (1 - i / 100)) for i in range(20)]
    figure = quality_against_bytes(pd.concat([one, *crowd], ignore_index=True), "needle", 512)
    colours = {trace.name: trace.line.color for trace in figure.data}
    assert colours["full cache"] == "#000000"
    assert colours["b"] != "#d0d0d0"
    assert colours["p19"] == "#d0d0d0"
    shown = {trace.name: trace.showlegend for trace in figure.data}
    assert shown["b"] is not False
    assert shown["p19"] is False


def seeds() -> pd.DataFrame:
    """Two seeds of `results`, needle's accuracies of the second 0.1 lower."""
    other = results().assign(seed=1)
    other.loc[other["metric"].eq("accuracy") & other["task"].eq("needle"), ["value", "ci_low", "ci_high"]] -= 0.1
    return pd.concat([results(), other], ignore_index=True)


def test_seeds_are_told_as_their_mean_and_what_lies_between_them() -> None:
    found = over_seeds(seeds())
    row = found[found["model"].eq("a") & found["split"].eq("10%") & found["task"].eq("needle")].set_index("metric")
    half = 12.706 * 0.1 / 2**0.5 / 2**0.5  # Student's t of two
    expected = [0.45, max(0, 0.45 - half), min(1, 0.45 + half), 16]
    assert row.loc["accuracy", ["value", "ci_low", "ci_high", "n"]].tolist() == pytest.approx(expected)
    assert row.loc["decode_ratio", ["value", "ci_low", "ci_high"]].tolist() == pytest.approx([2.0, 1.8, 2.2])
    assert compress_table(seeds())["needle, 512 tokens"][2]["accuracy"] == "45.0% (0% to 100%)"
    assert "of each of 2 seeds" in compress_words(seeds())[-1]
    pd.testing.assert_frame_equal(over_seeds(results()), results())


def without(found: pd.DataFrame, *settings: tuple[str, str, str]) -> pd.DataFrame:
    """Less what policies at a budget gave on a task."""
    for policy, budget, task in settings:
        found = found[~(found["model"].eq(policy) & found["split"].eq(budget) & found["task"].eq(task))]
    return found


def test_the_table_of_what_is_kept_puts_the_best_first() -> None:
    (title, rows), *more = kept_tables(results()).items()
    assert title == "mean over needle and text at 512 tokens"
    (apart, held) = more[0]
    assert apart == f"{title}; these hold everything and save no memory"
    assert held == [{"policy": "quest", "10%": "96.5% ± 0.1", "holds": "106%"}]
    assert [row["policy"] for row in rows] == ["b", "a", "bits"]
    found = {row["policy"]: row for row in rows}
    cells = {"25%": "93.1% ± 0.1", "10%": "66.7% ± 0.1", "own": "", "holds": "10% to 24%"}
    assert found["a"] == {"policy": "a", **cells}
    assert found["bits"] == {"policy": "bits", "25%": "", "10%": "", "own": "99.5% ± 0.1", "holds": "20%"}
    assert not_served(results()) == ["needle (512 tokens) at 25%; text (512 tokens) at 25%: quest"]


def test_all_cells_of_a_table_are_of_the_same_tasks() -> None:
    """At 10% nothing that holds less can serve needle: text alone, which is easy, must not look better than 25%."""
    found = kept_tables(without(results(), ("a", "10%", "needle"), ("b", "10%", "needle")))
    assert [title for title in found if "these" not in title] == [
        "mean over needle and text at 512 tokens", "text at 512 tokens",
    ]  # fmt: skip
    both, text, whole = ({row["policy"]: row for row in rows} for rows in found.values())
    assert both["a"] == {"policy": "a", "25%": "93.1% ± 0.1", "own": "", "holds": "24%"}  # no 10%
    assert (text["a"]["25%"], text["a"]["10%"]) == ("96.2% ± 0.1", "83.3% ± 0.1")
    assert text["bits"]["own"] == "100.0% ± 0.1"
    assert whole["quest"]["10%"] == "98.0% ± 0.1"
    assert "quest" not in both
    for rows in (both, text):
        assert not any("*" in cell for row in rows.values() for cell in row.values())


def test_a_policy_that_serves_fewer_tasks_is_not_compared_and_what_it_could_not_is_told() -> None:
    twin = results()
    twin = pd.concat([twin, twin[twin["model"].eq("b")].assign(model="c")], ignore_index=True)
    less = without(twin, ("a", "10%", "needle"))
    rows = kept_tables(less)["mean over needle and text at 512 tokens"]
    assert {row["policy"]: row["10%"] for row in rows}["a"] == ""
    assert "needle (512 tokens) at 10%: a" in not_served(less)
    at10 = next(each for each in compress_words(less) if each.startswith("At 10%"))
    assert at10.endswith("Not compared, as they cannot keep to it in all of these: a.")
    assert not_served(less, ["a", "b", "topk"])[-1] == "any task at any budget: topk"
    # where half cannot serve a task, it does not count, and all are compared on the others
    half = without(results(), ("a", "10%", "needle"))
    at10 = next(each for each in compress_words(half) if each.startswith("At 10%"))
    assert at10.startswith(
        "At 10% (without needle at 512 tokens, where most policies cannot keep to it), b is the best"
    )
    assert "it keeps 86.2% ± 0.1%" in at10  # text alone: 5.0 / 5.8
    assert "Not compared" not in at10


def test_what_one_seed_could_not_serve_is_in_no_mean() -> None:
    found = seeds()
    lost = found["model"].eq("a") & found["split"].eq("10%") & found["task"].eq("needle") & found["seed"].eq(1)
    rows = kept_tables(found[~lost])["text at 512 tokens"]
    assert {row["policy"]: row["10%"] for row in rows}["a"].startswith("83.3% ± ")
    assert "needle (512 tokens) at 10%: a" in not_served(found[~lost])


def test_the_oracle_is_a_ceiling_and_never_the_best_policy() -> None:
    found = results()
    found["model"] = found["model"].replace({"b": "oracle:sinks=2", "bits": "c"})
    at25, ceiling25, at10, _, ceiling10, _ = compress_words(found)
    assert at25.startswith("At 25%, c is the best")
    assert at10.startswith("At 10%, a keeps 66.7% ± 0.1%")  # the only one of those that hold so little
    assert ceiling10 == "At 10%, oracle:sinks=2, which knows what follows, keeps 78.1% ± 0.1%: a bound, not a method."
    assert ceiling25.startswith("At 25%, oracle")


def test_a_report_tells_what_was_not_served_of_each_run_by_its_own_name(tmp_path) -> None:
    """Two runs of one recipe go by their folders' names; what was asked for stands in the spec of each."""
    spec = {"name": "twice", "compress": {"policies": ["a", "b", "topk"]}}
    runs = [{"name": name, "status": "finished"} for name in ("one", "two")]
    measured = {name: results().assign(run=name) for name in ("one", "two", "unknown")}
    empty = make_results().head(0)
    path = build_report(empty, [], runs, [spec, {"name": "twice"}], tmp_path / "r.html", compressed=measured)
    parts = path.read_text().split("<h2>What ")[1:]
    assert len(parts) == 3
    assert ["any task at any budget: topk" in part for part in parts] == [True, False, False]
