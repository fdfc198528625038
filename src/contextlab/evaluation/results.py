"""The tables of results: one tidy row a measurement, in Parquet."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from contextlab.errors import InputError, first_line
from contextlab.evaluation.intervals import t95
from contextlab.files import write_atomic
from contextlab.prompt import HIGHER_IS_BETTER

COLUMNS = (
    "run", "model", "kind", "seed", "task", "split", "metric", "shot", "length", "value", "ci_low", "ci_high", "n",
)  # fmt: skip
FACET_COLUMNS = (
    "run", "model", "kind", "seed", "task", "split", "facet", "low", "high", "metric",
    "value", "ci_low", "ci_high", "n",
)  # fmt: skip
SIMILARITY_COLUMNS = (
    "run", "model", "seed", "task", "split", "learner", "measure", "value", "ci_low", "ci_high", "n",
)  # fmt: skip
BY_PROMPT_COLUMNS = (
    "run", "model", "kind", "seed", "task", "split", "metric", "prompts", "chance", "values",
)  # fmt: skip
COMPRESS_COLUMNS = (*COLUMNS, "chance", "tokenizer", "prompts", "values", "weights", "sequences")
DTYPES = {
    **dict.fromkeys(("run", "model", "kind", "task", "split", "metric", "facet", "learner", "measure"), "string"),
    **dict.fromkeys(("prompts", "tokenizer", "weights", "probe", "site", "what"), "string"),
    **dict.fromkeys(("seed", "shot", "length", "n", "sequences", "layer", "head", "place"), "Int64"),
    **dict.fromkeys(("low", "high", "value", "ci_low", "ci_high", "chance", "control", "at"), "float64"),
    "values": "object",
}
_PANDAS: dict[str, Any] = {"string": pd.StringDtype(), "Int64": pd.Int64Dtype()}
_ARROW = {"string": pa.string(), "Int64": pa.int64(), "float64": pa.float64(), "object": pa.list_(pa.float32())}
_PANDAS_OF = {_ARROW[name]: dtype for name, dtype in _PANDAS.items()}


def schema(columns: Sequence[str] = COLUMNS) -> pa.Schema:
    """The Parquet schema of a table."""
    return pa.schema([(name, _ARROW[DTYPES[name]]) for name in columns])


class Results(pd.DataFrame):
    """A table that prints all of its columns, in blocks where the terminal is narrow; what is made of it is plain."""

    @property
    def _constructor(self) -> Any:
        return pd.DataFrame

    def __repr__(self) -> str:
        most = pd.get_option("display.max_rows") or len(self)
        width = shutil.get_terminal_size().columns
        return pd.DataFrame(self).to_string(max_rows=most, line_width=width, show_dimensions=len(self) > most)


def table(rows: Iterable[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> pd.DataFrame:
    """A table of rows; columns that a row lacks are missing values."""
    if not (rows := list(rows)):
        return _empty(tuple(columns)).copy()
    return pd.DataFrame({name: _column([row.get(name) for row in rows], DTYPES[name]) for name in columns})


def _column(values: list[Any], dtype: str) -> Any:
    """One column; made as what it is, it takes half the time of one that is cast."""
    return pd.array(values, dtype=_PANDAS[dtype]) if dtype in _PANDAS else pd.Series(values, dtype=dtype)


@cache
def _empty(columns: tuple[str, ...]) -> pd.DataFrame:
    return pd.DataFrame({name: _column([], DTYPES[name]) for name in columns})


def typed(frame: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """The frame with these columns as tables have them; a cast takes milliseconds, where all are so already, too."""
    wanted = {name: _PANDAS.get(DTYPES[name], DTYPES[name]) for name in columns}  # two kinds of strings are "string"
    other = {name: dtype for name, dtype in wanted.items() if frame[name].dtype != dtype}
    return frame.astype(other) if other else frame


def write_results(results: pd.DataFrame, path: str | Path, columns: Sequence[str] = COLUMNS) -> Path:
    """Write a table to a Parquet file, atomically. Raises InputError when columns are missing.

    columns: COLUMNS of results, FACET_COLUMNS, SIMILARITY_COLUMNS or BY_PROMPT_COLUMNS.
    """
    missing = [name for name in columns if name not in results]
    if missing:
        raise InputError(f"results lack the columns {', '.join(missing)}; expected {', '.join(columns)}")
    buffer = io.BytesIO()
    frame = typed(results[list(columns)], columns)
    pq.write_table(pa.Table.from_pandas(frame, schema=schema(columns), preserve_index=False), buffer)
    write_atomic(Path(path), buffer.getvalue())
    return Path(path)


def read_results(
    paths: str | Path | Iterable[str | Path], columns: Sequence[str] = COLUMNS, optional: Sequence[str] = ()
) -> pd.DataFrame:
    """Read one or more tables of the same columns into one. Raises InputError for files that are none.

    optional: columns that tables of older versions may lack; they are read as missing values.
    """
    frames = []
    for path in [paths] if isinstance(paths, str | Path) else paths:
        try:
            found = pq.read_table(path)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file") from None
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{path}: damaged or not Parquet ({first_line(error)})") from None
        missing = [name for name in columns if name not in (*found.column_names, *optional)]
        if missing:
            raise InputError(f"{path}: is not a results table: it lacks the columns {', '.join(missing)}")
        there = [name for name in columns if name in found.column_names]
        frame = found.select(there).to_pandas(types_mapper=_PANDAS_OF.get).reindex(columns=list(columns))
        frames.append(typed(frame, columns))
    if not frames:
        raise InputError("expected at least one results file")
    return pd.concat(frames, ignore_index=True)


def read_compressed(paths: str | Path | Iterable[str | Path]) -> pd.DataFrame:
    """Read tables of `compress`; in older ones there are no chances, tokenizers, weights and values by prompt."""
    return read_results(paths, COMPRESS_COLUMNS, COMPRESS_COLUMNS[len(COLUMNS) :])


def summarise(results: pd.DataFrame) -> pd.DataFrame:
    """The results with the seeds put together: the mean over seeds and its 95% confidence interval.

    With one seed the interval is that over prompts alone; of one prompt there is none, whatever the seeds. With s >= 2
    seeds it is Student's t interval over the seeds' means; their spread already holds the noise of the prompts' draw
    that differs between seeds, but all seeds answer the same prompts, so the prompts' own half-width is added in
    quadrature. That counts the noise of single answers twice and is on the safe side; `intervals.contrast` does not,
    and needs the values by prompt. Shares, such as accuracy, stay within 0 and 1. Returns the same columns without
    `seed`, and `seeds`; `n` is the smallest number of prompts. Tables of facets and similarities are put together
    likewise.
    """
    measured = ("seed", "value", "ci_low", "ci_high", "n", "chance", "control", "prompts", "values")
    keys = [name for name in results.columns if name in DTYPES and name not in measured]
    columns = [*keys, "value", "ci_low", "ci_high", "n", "seeds"]
    dtypes = {**{name: DTYPES[name] for name in columns if name in DTYPES}, "seeds": "Int64"}
    if results.duplicated(keys).any():
        found = _over_seeds(results, keys)
    else:  # one seed each, as most often; grouping takes three times as long
        found = results.assign(seeds=1)
    if "metric" in found:
        share = found["metric"].isin(HIGHER_IS_BETTER)
        for end in ("ci_low", "ci_high"):
            found[end] = found[end].mask(share, found[end].clip(0.0, 1.0))
    return found[columns].reset_index(drop=True).astype(dtypes)


def _over_seeds(results: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """`summarise` where some keys have several seeds: the same columns, and others."""
    groups = results.assign(half=(results["ci_high"] - results["ci_low"]) / 2).groupby(
        list(keys), dropna=False, sort=False, observed=True
    )
    found = groups.agg(
        value=("value", "mean"),
        ci_low=("ci_low", "first"),
        ci_high=("ci_high", "first"),
        n=("n", "min"),
        seeds=("value", "size"),
        spread=("value", "std"),
        over_prompts=("half", "mean"),
    ).reset_index()
    t = np.array([t95(max(1, int(seeds) - 1)) for seeds in found["seeds"]])
    over_prompts = found["over_prompts"].fillna(0).mask((found["n"] == 1) & found["over_prompts"].isna())
    half = np.hypot(t * found["spread"] / np.sqrt(found["seeds"]), over_prompts)
    several = found["seeds"] > 1
    found["ci_low"] = found["ci_low"].where(~several, found["value"] - half)
    found["ci_high"] = found["ci_high"].where(~several, found["value"] + half)
    return found


def mean_over_shots(results: pd.DataFrame, metric: str, first: int, last: int, split: str = "train") -> pd.DataFrame:
    """The mean of a metric over the shots first..last, for each run, model, seed and task.

    Returns columns run, model, kind, seed, task, value.
    """
    rows = results[(results["metric"] == metric) & (results["split"] == split)]
    rows = rows[rows["shot"].between(first, last).fillna(False)]
    return rows.groupby(["run", "model", "kind", "seed", "task"], observed=True)["value"].mean().reset_index()
