"""What early decisions cost: halving and `until` against the full grid, on mixers that differ in how late they learn.

    python benchmarks/halving.py [--json FILE] [--jobs 2] [--docs] [--rehearse]

The grid is that of recipe `mixers-on-recall-quick`: each of twelve mixers at every learning rate from every seed, each
trained once and whole. While it trains it is measured, twelve times, by accuracy and cross-entropy on the prompts that
`until` looks at, on those of the sweep's validation, and on those of a test. Then each rule decides offline on these
numbers, by the library's own functions (`benchmarks/halving_rules.py`): all rules are compared on the same trainings.

Trainings are written to the JSON file as they end, and one that is there is not made again. Printed are a paragraph
and a table, which `--docs` also writes into docs/runs.md. `--rehearse` does the same with three mixers, tiny prompts,
and 48 steps, in a minute.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from contextlab.errors import InputError
from contextlab.evaluation.machine import machine_record
from contextlab.experiments import ExperimentSpec, load_recipe
from contextlab.experiments.jobs import Training
from contextlab.files import read_json, write_json
from contextlab.models import build_model
from contextlab.training import train
from contextlab.training.until import STREAM
from contextlab.training.validation import Score, ValidationSpec, validate_all
from halving_rules import METRICS, TASK, TEST, VALIDATION, told

RECIPE = "mixers-on-recall-quick"
MIXERS = (
    "attention", "lightning_attention", "linear_attention", "delta_net", "gated_delta_net", "rwkv7", "hgrn2", "gla",
    "mamba2", "retention", "hyena", "lstm",
)  # fmt: skip
DOCS = Path(__file__).resolve().parent.parent / "docs" / "runs.md"
MARKS = ("<!-- written by benchmarks/halving.py -->", "<!-- end of what benchmarks/halving.py wrote -->")
PARTS = 12
"""Looks in a training, evenly over its steps: the rungs and the looks of `until` are among them."""
PROMPTS = {STREAM: 256, VALIDATION: 512, TEST: 256}
"""Of each stream."""
SMALL = (
    f"tasks.{TASK}.train.steps={4 * PARTS}", f"tasks.{TASK}.train.batch=8", f"tasks.{TASK}.train.curriculum={{}}",
    f"tasks.{TASK}.options={{vocabulary: 16, pairs: 2, length: 8}}", "seeds=[0, 1]",
)  # fmt: skip
"""What a rehearsal changes in the recipe."""


def grid(rehearse: bool) -> ExperimentSpec:
    """The recipe's trainings of the twelve mixers, each of which goes to its last step."""
    spec = load_recipe(RECIPE, ["early=false", *(SMALL if rehearse else ())])
    chosen = MIXERS[::5] if rehearse else MIXERS
    return spec.model_copy(update={"models": {name: spec.models[name] for name in chosen}})


def measured(training: Training, prompts: dict[str, int]) -> dict[str, Any]:
    """Train once and whole, on one core. Returns plain data: what it was, how it went, and its looks.

    prompts: stream -> how many. seconds: of training, without the looks.
    """
    torch.set_num_threads(1)
    task, every = training.tasks[TASK], training.train.steps // PARTS
    model = build_model(training.model, seed=training.seed)
    looks: list[dict[str, Any]] = []
    looking = 0.0

    def look(step: int, steps: int, loss: float) -> None:
        nonlocal looking
        began = time.perf_counter()
        if step % every == 0:
            found = {
                stream: validate_all(model, task, ValidationSpec(prompts=count), METRICS, stream=stream)
                for stream, count in prompts.items()
            }
            looks.append({"step": step} | {stream: _plain(scores) for stream, scores in found.items()})
        looking += time.perf_counter() - began

    spec = training.train.model_copy(update={"log_every": every})
    result = train(model, task, spec, seed=training.seed, progress=look)
    return {
        "model": training.model_name, "trial": training.trial, "seed": training.seed,
        "setting": dict(training.setting), "steps": training.train.steps, "prompts": prompts, "status": result.status,
        "made": result.step, "seconds": result.seconds - looking, "looking": looking, "looks": looks,
    }  # fmt: skip


def _plain(scores: dict[str, Score]) -> dict[str, list[float]]:
    """Metric -> value, ends of the interval, prompts, in few digits."""
    return {metric: [float(f"{number:.7g}") for number in score] for metric, score in scores.items()}


def put(page: str, text: str) -> str:
    """The page with another text between its marks. Raises InputError where it has none."""
    before, mark, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (mark and end):
        raise InputError(f"{DOCS}: expected the lines {MARKS[0]} and {MARKS[1]}, between which the text goes")
    return f"{before}{mark}\n\n{text}\n\n{end}{after}"


def main() -> None:
    """Train what is missing, decide, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, default=None, help="where the trainings are written; halving.json by default"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--docs", action="store_true", help=f"write what is printed into {DOCS}")
    parser.add_argument("--rehearse", action="store_true")
    chosen = parser.parse_args()
    spec = grid(chosen.rehearse)
    prompts = dict.fromkeys(PROMPTS, 64) if chosen.rehearse else PROMPTS
    path = chosen.json or Path("halving-rehearsal.json" if chosen.rehearse else "halving.json")
    known: dict[str, Any] = read_json(path) if path.exists() else {"machine": machine_record(), "trainings": {}}
    trainings = {training.key: training for training in spec.trainings()}
    for key, training in trainings.items():
        before = known["trainings"].get(key)
        now = {"setting": dict(training.setting), "steps": training.train.steps, "prompts": prompts}
        if before is not None and {name: before[name] for name in now} != now:
            raise InputError(f"{path}: {key} is of another grid; give another file with --json")
    todo = [training for key, training in trainings.items() if key not in known["trainings"]]
    began, known_before = time.perf_counter(), len(known["trainings"])
    with ProcessPoolExecutor(chosen.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(measured, training, prompts): training for training in todo}
        for done in as_completed(waiting):
            found = done.result()
            known["trainings"][waiting[done].key] = found
            write_json(path, known)
            print(
                f"{len(known['trainings'])} of {len(trainings)}: {waiting[done].key} {found['status']}, "
                f"{found['seconds']:.1f} s and {found['looking']:.1f} s of looks",
                flush=True,
            )
    made = len(known["trainings"]) - known_before
    print(f"\n{made} trainings made in {time.perf_counter() - began:.0f} s, {chosen.jobs} at once\n")
    words = told(spec, [known["trainings"][key] for key in trainings])
    print(words)
    if chosen.docs:
        DOCS.write_text(put(DOCS.read_text(), words))


if __name__ == "__main__":
    main()
