"""Tables on the console: whatever the terminal's width, each name and number stands whole in what is printed."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from rich.cells import cell_len
from rich.text import Text

from contextlab.cli import about, catalogue, cost, learners, run, shared, show, tables
from contextlab.cli import check as check_command
from contextlab.cli import compress as compress_command
from contextlab.report.compress import compress_table
from contextlab.report.learners import learner_table
from contextlab.tasks import build_task
from tests.report.conftest import LEARNERS, make_records, make_results
from tests.report.test_compress import results as compressed

LONG = (
    "gated_delta_net_with_a_name_of_forty_letters",
    "snapkv:window=8,kernel=3|quantize:bits=4,group=32,residual=16",
    "transformer",
    "a",
    "hybrid_of_three_kinds",
)
COMMANDS = (catalogue, show, cost, compress_command, run, learners, about, check_command)


@pytest.fixture
def printed(monkeypatch):
    """All rows that commands hand to the one writer of tables."""
    kept: list[tuple[list, dict]] = []

    def spy(title, rows, **options):
        kept.append((rows, options))
        tables.print_table(title, rows, **options)

    for module in COMMANDS:
        monkeypatch.setattr(module, "print_table", spy)
    return kept


def summary(results: pd.DataFrame, compressed: pd.DataFrame) -> None:
    run._print_summary(
        SimpleNamespace(
            by_prompt=None,
            results=results,
            records=make_records(LONG),
            record={},
            compressed=compressed,
            inspected=pd.DataFrame(),
            folder=Path(),
            report="r.html",
        )
    )


def large_and_small(command: str) -> None:
    """Print what a command prints, of values of all sizes under long names."""
    if command in ("run", "evaluate"):
        results = make_results(models=LONG)
        results.loc[results["metric"] == "squared_error", ["value", "ci_low", "ci_high"]] *= 1e5
        several = pd.concat([results.assign(task=results["task"] + f" {i}") for i in range(2)], ignore_index=True)
        found = compressed()
        found["model"] = found["model"].replace({"a": LONG[1]})
        summary(several, found)
    elif command == "compress":
        found = compressed()
        for title, rows in compress_table(found.assign(value=found["value"] * 1234.567)).items():
            compress_command.print_table(title, rows)
    elif command == "cost":
        rows = [
            {"length": n, "metric": m, "value": v}
            for n in (256, 1 << 20)
            for m, v in (
                ("parameters", 1.721e11), ("flops", 3.4567e18), ("state_bytes", 1.5 * n), ("prefill_seconds", 1.7e5),
                ("decode_seconds_per_token", 1.2e-7), ("peak_bytes", 3e12),
            )
        ]  # fmt: skip
        cost._print_costs(pd.DataFrame(rows), LONG[1])
    elif command == "learners":
        task = build_task("linear_regression")
        results = make_results(models=())
        results = results[(results["kind"] == "learner") & (results["task"] == "regression")]
        results = results.assign(model=results["model"].replace(dict(zip(LEARNERS, LONG, strict=False))))
        for factor in (1.7e5, 1e-7):
            for title, rows in learner_table(
                results.assign(value=results["value"] * factor), {"regression": task}
            ).items():
                learners.print_table(title, rows)


@pytest.mark.parametrize("width", [20, 60, 80, 120])
@pytest.mark.parametrize("command", ["run", "compress", "cost", "learners"])
def test_each_name_and_number_is_found_whole(command, width, printed, capsys, monkeypatch):
    monkeypatch.setattr(shared.console, "width", width)
    large_and_small(command)
    check_whole(printed, capsys.readouterr().out, width)


@pytest.mark.parametrize("width", [20, 60, 80, 120])
@pytest.mark.parametrize(
    "arguments",
    [
        *(("list", kind) for kind in ("mixers", "policies", "conversions", "tasks", "learners", "recipes")),
        *(("show", "policy", "snapkv"), ("show", "task", "linear_regression"), ("doctor",)),
    ],
    ids=" ".join,
)
def test_each_component_and_option_is_found_whole(arguments, width, printed, call, monkeypatch):
    monkeypatch.setattr(shared.console, "width", width)
    code, out, err = call(*arguments)
    assert code == 0, err
    check_whole(printed, out, width)


def check_whole(printed: list, out: str, width: int) -> None:
    assert printed
    lines = out.splitlines()
    words = set(out.split())
    for rows, options in printed:
        prose, optional = options.get("prose", ()), options.get("optional", ())
        named = re.findall(r"Not shown for want of room: (.+?)\.", " ".join(lines))
        for row in rows:
            for column, cell in row.items():
                text = cell.plain if isinstance(cell, Text) else cell
                if column in optional and column in named:
                    continue
                if column in prose or column in optional:
                    assert {word.rstrip(",") for word in text.split()} <= {word.rstrip(",") for word in words}, text
                else:
                    assert any(text in line for line in lines), (width, text)
        if options.get("header", True):
            told = [c for c in rows[0] if c != options.get("heads") and c not in prose]
            for column in told[1:]:  # what the first is, its values say where each row has lines of its own
                assert set(column.split()) <= words | {word.rstrip(",") for word in words} or column in optional
    assert not [line for line in lines if "…" in line]


def test_a_wide_table_is_folded_with_what_tells_its_rows_apart():
    rows = [
        {"task": task, "model": model, **{f"after {n} examples": f"{n}.{n}e+05" for n in range(1, 12)}}
        for task in ("recall", "regression")
        for model in ("transformer", "delta")
    ]
    lines = [line.plain for line in tables.table_lines(rows, 60)]
    assert max(map(cell_len, lines)) <= 60
    assert [line.split()[:2] for line in lines if line.startswith("recall")].count(["recall", "delta"]) == len(
        [line for line in lines if line.split()[:2] == ["task", "model"]]
    )
    found = [re.findall(r"\S+e\+05", line) for line in lines if line.split()[:2] == ["regression", "delta"]]
    assert [number for own in found for number in own] == [f"{n}.{n}e+05" for n in range(1, 12)]


def test_numbers_are_set_to_the_right_under_their_headings_and_words_to_the_left():
    rows = [{"model": "a", "error": "1.5", "kind": "x"}, {"model": "bcd", "error": "-", "kind": "yes"}]
    lines = [line.plain for line in tables.table_lines(rows, 80)]
    assert lines == ["model  error  kind", "a        1.5  x", "bcd        -  yes"]


def test_a_heading_is_broken_between_words_only():
    rows = [{"model": "a model of a long name", "parameters": "1", "squared error": "2"}]
    lines = [line.plain for line in tables.table_lines(rows, 44)]
    assert lines == [
        "                                    squared",
        "model                   parameters    error",
        "a model of a long name           1        2",
    ]


def test_what_is_left_out_is_told_and_how_to_see_it():
    rows = [{"name": "a" * 20, "summary": "word " * 20, "papers": "2310.00001, 2310.00002"}]
    options = {"prose": ["summary"], "optional": ["papers"], "see": "show NAME has them."}
    narrow = " ".join(line.plain for line in tables.table_lines(rows, 60, **options))
    assert "Not shown for want of room: papers. show NAME has them." in narrow
    assert "2310" not in narrow
    wide = " ".join(line.plain for line in tables.table_lines(rows, 90, **options))
    assert "Not shown" not in wide
    assert "2310.00001, 2310.00002" in wide


def test_a_row_that_has_no_room_takes_lines_of_its_own():
    rows = [{"policy": "p" * 50, "error": "1.721e+05", "state": "64 KiB", "decode": ""}]
    assert [line.plain for line in tables.table_lines(rows, 30)] == ["p" * 50, "  error 1.721e+05,", "  state 64 KiB"]


def test_sentences_below_a_row_take_the_whole_width_and_no_more():
    words = [f"{number:0{1 + number % 7}}" for number in range(40)]
    rows = [{"policy": "p" * 38, "error": "1.721e+05", "told": " ".join(words)}]
    below = [line.plain for line in tables.table_lines(rows, 40, prose=["told"])][1:-1]
    lines = [line.split() for line in below]
    assert [word for line in lines for word in line] == words
    for line, after in zip(below, lines[1:], strict=False):
        assert line.startswith("  ")
        assert len(line) <= 40 < len(line) + 1 + len(after[0])


def test_no_command_writes_tables_of_its_own():
    for module in COMMANDS:
        assert not hasattr(module, "Table"), module.__name__
