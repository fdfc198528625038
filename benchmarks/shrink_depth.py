"""A third of the blocks removed, and healed: `python benchmarks/shrink_depth.py` prints a table of docs/shrink.md.

`--table mod` prints that of tokens that skip blocks, in place of it.

A byte-level transformer like that of the recipe `byte-lm`, of six blocks of width 48, reads source code (the standard
library of this Python) for 300 steps of 16 x 64 bytes, from each of three seeds. Methods are calibrated on 16 prompts.
Healing is 80 steps of the same batch: of all weights, or of LoRA that is merged. "Trained on" is the whole model after
as many steps more. Bits a byte are of 64 windows of the test part, the same ones for all; 95% intervals (Student's t)
are over the three seeds, those of what is lost over the differences to the whole model of the same seed.
"""

from __future__ import annotations

import argparse
import math
import time
from statistics import mean, stdev

import torch

from contextlab import build_model, build_task, train
from contextlab.convert import Calibration, shrink
from contextlab.models import Model, ModelSpec

TASK = build_task("language_modelling", length=64)
TEST = build_task("language_modelling", length=64, part="test")
BATCH = 16
FULL = {"learning_rate": 0.001, "batch": BATCH}
LORA = {**FULL, "learning_rate": 0.003, "lora": {"rank": 8}}
ROWS = (
    ("trained on", "", FULL),
    ("`drop_blocks:count=2`", "drop_blocks:count=2", None),
    ("`drop_blocks:count=2`, healed", "drop_blocks:count=2", FULL),
    ("`drop_blocks:count=2`, healed with LoRA", "drop_blocks:count=2", LORA),
    ("`drop_blocks:count=2,by=loss`, healed", "drop_blocks:count=2,by=loss", FULL),
    ("`heads:share=0.5`", "heads:share=0.5", None),
    ("`heads:share=0.5`, healed", "heads:share=0.5", FULL),
)
ROUTED = (
    ("trained on", "", FULL),
    ("`mod:share=0.5`", "mod:share=0.5", None),
    ("`mod:share=0.5`, healed", "mod:share=0.5", FULL),
    ("`mod:share=0.25`, healed", "mod:share=0.25", FULL),
    ("`mod:share=0.5,every=1`, healed", "mod:share=0.5,every=1", FULL),
    ("`drop_blocks:count=2`, healed", "drop_blocks:count=2", FULL),
)
TABLES = {"depth": ROWS, "mod": ROUTED}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Half the width of a 95% interval in standard errors, by the number of seeds."""


def trained(seed: int, steps: int) -> Model:
    """The model of this seed, which also draws its prompts."""
    layer = {"mixer": "attention", "options": {"short_conv": 4}}
    spec = ModelSpec(width=48, depth=6, heads=4, mlp_ratio=2, layers=[layer]).for_task(TASK)
    model = build_model(spec, seed=seed)
    train(
        model, TASK, {"steps": steps, "batch": BATCH, "learning_rate": 0.003, "checkpoint_every": 0}, seed=seed,
        progress=False,
    )  # fmt: skip
    return model.eval()


def bits(model: Model) -> float:
    """Bits a byte of the test windows."""
    return Calibration.of_task(TEST, 64, seed=99).loss(model) / math.log(2)


def told(values: list[float], sign: str = "", places: int = 3) -> str:
    """The mean and half of its interval over seeds."""
    half = STUDENT[len(values)] * stdev(values) / len(values) ** 0.5
    return f"{mean(values):{sign}.{places}f} ± {half:.{places}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--heal", type=int, default=80)
    parser.add_argument("--seeds", type=int, choices=STUDENT, default=3)
    parser.add_argument("--table", choices=TABLES, default="depth")
    given = parser.parse_args()
    rows_of_table = TABLES[given.table]
    torch.set_num_threads(1)
    began = time.process_time()
    whole: list[float] = []
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name, _, _ in rows_of_table}
    for seed in range(given.seeds):
        model = trained(seed, given.steps)
        whole.append(bits(model))
        size, state, flops = model.weight_nbytes, model.state_nbytes(1024), model.flops(1024)
        for name, method, heal in rows_of_table:
            steps = 0 if heal is None else {"steps": given.heal, **heal}
            made = shrink(model, method or "magnitude:share=0", TASK, prompts=16, heal=steps, seed=seed).model
            cost = made.weight_nbytes / size, made.state_nbytes(1024) / state, made.flops(1024) / flops
            found[name].append((bits(made), *cost))
    parts = ["weights, of before", "state, of before", "FLOPs, of before"][: 3 if given.table == "mod" else 2]
    print(f"| | bits a byte | lost | {' | '.join(parts)} |\n" + "| --- " * (3 + len(parts)) + "|")
    print(f"| whole | {told(whole)} | |" + " 1 |" * len(parts))
    for name, rows in found.items():
        after = [row[0] for row in rows]
        lost = [a - b for a, b in zip(after, whole, strict=True)]
        costs = " | ".join(f"{each:.2f}" for each in rows[0][1 : 1 + len(parts)])
        print(f"| {name} | {told(after)} | {told(lost, '+')} | {costs} |")
    print(f"{time.process_time() - began:.0f} processor seconds")


if __name__ == "__main__":
    main()
