"""The report: one HTML file that needs nothing else, no network included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from contextlab.evaluation import Measured, summarise
from contextlab.files import write_atomic
from contextlab.inspect.looking import looked_words
from contextlab.plugins import plugin_options
from contextlab.prompt import HIGHER_IS_BETTER
from contextlab.report.compress import compress_table
from contextlab.report.compress_total import weights_words
from contextlab.report.digest import Digest
from contextlab.report.kept import compress_words, kept_tables, not_served
from contextlab.report.naming import (
    ALL_ALIKE,
    ASIDE,
    COST_METRICS,
    bytes_in_words,
    label,
    metric_title,
)
from contextlab.report.packing import Packed, packed_plotly
from contextlab.report.page_data import PageData, first_figure, first_sentences, folded
from contextlab.report.pages import interval_words
from contextlab.report.sections import CompressData, CostData, Drawn, OverviewData, TaskData
from contextlab.report.sentences import summary_words
from contextlab.report.starts import starts_table
from contextlab.report.suite import suite_table
from contextlab.report.summary import summary_table
from contextlab.report.sweep import chosen_table
from contextlab.words import flat

LEADING = ("models_by_tasks", "examples", "state")
"""Figures that a report may open with, the first of them that it has."""


def build_report(
    results: pd.DataFrame,
    records: Sequence[Mapping[str, Any]],
    run_records: Sequence[Mapping[str, Any]],
    specs: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    facets: pd.DataFrame | None = None,
    similarity: pd.DataFrame | None = None,
    by_prompt: pd.DataFrame | None = None,
    compressed: Mapping[str, pd.DataFrame] | None = None,
    inspected: Mapping[str, pd.DataFrame] | None = None,
) -> Path:
    """Write the report of one or several runs.

    results: tidy table. records: one mapping a training. run_records: one a run. specs: the runs' ExperimentSpecs.
    facets, similarity, by_prompt: the runs' other tables (see `evaluation.measure`); None for runs that have none.
    compressed: a run's name -> what a model of it loses under policies (see `evaluation.compress`).
    inspected: a run's name -> what probes found inside its models (see `contextlab.inspect.look`).
    """
    more = {"facets": facets, "similarity": similarity, "by_prompt": by_prompt}
    measured = Measured(results, **{name: rows for name, rows in more.items() if rows is not None})
    names = [str(each["name"]) for each in run_records]
    asked = {name: (spec.get("compress") or {}).get("policies", ()) for name, spec in zip(names, specs, strict=True)}
    data, tasks, digest = PageData(), _tasks(results), Digest(results, by_prompt)
    words = summary_words(results, records, by_prompt, digest)
    overview = data.draw(OverviewData(measured, records, digest))
    sections = [_section(data, TaskData(task, measured, records, digest)) for task in tasks]
    lead = first_figure([overview, *(section["drawn"] for section in sections)], LEADING)
    first = first_sentences(words, tasks)
    data.hold_csv(results)
    data.rows = _table_rows(results)
    page = template("report.html.j2").render(
        title=" + ".join(dict.fromkeys(names)),
        descriptions=list(dict.fromkeys(each.get("description", "") for each in run_records)),
        lead=lead,
        first=[folded(sentence) for sentence in first],
        words=[sentence for sentence in words if sentence not in first],
        compressed=[
            (
                str(found["run"].iloc[0]),
                name,
                compress_words(found),
                kept_tables(found),
                not_served(found, asked.get(name, ())),
            )
            for name, found in (compressed or {}).items()
            if not found.empty
        ],
        inspected=[(name, looked_words(found)) for name, found in (inspected or {}).items() if not found.empty],
        overview=suite_table(results, by_prompt, digest),
        starts=starts_table(records, len(set(names)) > 1),
        chosen=chosen_table(records, len(set(names)) > 1),
        overview_drawn=overview,
        tables=summary_table(results, records, by_prompt, digest),
        sections=sections,
        every_shot=data.every_shot,
        trainings=[_training(record) for record in records],
        specs=[
            (
                name,
                yaml.safe_dump(_plain(spec), sort_keys=False, width=100),
                plugin_options(each.get("plugins") or ()),
            )
            for name, spec, each in zip(names, specs, run_records, strict=True)
        ],
        runs=[
            (name, flat({key: value for key, value in record.items() if key != "description"}))
            for name, record in zip(names, run_records, strict=True)
        ],
        pieces=page_pieces(data),
    )
    write_atomic(Path(path), page)
    return Path(path)


def write_cost_figure(results: pd.DataFrame, path: str | Path) -> Path:
    """Write the figures of `contextlab cost` as one HTML file that needs nothing else."""
    names = ", ".join(dict.fromkeys(results["model"]))
    data = PageData()
    drawn = data.draw(CostData(results))
    page = template("cost.html.j2").render(
        title=f"What context costs {names}",
        drawn=drawn,
        pieces=page_pieces(data),
    )
    write_atomic(Path(path), page)
    return Path(path)


def write_compress_page(results: pd.DataFrame, path: str | Path, left_out: Sequence[str] = ()) -> Path:
    """Write what `contextlab compress` found as one HTML file that needs nothing else.

    left_out: a line for each setting that could not be measured.
    """
    data = PageData()
    drawn = data.draw(CompressData(results))
    page = template("compress.html.j2").render(
        title=f"What {results['run'].iloc[0]} loses when its context is made cheaper",
        words=[*compress_words(results), *weights_words(results)],
        tables=compress_table(results),
        kept=kept_tables(results),
        not_served=not_served(results),
        left_out=left_out,
        spread=interval_words(results["seed"].nunique()),
        drawn=drawn,
        pieces=page_pieces(data),
    )
    write_atomic(Path(path), page)
    return Path(path)


def render(name: str, path: str | Path, drawn: Sequence[Drawn], **more: Any) -> Path:
    """Write a page of these figures as one HTML file that needs nothing else. more: what else the template shows."""
    data = PageData()
    shown = data.hold(drawn)
    page = template(name).render(drawn=shown, pieces=page_pieces(data), **more)
    write_atomic(Path(path), page)
    return Path(path)


def template(name: str) -> Template:
    """A template of the report's pages."""
    return _environment().get_template(name)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """Reads and compiles each template once a process, and again where its file has changed."""
    return Environment(
        loader=PackageLoader("contextlab.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )


def _tasks(results: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(results.loc[~results["split"].isin(ASIDE), "task"]))


def page_pieces(data: PageData) -> list[tuple[str, Packed]]:
    """What the page's script unpacks, by the id of its element."""
    return [("page", data.packed()), ("plotly", packed_plotly())]


def _section(page: PageData, data: TaskData) -> dict[str, Any]:
    """The figures and tables of one task; those that its data cannot fill are left out."""
    rows, here = data.rows, data.known.of(data.task)
    several_learners = rows.loc[rows["kind"] == "learner", "model"].nunique() > 1
    return {
        "task": data.task,
        "drawn": page.draw(data),
        "examples": [] if here is None else data.known.examples(here),
        "share": data.metric in HIGHER_IS_BETTER,
        "best": next(iter(rows.loc[rows["kind"] == "learner", "model"]), ""),
        "compare": several_learners and (rows["kind"] == "model").any(),
    }


def _table_rows(results: pd.DataFrame) -> list[list[Any]]:
    """The measurements over all shots, seeds put together: a cell a column, and last the value to sort by."""
    chosen = results[results["shot"].isna()]
    found = summarise(chosen)
    found = found.assign(label=label(found, results["run"].nunique() > 1))
    rows = []
    for row in found.to_dict("records"):
        cost = row["metric"] in COST_METRICS
        half = (row["ci_high"] - row["ci_low"]) / 2
        rows.append(
            [
                row["task"],
                "" if cost else row["split"],
                row["label"],
                row["kind"],
                metric_title(row["metric"]) if cost else row["metric"].replace("_", " "),
                "no answer" if pd.isna(row["value"]) else _shown(row["metric"], row["value"]),
                "" if cost or pd.isna(row["value"]) else _spread(half),
                int(row["n"]) if not pd.isna(row["n"]) else "",
                int(row["seeds"]),
                None if pd.isna(row["value"]) else float(f"{row['value']:.6g}"),
            ]
        )
    return rows


def _spread(half: float) -> str:
    """Of a value that was measured on prompts; see `naming.interval_in_words`."""
    return "one prompt" if pd.isna(half) else f"± {half:.2g}" if half > 0 else ALL_ALIKE


def _shown(metric: str, value: float) -> str:
    return bytes_in_words(value) if metric.endswith("_bytes") else f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"


def _training(record: Mapping[str, Any]) -> dict[str, str]:
    seconds = record.get("seconds")
    return {
        "task": str(record["task"]),
        "model": str(record["model"]),
        "seed": str(record["seed"]),
        "status": str(record["status"]),
        "message": str(record.get("message", "")),
        "steps": f"{record['steps']:,}" if "steps" in record else "",
        "seconds": f"{seconds:.0f}" if seconds is not None else "",
        "parameters": f"{record['parameters']:,}" if "parameters" in record else "",
        "training_set": "; ".join(_training_set(each) for each in (record.get("training_set") or {}).values()),
    }


def _training_set(told: Mapping[str, Any]) -> str:
    """12,800 prompts (12,790 different), 200 epochs."""
    different = "" if told["distinct"] == told["examples"] else f" ({told['distinct']:,} different)"
    return f"{told['examples']:,} prompts{different}, {told['epochs']:.4g} epoch{'s' * (told['epochs'] != 1)}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value
