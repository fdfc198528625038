"""Models that draft for themselves: `python benchmarks/self_drafting.py --seconds 4` prints a table of docs/shrink.md.

The models are those of `early_exits.py`: six blocks, three seeds, trained on for 80 steps, plainly or with LayerSkip.
Each writes 64 bytes after each of eight texts of 64 bytes that were not trained on, by the likeliest byte, plainly and
by drafts of 4 bytes, in turns. Intervals are over the seeds; the time is a median of the turns.
"""

from __future__ import annotations

import argparse
import time

import torch

from contextlab.convert import shrink
from contextlab.evaluation import time_drafts
from contextlab.training.distributed import seeded
from early_exits import HEALED
from shrink_depth import STUDENT, TASK, TEST, told, trained

DRAFTS = [{"layers": layers, "ahead": 4} for layers in (1, 2, 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--heal", type=int, default=80)
    parser.add_argument("--seeds", type=int, choices=STUDENT, default=3)
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing each draft")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    prompts = TEST.sample(8, seeded("self drafting", 0)).inputs
    found: dict[tuple[str, int], list[tuple[float, float, float, float]]] = {}
    for seed in range(given.seeds):
        model = trained(seed, given.steps)
        for name, heal in HEALED:
            healed = shrink(
                model, "magnitude:share=0", TASK, prompts=16, heal={"steps": given.heal, **heal}, seed=seed
            ).model
            for one in time_drafts(healed, prompts, 64, DRAFTS, seconds=given.seconds):
                row = (100 * one.acceptance, one.per_pass, one.ratio[1], 100 * one.same)
                found.setdefault((name, one.layers), []).append(row)
    print("| 80 steps more | layers that draft, of 6 | accepted, % | bytes a pass | times as long | same bytes, % |")
    print("| --- " * 6 + "|")
    for (name, layers), rows in found.items():
        accepted, per_pass, ratio, same = (list(each) for each in zip(*rows, strict=True))
        shown = " | ".join((told(accepted, places=1), told(per_pass, places=2), told(ratio, places=2)))
        print(f"| {name} | {layers} | {shown} | {min(same):.1f} |")
    print(f"{time.process_time() - began:.0f} processor seconds")


if __name__ == "__main__":
    main()
