"""Answers before the last block: `python benchmarks/early_exits.py` prints a table of docs/shrink.md.

The models, their text and what is measured are those of `shrink_depth.py`: six blocks, three seeds. Each is trained on
for 80 steps, plainly or with LayerSkip, and then answers early. Layers are the mean over the bytes of the test windows;
"other answers" is the share of them whose likeliest next byte is not that of the same model with all its layers.
"""

from __future__ import annotations

import argparse
import time

import torch

from contextlab.convert import Calibration, shrink
from contextlab.convert.depth.early import early_answers
from contextlab.models import Model
from shrink_depth import FULL, STUDENT, TASK, TEST, bits, told, trained

SKIPPING = {**FULL, "layer_skip": {"dropout": 0.1, "scale": 0.5}}
HEALED = (("trained on", FULL), ("`layer_skip:scale=0.5`", SKIPPING))
EARLY = ("", "exit_at:blocks=4", "calm:threshold=0.8", "calm:threshold=0.5", "calm:by=saturation,threshold=0.97")


def measured(model: Model, method: str, data: Calibration) -> tuple[float, float, float]:
    """Bits a byte, layers, and the share of other answers, of a model that answers early."""
    if not method:
        return bits(model), float(model.spec.depth), 0.0
    early = shrink(model, method, TASK, prompts=16).model
    return (bits(early), *early_answers(model, early, data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--heal", type=int, default=80)
    parser.add_argument("--seeds", type=int, choices=STUDENT, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for seed in range(given.seeds):
        model, data = trained(seed, given.steps), Calibration.of_task(TEST, 64, seed=99)
        for name, heal in HEALED:
            healed = shrink(
                model, "magnitude:share=0", TASK, prompts=16, heal={"steps": given.heal, **heal}, seed=seed
            ).model
            for method in EARLY:
                found.setdefault((name, method), []).append(measured(healed, method, data))
    print("| 80 steps more | answers | bits a byte | layers, of 6 | other answers, % |\n" + "| --- " * 5 + "|")
    for (name, method), rows in found.items():
        after, layers, differ = (list(each) for each in zip(*rows, strict=True))
        others = told([100 * each for each in differ], places=1) if method else ""
        shown = f"`{method}`" if method else "after all"
        print(f"| {name} | {shown} | {told(after)} | {told(layers, places=2)} | {others} |")
    print(f"{time.process_time() - began:.0f} processor seconds")


if __name__ == "__main__":
    main()
