"""Run the fuzz: `python -m tests.soak.fuzz --count 2000 --seed 0`. Exit code 1 where a case is not in order."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process that has started threads cannot fork


def prepare(whole: Path) -> None:
    """A small finished run and a saved model, which cases take copies of."""
    from contextlab.experiments import run
    from contextlab.models import build_model, save_model

    recipe = {
        "name": "tiny",
        "tasks": {
            "regression": {"task": "linear_regression", "options": {"dimensions": 2, "examples": 4}},
            "recall": {"task": "associative_recall", "options": {"vocabulary": 16, "pairs": 2, "length": 8}},
        },
        "models": {"softmax": {"preset": "transformer", "options": {"width": 8, "depth": 1, "heads": 2}}},
        "train": {"steps": 4, "batch": 4, "log_every": 1, "checkpoint_every": 2},
        "evaluate": {"prompts": 16, "batch": 16},
    }
    run(recipe, out=whole / "run", jobs=1)
    sizes = {"read_in": "token", "input_size": 256, "output_size": 256}
    save_model(build_model("transformer", width=16, depth=2, heads=2, **sizes), whole / "saved")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--count", type=int, default=2000)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--limit", type=float, default=10.0, help="Seconds of the processor that a case may take.")
    options.add_argument("--spawned", type=int, default=40, help="Every so many cases one is a real process.")
    options.add_argument("--first", type=int, default=0, help="Leave out the cases before this one.")
    options.add_argument("--only", type=int, nargs="+", help="Do these cases alone, and print all that they say.")
    options.add_argument("--profile", action="store_true", help="With --only: say where the time goes.")
    options.add_argument("--tell", action="store_true", help="Print every case and what it says.")
    options.add_argument("--out", type=Path, help="Write the cases that are not in order here, a JSON line each.")
    given = options.parse_args()

    import torch

    from contextlab.cli.run import run as command
    from tests.soak.fuzz.cases import Generator
    from tests.soak.fuzz.worker import PROFILE, Outcome, forked, spawned

    if given.profile:
        os.environ[PROFILE] = "1"

    torch.set_num_threads(1)
    generator = Generator(given.seed, check="check" in inspect.signature(command).parameters)
    base = Path(tempfile.mkdtemp(prefix="fuzz-"))
    began, faults, codes = time.monotonic(), [], Counter[int]()
    slowest: list[tuple[float, list[str]]] = []
    if given.out:
        given.out.write_text("")
    try:
        prepare(base / "whole")
        for number in range(given.count):
            case = generator.case()
            if number < given.first or (given.only is not None and number not in given.only):
                continue
            folder = base / f"case{number}"
            folder.mkdir()
            if "@/saved" in case.arguments and not case.arguments[0].startswith("damage"):
                shutil.copytree(base / "whole" / "saved", folder / "saved")
            whole = number % given.spawned == 0 and case.arguments[0] in (
                "list",
                "show",
                "cost",
                "run",
                "schema",
                "words",
            )
            outcome: Outcome = (spawned if whole else forked)(case, folder, given.limit)
            if outcome.processor > given.limit and not outcome.fault:
                outcome.fault = f"takes {outcome.processor:.1f} s"
            codes[outcome.code] += 1
            slowest = sorted([*slowest, (outcome.processor, case.arguments)], key=lambda pair: -pair[0])[:5]
            if outcome.fault:
                last = (outcome.errors.strip().splitlines() or [""])[-1][:300]
                faults.append({"case": number, "fault": outcome.fault, "arguments": case.arguments, "says": last})
                if given.out:  # at once, so that a run that is stopped has told what it found
                    given.out.write_text("".join(json.dumps(each) + "\n" for each in faults))
                print(f"{number}: {outcome.fault}: {' '.join(case.arguments)[:200]!r}: {last}", flush=True)
            if given.tell:
                said = (outcome.errors.strip() or outcome.output.strip()).splitlines() or [""]
                print(number, outcome.code, repr(" ".join(case.arguments)[:150]), "=>", said[-1][:250], flush=True)
            if given.only is not None:
                print(case, outcome.output, outcome.errors, f"{outcome.processor:.1f} s", sep="\n", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            if (number + 1) % 100 == 0:
                print(f"{number + 1} cases, {len(faults)} not in order, {time.monotonic() - began:.0f} s", flush=True)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    kinds = Counter(str(each["fault"]).split(":")[0] for each in faults)
    print(
        f"{sum(codes.values())} cases, seed {given.seed}: exit codes {dict(codes)}; "
        f"not in order: {dict(kinds) or 'none'}"
    )
    print("slowest: " + "; ".join(f"{seconds:.1f} s {' '.join(words)[:80]!r}" for seconds, words in slowest))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
