"""The figures that are of no single task: of a report's overview, of the cost page and of the compress page."""

from __future__ import annotations

from contextlab.registry import register
from contextlab.report import figures
from contextlab.report.compress_figure import quality_against_bytes
from contextlab.report.compress_total import points
from contextlab.report.naming import metric_title
from contextlab.report.sections import CompressData, CostData, Drawn, OverviewData
from contextlab.report.suite import suite_sketch
from contextlab.report.total_figure import kept_against_total
from contextlab.words import counted, listed

COSTS = ("decode_seconds_per_token", "state_bytes", "prefill_seconds", "peak_bytes", "flops")


@register("figure", "models_by_tasks", family="overview", page="overview")
def models_by_tasks(data: OverviewData) -> Drawn | None:
    """Models by tasks, where there are several of both."""
    figure = suite_sketch(data.results, figures.styles(data.results), data.measured.by_prompt, data.digest)
    return None if figure is None else Drawn("Models by tasks, on prompts as in training", figure)


@register("figure", "cost_by_length", family="cost", page="cost")
def cost_by_length(data: CostData) -> list[Drawn]:
    """Each cost by the length of the context."""
    measured = set(data.results["metric"])
    return [Drawn(metric_title(m), figures.cost_by_length.sketch(data.results, m)) for m in COSTS if m in measured]


@register("figure", "quality_against_bytes", family="compression", page="compress")
def quality_of_policies(data: CompressData) -> list[Drawn]:
    """Quality against bytes of state, a figure for each task and length."""
    results, drawn = data.results, []
    seeds = results["seed"].nunique()
    spread = interval_words(seeds)
    for task, length in results[["task", "length"]].drop_duplicates().itertuples(index=False):
        n = int(results.loc[(results["task"] == task) & (results["metric"] == "kl"), "n"].min())
        each = f" of each of {seeds} seeds" if seeds > 1 else ""
        note = f"{n} prompts{each}, read up to the question, then the question, then token by token; bars are {spread}."
        figure = quality_against_bytes.sketch(results, str(task), int(length))
        drawn.append(Drawn(f"{task}, {length:,} tokens", figure, note))
    return drawn


@register("figure", "kept_against_total", family="compression", page="compress")
def kept_of_total(data: CompressData) -> list[Drawn]:
    """What is kept against the bytes of weights and states together, a figure for each length."""
    drawn = []
    for length in dict.fromkeys(data.results["length"]):
        found = points(data.results, int(length))
        if len(found) < 2:
            continue
        counts = data.results.loc[data.results["metric"] == "total_bytes", "sequences"].dropna()
        held = f"the {'state' if counts.max() == 1 else 'states'} of {counted(int(counts.max()), 'sequence')}"
        tasks = listed([word.partition(" at ")[0] for word in found[0].mean.words])
        note = (
            f"Bytes are those of the weights and {held}. Means over {tasks}; bars are 95% intervals of what is kept on "
            "the same prompts. What did not serve all of these is left out."
        )
        figure = kept_against_total.sketch(found)
        drawn.append(Drawn(f"Kept quality against all bytes, {int(length):,} tokens", figure, note))
    return drawn


def interval_words(seeds: int) -> str:
    """What the bars of compress figures show, by the number of seeds."""
    return "95% intervals over prompts" if seeds == 1 else "95% intervals over prompts and seeds"
