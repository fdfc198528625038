"""Figures of many models: each name is found, at its mark or in the list; colours are of families."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest

from contextlab import registry
from contextlab.evaluation.results import table
from contextlab.report import by_split, curve, quality_against_state, training_curves
from contextlab.report.crowd import AT_MARK, LETTER, LINE, SIZE
from contextlab.report.drawing import styles
from contextlab.report.families import families
from contextlab.report.page_data import PageData
from contextlab.report.sections import Drawn

NAMES = [entry.name for entry in registry.entries("mixer") if entry.factory.__module__.startswith("contextlab.")]


@pytest.fixture(scope="module")
def many():
    """Sixty mixers and more: twenty on one spot, the others anywhere."""
    rng, rows = np.random.default_rng(0), []
    for i, name in enumerate(NAMES):
        value, size = (1.0, 33_000) if i < 20 else (float(rng.random()), 2 ** float(rng.uniform(9, 17)))
        who = {"run": "r", "model": name, "kind": "model", "seed": 0, "task": "recall", "length": 64, "n": 99}
        for split in ("train", "pairs=8"):
            each = {
                "metric": "accuracy",
                "split": split,
                "value": value,
                "ci_low": value - 0.01,
                "ci_high": value + 0.01,
            }
            rows += [{**who, **each, "shot": shot} for shot in (None, 1, 2)]
        rows.append({**who, "metric": "state_bytes", "split": "cost", "value": size, "ci_low": size, "ci_high": size})
    return table(rows)


def test_each_name_stands_at_its_mark_or_in_the_list(many):
    figure = quality_against_state(many, "recall", "accuracy")
    *marks, listed = [each for each in figure.layout.annotations if each.name == AT_MARK]
    names = [each.text for each in marks if each.text in NAMES]
    told = re.findall(r"\w+", listed.text.replace("<br>", " "))
    assert len(names) > 30
    assert sorted(names + [name for name in told if name in NAMES]) == sorted(NAMES)
    numbers = [each.text for each in marks if each.text not in NAMES]
    assert all(number in listed.text for number in numbers)
    assert "1</b>  100.0%, 32.23 KiB: " in listed.text


def test_no_name_stands_on_another(many):
    figure = quality_against_state(many, "recall", "accuracy")
    (low, high), (bottom, top) = figure.layout.xaxis.range, figure.layout.yaxis.range
    boxes = []
    for each in (each for each in figure.layout.annotations if each.name == AT_MARK and each.text in NAMES):
        x = (each.x - low) / (high - low) * (SIZE[0] - 80) + each.ax
        y = (each.y - bottom) / (top - bottom) * SIZE[1] - each.ay
        width = LETTER * len(each.text)
        left = x - {"left": 0, "right": width, "center": width / 2}[each.xanchor]
        boxes.append((left, y - LINE / 2, left + width, y + LINE / 2))
    for a, b in itertools.combinations(boxes, 2):
        assert not (a[0] < b[2] - 1e-6 and b[0] < a[2] - 1e-6 and a[1] < b[3] - 1e-6 and b[1] < a[3] - 1e-6)


def test_many_models_have_the_colours_and_the_legend_of_their_families(many):
    look = styles(many)
    family = families(NAMES)
    assert set(family.values()) == {registry.lookup("mixer", name).family for name in NAMES}
    assert len({look[name]["colour"] for name in NAMES}) == len(set(family.values()))
    records = [
        {"task": "recall", "tasks": ["recall"], "model": n, "history": {"step": [1, 2], "loss": [2.0, 1.0]}}
        for n in NAMES
    ]
    figures = [draw(many, "recall", "accuracy") for draw in (curve, by_split)]
    figures.append(training_curves(many, records, "recall"))
    for figure in figures:
        legend = [trace.name for trace in figure.data if trace.showlegend is not False]
        assert sorted(legend) == sorted(set(family.values()))
        own = {trace.name: trace for trace in figure.data if trace.name in family and trace.y is not None}
        assert set(own) == set(NAMES)
        assert all(trace.legendgroup == family[name] for name, trace in own.items())


def test_few_models_and_models_of_unknown_families_keep_a_colour_each(many):
    assert families(NAMES[:12]) == {}
    assert families([f"mine_{i}" for i in range(40)]) == {}
    few = many[many["model"].isin(NAMES[:8])]
    assert len({look["colour"] for look in styles(few).values()}) == 8


def test_shares_end_at_one_and_bytes_are_told_in_powers_of_two(many):
    figure = quality_against_state(many, "recall", "accuracy")
    assert 1 <= figure.layout.yaxis.range[1] < 1.05
    for trace in figure.data:
        reach = np.asarray(trace.y, dtype=float) + np.asarray(trace.error_y.array, dtype=float)
        assert reach.max() <= 1 + 1e-12
    assert figure.layout.xaxis.ticktext[0] == "512 B"
    assert all(re.fullmatch(r"\d+ (B|KiB|MiB)", text) for text in figure.layout.xaxis.ticktext)
    assert all(math.log2(value).is_integer() for value in figure.layout.xaxis.tickvals)


def test_a_figure_with_names_at_its_marks_is_as_wide_as_the_page(many):
    data = PageData()
    assert data._add(Drawn("t", quality_against_state(many, "recall", "accuracy")))["wide"]
    assert not data._add(Drawn("t", curve(many, "recall", "accuracy")))["wide"]
