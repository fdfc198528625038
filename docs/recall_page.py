"""What `docs/figures.py` makes of a run of `mixers-on-recall`: docs/recall.svg and the part of docs/recall.md below it.

Every sentence follows from the table, so that a test can hold the page to it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

import contextlab.mixers  # noqa: F401  (registers every mixer)
from contextlab import registry
from contextlab.experiments.opened import Run
from contextlab.experiments.recipes import load_recipe
from contextlab.report.crowd import many_against_state
from contextlab.report.findings import findings
from contextlab.report.sweep import compared_at, setting_in_words
from contextlab.words import bytes_in_words, listed

TASK, RATE = "recall", "train.learning_rate"
MARKS = ("<!-- written by docs/figures.py -->", "<!-- end of what docs/figures.py wrote -->")
ROW = re.compile(
    r"^\| `(\w+)` \| ([\w -]+) \| ([\d.]+)%(?: \(([\d.]+) to ([\d.]+)\))? \| ([\d.]+) (B|KiB) "
    r"\| (.*) \| (.*) \| (.*) \|$",
    re.M,
)
VECTOR = 1280
"""Bytes: states of so many or fewer are a vector."""
NARROW = ("block_local", "sliding_window", "sigmoid_window", "multi_scale_window", "transformer_xl", "titans_mac",
          "hierarchical_memory", "infini_attention", "lm2", "recurrent_memory", "sentinel")  # fmt: skip
"""Mixers that see a quarter of the prompt at once: windows and segments of 16 tokens."""
SOLVED, CHANCE = 99.0, 100 / 64


@dataclass(frozen=True)
class Row:
    """A mixer in the table. accuracy, low, high: in percent, with the 95% interval where it is known. state: bytes.

    rate: that was chosen. window, trials: in words; "" where nothing was swept.
    """

    name: str
    family: str
    accuracy: float
    low: float | None
    high: float | None
    state: float
    rate: str = ""
    window: str = ""
    trials: str = ""


@dataclass(frozen=True)
class Setup:
    """What all mixers of the run share.

    steps: the most of a training. minutes: of the whole run, `jobs` trainings at once. halving: its rungs, in words; ""
    for none. compared: where in training the windows are.
    """

    steps: int
    rates: int
    seeds: int
    prompts: int
    minutes: float
    jobs: int
    halving: str = ""
    compared: str = "the end"


def rows_of(run: Run) -> list[Row]:
    """Of a run of `mixers-on-recall`, the best first."""
    results = run.results[run.results["task"] == TASK]
    (here,) = findings(results, run.by_prompt)
    state = results[results["metric"] == "state_bytes"].groupby("model")["value"].median()
    records = {str(record["model"]): record for record in run.records}
    found = []
    for mean in here.ranked("accuracy"):
        record = records[mean.label]
        sweep = record.get("sweep") or {}
        window = (sweep.get("windows") or {}).get(RATE)
        found.append(
            Row(
                mean.label, registry.lookup("mixer", mean.label).family,
                100 * mean.value, 100 * mean.told.low, 100 * mean.told.high,
                float(state[mean.label]), setting_in_words(record["train_spec"]["learning_rate"]),
                " to ".join(f"{end:g}" for end in dict.fromkeys(window)) if window else "",
                str(sweep.get("trials", "")),
            )
        )  # fmt: skip
    return found


def setup_of(run: Run) -> Setup:
    """What a run says of itself."""
    spec = load_recipe(run.folder / "experiment.yaml")
    first = spec.trainings()[0]
    took = datetime.fromisoformat(run.record["ended"]) - datetime.fromisoformat(run.record["started"])
    sweep = spec.sweep_of(first.model_name)
    halving = spec.halving_of(first.model_name)
    words = "" if halving is None else " and ".join(f"{rung:g}" for rung in halving.rungs)
    settings = len(sweep.settings()) if sweep.over else 1
    prompts = spec.evaluate_spec(TASK).prompts
    compared = compared_at(run.records[0].get("sweep") or {})
    return Setup(
        first.train.steps, settings, len(spec.seeds), prompts, took.total_seconds() / 60, run.record["jobs"], words,
        compared,
    )  # fmt: skip


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown."""
    lines = [
        "| mixer | family | recall accuracy | state after a prompt | learning rate | window | rates tried |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        interval = "" if row.low is None else f" ({row.low:.1f} to {row.high:.1f})"
        lines.append(
            f"| `{row.name}` | {row.family} | {row.accuracy:.1f}%{interval} | {bytes_in_words(int(row.state))} | "
            f"{row.rate} | {row.window} | {row.trials} |"
        )
    return "\n".join(lines)


def parse(text: str) -> list[Row]:
    """The rows of a table in Markdown, as the page shows them."""
    found = []
    for name, family, accuracy, low, high, size, unit, *rest in ROW.findall(text):
        state = float(size) * (1024 if unit == "KiB" else 1)
        ends = (float(low), float(high)) if low else (None, None)
        found.append(Row(name, family, float(accuracy), *ends, state, *rest))
    return found


def caption(setup: Setup, rows: Sequence[Row]) -> str:
    """What the figures are of."""
    mamba = next((row for row in rows if row.name == "mamba2"), None)
    elsewhere = (
        f" [MAD's suite](suites.md) has Mamba-2 at 100% in its recall, where it is at {mamba.accuracy:.1f}% here."
        if mamba is not None and mamba.accuracy < 95
        else ""
    )
    if setup.rates > 1:
        how = (
            f"At most {setup.steps} steps each, the best of {setup.rates} learning rates on validation prompts, "
            f"{setup.seeds} seeds, {setup.prompts} test prompts; 95% intervals over seeds and prompts together. "
        )
        dropped = (
            f"Successive halving drops rates at {setup.halving} of the steps, by the first seed (see [the life of a "
            "run](runs.md#halving)). "
            if setup.halving
            else ""
        )
        dropped += (
            f"Window: where the validation score at {setup.compared} stays within 95% of the best; what is best at the "
            "end may lie outside of it."
        )
        cannot = " A low figure says that the mixer had not learned it so, not that it cannot."
        if setup.halving:
            cannot += " A better rate may have been dropped early: how often, the same page says."
    else:
        how = f"{setup.steps} steps each, one learning rate for all, one seed, {setup.prompts} prompts."
        dropped = " Differences of a few points mean nothing."
        cannot = (
            " A low figure says that the mixer had not learned it in so many steps at this rate, not that it cannot: "
            "many curves had not levelled off, or stood on a plateau, and what is good for one mixer need not be for "
            "another."
        )
    took = f" The run took {setup.minutes:.0f} minutes, with {setup.jobs} trainings at once."
    return f"*{how}{dropped}{cannot}{elsewhere}{took}*"


def sentences(rows: Sequence[Row]) -> str:
    """What can be read from the table, a bullet each."""
    by_name = {row.name: row for row in rows}
    full = by_name["attention"].state
    bullets = [
        _solved(rows),
        _family(rows, "delta", full),
        _vectors(rows),
        _narrow([by_name[name] for name in NARROW if name in by_name]),
        f"Of the static mixers `hyena`, which cannot ask by content, comes to {by_name['hyena'].accuracy:.1f}%; the "
        f"n-gram head, which looks up just this, to {by_name['ngram'].accuracy:.1f}%.",
        f"`mla` is given a latent of one head's size, 64 numbers a token, and holds {by_name['mla'].state / full:.0%} "
        "of attention's state. Its default is four times as large, made for the paper's many heads: with one head it "
        "would hold more than twice what attention holds.",
    ]
    if chance := [row for row in rows if row.low is not None and row.low <= CHANCE]:
        bullets.append(f"Not told apart from chance ({CHANCE:.1f}%) by these seeds and prompts: {_names(chance)}.")
    if any(row.window for row in rows):
        bullets.append(_windows(rows))
    return "What can be read from it:\n\n" + "\n".join(f"- {each}" for each in bullets)


def _solved(rows: Sequence[Row]) -> str:
    """By family, who reaches 99%."""
    solved = [row for row in rows if row.accuracy >= SOLVED]
    parts = []
    for family in dict.fromkeys(row.family for row in rows):
        own = [row for row in rows if row.family == family]
        good = [row for row in own if row in solved]
        if good:
            parts.append(f"{len(good)} of {len(own)} {family} mixers")
    return f"{len(solved)} of {len(rows)} mixers reach {SOLVED:.0f}% or more: {listed(parts) or 'none'}."


def _family(rows: Sequence[Row], family: str, full: float) -> str:
    own = [row for row in rows if row.family == family]
    least = min(own, key=lambda row: row.accuracy)
    largest = max(row.state for row in own)
    return (
        f"The {len(own)} of the {family} family reach {least.accuracy:.1f}% or more, with a state of at most "
        f"{largest / full:.0%} of what attention holds over these prompts."
    )


def _vectors(rows: Sequence[Row]) -> str:
    own = [row for row in rows if row.state <= VECTOR]
    most = max(own, key=lambda row: row.accuracy)
    return (
        f"Those whose state is a vector, of {int(min(row.state for row in own)):,} to "
        f"{int(max(row.state for row in own)):,} bytes ({_names(own)}), come to {most.accuracy:.1f}% at most. It is "
        "not for want of bits: 512 bytes are 4,096 bits, and 16 pairs of 128 symbols are 224."
    )


def _narrow(rows: Sequence[Row]) -> str:
    best = sorted(rows, key=lambda row: -row.accuracy)
    told = listed([f"`{row.name}` {row.accuracy:.1f}%" for row in best]) or "none"
    return (
        "Those that see a window or segment of 16 tokens at once, a quarter of the prompt (of `multi_scale_window` a "
        f"quarter of the heads see 32), come to: {told}."
    )


def _windows(rows: Sequence[Row]) -> str:
    """How narrow the windows of learning rates are, and which rates were chosen."""
    one = [row for row in rows if row.window and " to " not in row.window]
    tried = sorted({float(end) for row in rows for end in row.window.split(" to ") if end})
    most = f"{tried[0]:g} to {tried[-1]:g}"
    wide = [row for row in rows if row.window == most]
    counts = Counter(float(row.rate) for row in rows)
    told = listed([f"{rate:g} for {counts[rate]}" for rate in sorted(counts)])
    return (
        f"The learning rate that was chosen is {told} mixers. "
        + (f"{len(wide)} of {len(rows)} stay within 95% of their best from {most}; " if len(tried) > 1 else "")
        + f"{len(one)} do so at one rate alone"
        + (f" ({_names(one)})." if one else ".")
    )


def _names(rows: Iterable[Row]) -> str:
    return listed([f"`{row.name}`" for row in rows]) or "none"


def written(setup: Setup, rows: Sequence[Row]) -> str:
    """All that stands between the marks."""
    shown = table(rows)
    told = parse(shown)  # sentences follow from what the page shows
    return f"{caption(setup, told)}\n\n{shown}\n\n{sentences(told)}"


def put(page: str, text: str) -> str:
    """The page with another text between its marks."""
    before, _, rest = page.partition(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}"


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Those of which none with as few bytes is better, by their bytes."""
    found: list[Row] = []
    for row in sorted(rows, key=lambda row: (row.state, -row.accuracy)):
        if not found or row.accuracy > found[-1].accuracy:
            found.append(row)
    return found


def draw(rows: Sequence[Row]) -> go.Figure:
    """Accuracy against bytes of state, with intervals and the frontier."""
    frame = pd.DataFrame(
        {
            "label": row.name,
            "value": row.accuracy / 100,
            "ci_low": (row.accuracy if row.low is None else row.low) / 100,
            "ci_high": (row.accuracy if row.high is None else row.high) / 100,
            "bytes": row.state,
        }
        for row in rows
    )
    figure = many_against_state(frame, {row.name: row.family for row in rows}, "accuracy")
    best = frontier(rows)
    end = max(row.state for row in rows)
    figure.add_scatter(
        x=[*(row.state for row in best), end], y=[*(row.accuracy / 100 for row in best), best[-1].accuracy / 100],
        mode="lines", line={"shape": "hv", "color": "#888888", "width": 1, "dash": "dot"}, name="frontier",
    )  # fmt: skip
    return figure


def joined(page: str, run_rows: Sequence[Row]) -> list[Row]:
    """The rows of a page, with those of a run of some mixers in their places, the best first."""
    new = {row.name for row in run_rows}
    kept = [row for row in parse(page) if row.name not in new]
    return sorted([*kept, *run_rows], key=lambda row: -row.accuracy)


def renewed(page: str, setup: Setup, run_rows: Sequence[Row]) -> str:
    """The page with the rows of a run of some of its mixers, or of new ones, and a caption that says so.

    Raises ValueError where the run is not of the page's steps, rates, seeds and prompts.
    """
    whole, part = _run_of(page), caption(setup, run_rows).strip("*")
    begins, ends = part.split(" Successive")[0], f"The run took {setup.minutes:.0f} minutes"
    if not whole.startswith(f"*{begins}"):
        raise ValueError(f"the page is of other trainings: it does not begin with {begins!r}")
    told = parse(table(joined(page, run_rows)))
    names = listed([f"`{row.name}`" for row in sorted(run_rows, key=lambda row: row.name)])
    later = f" {names}: from a later run of the same recipe with these models alone. {ends}.*"
    return put(page, f"{whole.removesuffix('*')}{later}\n\n{table(told)}\n\n{sentences(told)}")


def _run_of(page: str) -> str:
    """The caption on a page."""
    return page.partition(MARKS[0])[2].strip().partition("\n")[0]


def write(run: Run) -> None:
    """Write docs/recall.svg and what docs/recall.md has of the run, or of the mixers that the run has."""
    rows, path = rows_of(run), Path("docs/recall.md")
    page, setup = path.read_text(), setup_of(run)
    known = {row.name for row in parse(page)}
    page = put(page, written(setup, rows)) if known <= {row.name for row in rows} else renewed(page, setup, rows)
    figure = draw(parse(page))
    figure.write_image("docs/recall.svg", width=1080, height=figure.layout.height)
    path.write_text(page)
