"""The sentence of `advise`, its table and its page, on measurements made by hand."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from contextlab.evaluation.advise import Advice, Form, Way
from contextlab.evaluation.results import COMPRESS_COLUMNS, table
from contextlab.models import ModelSpec
from contextlab.report import advice as writer
from contextlab.report.advice import advice_record, advice_table, advice_words, measured, write_advice_page
from contextlab.report.compress_total import front, points, weights_words
from contextlab.report.lint_advice import lint_advice, lint_weights
from contextlab.report.total_figure import kept_against_total

PROMPTS = 64
Key = tuple[str, str, str]
SPEC = ModelSpec(width=8, depth=1, read_in="token", input_size=8, output_size=8)
FORMS = {label: Form(label, kind, SPEC, lambda: None) for label, kind in (
    ("", "policy"), ("rtn:bits=8", "weights"), ("linear", "model"))}  # fmt: skip


def advice(accuracies: dict[Key, float], totals: dict[Key, int], memory: float, full: float = 1.0) -> Advice:
    """(form, policy, budget) -> accuracy and all bytes; those above the memory are left out."""
    rng, rows, ways = np.random.default_rng(0), [], []
    hard = rng.permutation(np.linspace(0.0, 1.0, PROMPTS))
    every = {("", "full", "full"): full, **accuracies}
    for key, accuracy in every.items():
        total = totals.get(key, 4000)
        way = Way(FORMS[key[0]], *key[1:], weight_bytes=total // 4, state_bytes=total - total // 4)
        ways.append(way if total <= memory else Way(**{**vars(way), "left_out": "too large"}))
        weights, policy, budget, kind = way.key
        who = {"run": "m", "model": policy, "kind": kind, "seed": 0, "task": "needle", "split": budget, "length": 64}
        values = (hard < accuracy).astype(float)
        half = 2 * values.std(ddof=1) / PROMPTS**0.5
        quality = {"value": values.mean(), "ci_low": values.mean() - half, "ci_high": values.mean() + half}
        who |= {"weights": weights or None, "prompts": "seed 0", "n": PROMPTS, "tokenizer": "bytes"}
        rows.append({**who, "metric": "accuracy", **quality, "chance": 0.1, "values": values})
        for metric, size in (("state_bytes", total), ("weight_bytes", total // 4), ("total_bytes", total), ("kl", 0.0)):
            rows.append({**who, "metric": metric, "value": size, "ci_low": size, "ci_high": size, "sequences": 2})
    results = table(rows, COMPRESS_COLUMNS).assign(values=[row.get("values") for row in rows])
    return Advice("m", memory, 128, 2, 64, ways, results, 1)


A, B, C = ("", "a", "25%"), ("rtn:bits=8", "full", "full"), ("linear", "full", "full")
CASES = {
    "apart": (advice({A: 0.9, B: 0.5}, {A: 1000, B: 900}, 2000), "a at 25% is the best of the 2 ways that fit"),
    "tied": (
        advice({A: 0.9, B: 0.88, C: 0.4}, {A: 1000, B: 900, C: 100}, 2000),
        "Of the 3 ways that fit in 2kB at 128 tokens and 2 sequences, a at 25% and rtn:bits=8 are not told apart",
    ),
    "itself": (advice({A: 0.5}, {A: 100}, 5000), "The model itself fits in 5kB"),
    "as good": (advice({A: 0.5, B: 1.0}, {A: 100, B: 900}, 5000), "rtn:bits=8, which keeps 100.0%"),
    "only": (advice({A: 0.9, B: 0.5}, {A: 1000, B: 900}, 950), "Only rtn:bits=8 fits in 950B"),
    "none": (advice({A: 0.9, B: 0.5}, {A: 1000, B: 900}, 500), "Nothing that was tried fits in 500B"),
    "nothing kept": (advice({A: 0.1, B: 0.1}, {A: 1000, B: 900}, 2000), "none is seen to keep anything"),
    "at chance": (advice({A: 0.1, B: 0.1}, {A: 1000, B: 900}, 2000, full=0.1), "so nothing is ranked"),
}


NONE = CASES["none"][0]
REFUSED = [dataclasses.replace(way, left_out="budget 5% is too small") for way in NONE.ways]
CASES["refused"] = (
    dataclasses.replace(NONE, memory=950, ways=REFUSED),
    "What would fit in 950B at 128 tokens and 2 sequences, such as rtn:bits=8, could not be measured on prompts of 64",
)


@pytest.mark.parametrize("case", CASES)
def test_the_sentence_claims_what_the_data_part_and_no_more(case: str) -> None:
    found, said = CASES[case]
    sentence = advice_words(found)
    assert said in sentence
    assert lint_advice(sentence, found) == []
    if case == "tied":
        assert "rtn:bits=8 takes the fewest bytes of these" in sentence
        assert "(quality measured at 64 tokens)" in sentence
    if case == "none":
        assert "rtn:bits=8, the smallest, takes 900 B" in sentence


@pytest.mark.parametrize(
    ("case", "old", "new"),
    [
        ("tied", r"^Of .*", "a at 25% is the best of the 3 ways that fit in 2kB at 128 tokens and 2 sequences."),
        ("tied", r" and rtn:bits=8 are", ", rtn:bits=8 and linear are"),
        ("tied", r"rtn:bits=8 takes", "a at 25% takes"),
        ("tied", r"keeps 8", "keeps 9"),
        ("apart", r"the 2 ways", "the 3 ways"),
        ("apart", r" in 1000 B", " in 10 B"),
        ("only", r"^Only rtn:bits=8", "Only a at 25%"),
        ("none", r"takes 900 B", "takes 800 B"),
        ("none", r"^.*$", "What would fit in 500B could not be measured on prompts of 64 tokens."),
        ("refused", r"^.*$", "Nothing that was tried fits in 950B at 128: rtn:bits=8, the smallest, takes 900 B."),
        ("at chance", r"^In.*", "The model itself fits in 2kB: nothing need be given up."),
        ("itself", r"nothing need", "the best, nothing need"),
        ("as good", r"rtn:bits=8", "a at 25%"),
    ],
)
def test_a_sentence_with_a_fault_is_caught(case: str, old: str, new: str) -> None:
    found, _ = CASES[case]
    sentence = advice_words(found)
    changed = re.sub(old, new, sentence)
    assert changed != sentence
    assert lint_advice(changed, found)


@pytest.mark.parametrize("parts", [True, False])
def test_a_writer_with_a_fault_is_caught(parts: bool, monkeypatch) -> None:
    found, _ = CASES["tied" if parts else "apart"]
    monkeypatch.setattr(writer, "_apart", lambda one, other: parts)
    assert lint_advice(advice_words(found), found)


def test_the_table_the_record_and_the_page_tell_the_same(tmp_path) -> None:
    found, _ = CASES["tied"]
    rows = advice_table(found)
    assert [(row["weights"], row["policy"], row["budget"]) for row in rows] == [
        ("own", "a", "25%"),
        ("rtn:bits=8", "full cache", ""),
        ("linear", "full cache", ""),
        ("own", "full cache", ""),
    ]
    assert rows[-1]["left out"] == "too large"
    assert rows[-1]["kept"] == "100%"
    record = advice_record(found)
    assert record["advice"] == advice_words(found)
    kept = {each["name"]: each for each in record["ways"]}
    assert kept["linear"]["kept_low"] < kept["linear"]["kept"] < kept["linear"]["kept_high"]
    assert kept["a at 25%"]["total_bytes"] == 1000
    page = write_advice_page(found, tmp_path / "a.html").read_text()
    assert "How to spend 2kB at 128 tokens and 2 sequences on m" in page
    assert page.count("<figure") == 1


def test_forms_of_the_weights_have_a_sentence_with_their_bytes() -> None:
    found, _ = CASES["tied"]
    (sentence,) = weights_words(found.results)
    (form,) = (each for each in points(found.results, 64) if each.name == "rtn:bits=8")
    assert sentence.startswith(f"rtn:bits=8 keeps {form.part.value:.1%} ± ")
    assert "of the model's quality in 22.5% of the bytes of its weights: needle at 64 tokens accuracy" in sentence
    assert lint_weights([sentence], found.results) == []
    for old, new in (("22.5%", "12.5%"), ("keeps 8", "keeps 9"), ("rtn:bits=8 keeps", "rtn:bits=8, the best, keeps")):
        assert old in sentence
        assert lint_weights([sentence.replace(old, new)], found.results)
    assert lint_weights([], found.results)


def test_the_figure_draws_each_way_at_its_bytes_with_its_interval() -> None:
    found, _ = CASES["tied"]
    known = measured(found)
    figure = kept_against_total(list(known.values()), found.memory)
    assert figure.layout.yaxis.tickformat == "~%", "what is kept often differs by less than a percent"
    drawn = {(trace.x[0], trace.y[0]): trace for trace in figure.data if trace.showlegend is False}
    assert drawn.keys() == {(point.bytes, point.part.value) for point in known.values()}
    for point in known.values():
        trace = drawn[point.bytes, point.part.value]
        assert trace.error_y.array[0] == pytest.approx(point.part.high - point.part.value)
    legend = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert legend == ["front of the means", "the model itself", "rtn:bits=8", "linear", "a"]
    names = [point.name for point in front(list(known.values()))]
    assert names == ["linear", "rtn:bits=8", "a at 25%", "the model itself"]
    assert figure.layout.shapes[0].x0 == found.memory
