"""All learners on every prefix of every prompt at once, against loops over prompts and prefixes.

First the regression learners of the textbooks: the loops give each prefix to scikit-learn or torch.linalg, or repeat
the learner's own iteration on it. Both sides run in turn in one process; shown are medians with the smallest and
largest, and how far the answers are apart.

With --all instead every learner on the first task that names it, at the task's default size (or at the first of its
cases that has the learner). The loop gives the learner itself each prefix of each prompt alone; it runs on a few
prefixes of two prompts and is extrapolated to all whose answer is scored, in processor seconds of one thread. Such a
call also answers the shorter prefixes within, which a loop would not have to. Learners that fit one prefix after
another by design are marked. Where a task scores one position, the loop is over prompts alone.

    python benchmarks/learners.py [--all] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso as SklearnLasso
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.neighbors import KNeighborsRegressor
from torch import Tensor

from contextlab import build_task, registry
from contextlab.errors import ContextlabError
from contextlab.learners import (
    Averaging,
    GradientDescent,
    Lasso,
    LeastSquares,
    NearestNeighbours,
    Newton,
    PoolPosterior,
    RegressionLearner,
    Ridge,
)
from contextlab.prompt import Learner, Prompt, Task

NOISE, LASSO, NEIGHBOURS, STEPS = 0.5, 0.1, 3, 10
BATCHED = 5  # runs of the library's side in each turn
Fit = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(X [i, d], y [i], x [d]) -> the prediction at x."""


def averaging(X: Tensor, y: Tensor, x: Tensor) -> Tensor:
    return (y @ X / len(X)) @ x


def knn(X: Tensor, y: Tensor, x: Tensor) -> Tensor:
    model = KNeighborsRegressor(min(NEIGHBOURS, len(X))).fit(X.numpy(), y.numpy())
    return torch.as_tensor(model.predict(x.numpy()[None])[0])


def ols(X: Tensor, y: Tensor, x: Tensor) -> Tensor:
    return torch.linalg.lstsq(X, y.unsqueeze(1), driver="gelsd").solution.squeeze(1) @ x


def ridge(X: Tensor, y: Tensor, x: Tensor) -> Tensor:
    model = SklearnRidge(NOISE**2, fit_intercept=False).fit(X.numpy(), y.numpy())
    return torch.as_tensor(model.predict(x.numpy()[None])[0])


def gradient_descent(X: Tensor, y: Tensor, x: Tensor) -> Tensor:
    S, b, w = X.T @ X / len(X), X.T @ y / len(X), torch.zeros_like(x)
    size = 1 / S.abs().sum(1).max()
    for _ in range(STEPS):
        w = w - size * (S @ w - b)
    return w @ x


def newton(X: Tensor, y: Tensor, x: Tensor) -> Tensor:
    S = X.T @ X
    M = S / torch.linalg.matrix_norm(S, 2) ** 2
    for _ in range(STEPS):
        M = 2 * M - M @ S @ M
    return x @ M @ (X.T @ y)


def lasso(X: Tensor, y: Tensor, x: Tensor) -> Tensor:
    # Prefixes of two or three examples need tens of thousands of passes to the answer.
    model = SklearnLasso(LASSO, fit_intercept=False, tol=1e-8, max_iter=1_000_000).fit(X.numpy(), y.numpy())
    return torch.as_tensor(model.predict(x.numpy()[None])[0])


def pool_posterior(weights: Tensor) -> Fit:
    def fit(X: Tensor, y: Tensor, x: Tensor) -> Tensor:
        posterior = (((y - weights @ X.T) ** 2).sum(1) / (-2 * NOISE**2)).softmax(0)
        return posterior @ weights @ x

    return fit


def loop(fit: Fit, xs: Tensor, ys: Tensor) -> Tensor:
    """Every prediction but the first of each prompt, one after another."""
    out = torch.zeros_like(ys)
    for b in range(xs.shape[0]):
        for i in range(1, xs.shape[1]):
            out[b, i, 0] = fit(xs[b, :i], ys[b, :i, 0], xs[b, i])
    return out


def seconds(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    answer = function()
    return time.perf_counter() - start, answer


def everyone() -> Iterator[tuple[str, Task, str, Learner]]:
    """Each class of learner once: task as shown, task, the learner's name there, learner."""
    seen: set[type[Learner]] = set()
    for defaults in (True, False):
        for entry in registry.entries("task"):
            for options in ({},) if defaults else entry.cases:
                task = entry.build(**options)
                for name, learner in task.learners().items():
                    if type(learner) not in seen:
                        seen.add(type(learner))
                        shown = ", ".join(f"{key}={value}" for key, value in options.items())
                        yield f"{entry.name}({shown})" if shown else entry.name, task, name, learner


def prefix(prompt: Prompt, row: int, stop: int) -> Prompt:
    """The first `stop` tokens of one prompt, with the examples whose output is asked for within them."""
    one, length = prompt.rows(row, row + 1), prompt.length
    hidden = {
        name: value[:, :stop] if value.dim() > 1 and value.shape[1] == length else value
        for name, value in (one.hidden or {}).items()
    }
    tokens = (one.inputs, one.targets, one.scored, one.shot)
    cut = [each[:, :stop] for each in tokens]
    if one.xs is None or one.ys is None or one.at is None:
        return Prompt(*cut, hidden=hidden or None)
    shown = int((one.at < stop).sum())
    return Prompt(*cut, one.xs[:, :shown], one.ys[:, :shown], one.at[:shown], hidden or None)


def cpu_seconds(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.process_time()
    answer = function()
    return time.process_time() - start, answer


def against_itself(task: Task, learner: Learner, prompts: int, prefixes: int) -> dict[str, Any]:
    """Processor seconds of the learner on all prefixes of so many prompts, and of the loop, extrapolated."""
    prompt = task.sample(prompts, torch.Generator().manual_seed(0))
    learner(prompt.rows(0, 2))  # warm-up
    fast, answer = cpu_seconds(lambda: learner(prompt))
    asked = prompt.scored[:2].any(0).nonzero().squeeze(1)
    chosen = asked[torch.linspace(0, len(asked) - 1, min(prefixes, len(asked))).long()].tolist()
    times, apart = [], 0.0
    try:
        for row in range(2):
            for at in chosen:
                part = prefix(prompt, row, at + 1)
                taken, found = cpu_seconds(lambda part=part: learner(part))  # type: ignore[misc]
                times.append(taken)
                apart = max(apart, (found[0, -1] - answer[row, at]).double().nan_to_num().abs().max().item())
    except (ContextlabError, RuntimeError, IndexError, ValueError) as error:
        return {"asked": len(asked), "batched_s": fast, "loops_s": None, "why": str(error).split("\n")[0]}
    slow = statistics.mean(times) * prompts * len(asked)
    return {
        "asked": len(asked),
        "batched_s": fast,
        "loops_s": slow,
        "times_faster": slow / fast,
        "largest_difference": apart,
    }


def all_learners(prompts: int, prefixes: int) -> list[dict[str, Any]]:
    """A row a learner; prints the table."""
    torch.set_num_threads(1)
    rows = []
    for shown, task, name, learner in track(
        list(everyone()), "measuring", console=Console(stderr=True), transient=True
    ):
        found = against_itself(task, learner, prompts, prefixes)
        row = {"task": shown, "name": name, "learner": type(learner).__name__, "by_design": hasattr(learner, "every")}
        rows.append({**row, **found})
    rows.sort(key=lambda row: row.get("times_faster", 0.0))
    table = Table(title=f"{prompts} prompts, loops extrapolated from {prefixes} prefixes of two, processor seconds")
    for column in ("learner", "task", "prefixes", "batched, s", "loops, s", "times faster", "largest difference"):
        table.add_column(column, justify="left" if column in ("learner", "task") else "right")
    for row in rows:
        cells = [row["learner"] + (" (fits prefix by prefix)" if row["by_design"] else ""), row["task"]]
        cells += [str(row["asked"]), f"{row['batched_s']:.3g}"]
        if row["loops_s"] is None:
            cells += ["whole prompts only", "", ""]
        else:
            faster, apart = row["times_faster"], row["largest_difference"]
            cells += [f"{row['loops_s']:.3g}", f"{faster:.0f}", f"{apart:.1e}"]
        table.add_row(*cells)
    Console().print(table)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--examples", type=int, default=40)
    parser.add_argument("--dimensions", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3, help="times that both sides run, in turn")
    parser.add_argument("--all", action="store_true", help="every learner against itself on each prefix alone")
    parser.add_argument("--prefixes", type=int, default=8, help="with --all: prefixes that the loop is measured on")
    options = parser.parse_args()
    if options.all:
        rows = all_learners(options.prompts, options.prefixes)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=2) + "\n")
        return
    warnings.simplefilter("ignore", ConvergenceWarning)

    task = build_task(
        "linear_regression", dimensions=options.dimensions, examples=options.examples, noise=NOISE, pool=64
    )
    prompt = task.sample(options.prompts, torch.Generator().manual_seed(0))
    xs, ys = prompt.xs.double(), prompt.ys.double()
    pool = task.pool_weights().double()
    sides: dict[str, tuple[RegressionLearner, Fit]] = {
        "averaging": (Averaging(), averaging),
        "knn": (NearestNeighbours(NEIGHBOURS), knn),
        "ols": (LeastSquares(), ols),
        "ridge": (Ridge(NOISE**2), ridge),
        "gradient_descent": (GradientDescent(STEPS), gradient_descent),
        "newton": (Newton(STEPS), newton),
        "lasso": (Lasso(LASSO), lasso),
        "pool_posterior": (PoolPosterior(pool, NOISE), pool_posterior(pool)),
    }
    rows: list[dict[str, Any]] = []
    for name, (learner, fit) in sides.items():
        learner.predict(xs, ys)  # warm-up
        fast, slow, apart = [], [], 0.0
        for _ in range(options.repeats):
            many = [seconds(lambda learner=learner: learner.predict(xs, ys)) for _ in range(BATCHED)]  # type: ignore[misc]
            taken, expected = seconds(lambda fit=fit: loop(fit, xs, ys))  # type: ignore[misc]
            fast += [each for each, _ in many]
            slow.append(taken)
            apart = max(apart, (many[0][1] - expected)[:, 1:].abs().max().item())
        rows.append({"learner": name, "batched_s": fast, "loops_s": slow, "largest_difference": apart})

    table = Table(title=f"{options.prompts} prompts, {options.examples} examples, {options.dimensions} dimensions")
    for column in ("learner", "batched, ms", "loops, ms", "times faster", "largest difference"):
        table.add_column(column, justify="left" if column == "learner" else "right")
    totals = [[0.0] * options.repeats, [0.0] * options.repeats]  # of all learners, turn by turn
    for row in rows:
        fast, slow = row["batched_s"], row["loops_s"]
        of_turn = [statistics.median(fast[BATCHED * i : BATCHED * (i + 1)]) for i in range(options.repeats)]
        totals = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(totals, (of_turn, slow), strict=True)]
        shown = [f"{statistics.median(t) * 1e3:.4g} ({min(t) * 1e3:.4g} to {max(t) * 1e3:.4g})" for t in (fast, slow)]
        table.add_row(row["learner"], *shown, _times(of_turn, slow), f"{row['largest_difference']:.1e}")
    table.add_section()
    total_fast, total_slow = (statistics.median(each) for each in totals)
    table.add_row("all", f"{total_fast * 1e3:.4g}", f"{total_slow * 1e3:.4g}", _times(*totals), "")
    Console().print(table)
    if options.json:
        ratios = [slow / fast for fast, slow in zip(*totals, strict=True)]
        figures = {"times_faster": ratios, "batched_s": total_fast, "loops_s": total_slow, "learners": rows}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def _times(fast: list[float], slow: list[float]) -> str:
    """How many times faster, of runs in the same turn: the median, the least and the most."""
    ratios = [b / a for a, b in zip(fast, slow, strict=True)]
    return f"{statistics.median(ratios):.0f} ({min(ratios):.0f} to {max(ratios):.0f})"


if __name__ == "__main__":
    main()
