"""The page of probes: of each its words, then its figures; every figure is one that Plotly knows."""

from __future__ import annotations

import pandas as pd
import pytest

from contextlab.evaluation.results import typed
from contextlab.inspect import Looked, probe_table
from contextlab.inspect.looking import ALL, LeftOut, over_seeds
from contextlab.inspect.probe import records
from contextlab.report.looked import looked_sections, looked_tables, write_looked_page


@pytest.fixture
def table():
    parts = []
    for task in ("recall", "regression"):
        for model in ("transformer", "mamba2"):
            for seed in (0, 1, 2):
                streams = probe_table(
                    {
                        "site": f"blocks.{layer}.output",
                        "what": "weights in the stream",
                        "measure": "r2",
                        "value": 0.1 * layer + 0.01 * seed,
                        "ci_low": 0.1 * layer + 0.01 * seed - 0.02,
                        "ci_high": 0.1 * layer + 0.01 * seed + 0.02,
                        "control": 0.0,
                        "n": 64,
                    }
                    for layer in range(3)
                )
                heads = probe_table(
                    {"site": f"blocks.{layer}.mixer", "head": head, "what": what, "measure": "share"}
                    | {"value": 0.9 if head == layer else 0.1, "control": 0.05, "n": 64}
                    for layer in range(2)
                    for head in range(2)
                    for what in ("previous", "induction")
                )
                who = {"run": "r", "model": model, "task": task, "seed": seed}
                parts += [streams.assign(**who, probe="linear"), heads.assign(**who, probe="heads:prompts=8")]
    return typed(pd.concat(parts, ignore_index=True), ALL)


def test_a_section_for_each_task_and_probe(table):
    sections = looked_sections(records(over_seeds(table)))
    assert [each.title for each in sections] == [
        "recall: linear",
        "recall: heads:prompts=8",
        "regression: linear",
        "regression: heads:prompts=8",
    ]
    lines, maps = sections[:2]
    assert len(lines.drawn) == 1
    assert len(maps.drawn) == 2  # a model each
    assert lines.words == [
        f"{model}: The stream after layer 2 holds the prompt's weights (R2 0.21 [0.18, 0.24], control 0.00)."
        for model in ("transformer", "mamba2")
    ]
    named = [trace["name"] for trace in lines.drawn[0].made.data if trace.get("name")]
    assert named == ["transformer", "transformer, control", "mamba2", "mamba2, control"]
    heat = maps.drawn[0].figure.data[0]  # Plotly takes it
    assert list(heat.x) == ["previous", "induction"]
    assert list(heat.y) == ["head 0.0", "head 0.1", "head 1.0", "head 1.1"]
    assert heat.z[0][0] == pytest.approx(0.9)
    assert heat.z[1][0] == pytest.approx(0.1)


def test_the_page_has_words_tables_and_what_was_left_out(table, tmp_path):
    page = write_looked_page(
        Looked(table, [LeftOut("heads", "m", "t", "no reason")]), tmp_path / "p.html", "Inside"
    ).read_text()
    assert page.count("holds the prompt&#39;s weights (R2 0.21 [0.18, 0.24], control 0.00).") == 4
    assert "heads (m, t): no reason" in page
    assert len(page) < 2_000_000
    rows = looked_tables(records(over_seeds(table)))["linear, mamba2, recall, r"]
    assert rows[2]["value"] == "0.210 [0.178, 0.242]"
    assert rows[2]["control"] == "0.000"


def test_a_reason_that_is_true_of_several_models_is_told_once():
    left_out = [LeftOut("heads", model, "t", "no reason") for model in ("a", "b", "b")]
    left_out.append(LeftOut("heads", "c", "t", "another"))
    found = Looked.join([Looked(typed(pd.DataFrame(columns=list(ALL)), ALL), [each]) for each in left_out])
    assert found.reasons == ["heads (a and b, t): no reason", "heads (c, t): another"]
