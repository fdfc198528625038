"""What training in few bits loses: `python benchmarks/train_bits.py` prints docs/linear-forms.md's table.

A transformer of two blocks of width 32 with a short convolution learns associative recall (4 pairs of 32 symbols, 24
tokens) for 200 steps of 32 prompts, each time from three seeds; its linear layers are dense, or round weights, inputs
too, or gradients as well. Recall is that of 500 prompts, the same for all, with Student's t interval over the seeds
(95%). Times are of training, over those of the dense model of the same seed, which is trained just before: the middle
one and the range. About five minutes of a busy core.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from contextlab import build_model, build_task, train
from contextlab.evaluation.intervals import t95
from contextlab.models import Model, ModelSpec

TASK = build_task("associative_recall", vocabulary=32, pairs=4, length=24)
LATENT = {"latent": True}
WITH_INPUTS = {**LATENT, "activations": True}
WHOLE = {**WITH_INPUTS, "gradients": True}
KINDS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "dense": None,
    "`nvfp4`, weights": ("nvfp4", LATENT),
    "`nvfp4`, weights and inputs": ("nvfp4", WITH_INPUTS),
    "`nvfp4`, all": ("nvfp4", WHOLE),
}
SEEDS = (0, 1, 2)


def trained(kind: tuple[str, dict[str, Any]] | None, seed: int) -> tuple[Model, float]:
    """The model and the seconds that its training took."""
    layer = {"mixer": "attention", "options": {"short_conv": 4}}
    spec = ModelSpec(width=32, depth=2, heads=2, mlp_ratio=2, layers=[layer]).for_task(TASK)
    form, options = kind or ("dense", {})
    torch.manual_seed(seed)
    model = build_model(
        ModelSpec.parse({**spec.model_dump(), "linear": [{"layers": "*", "form": form, "options": options}]})
    )
    began = time.perf_counter()
    train(model, TASK, {"steps": 200, "batch": 32, "learning_rate": 0.003, "checkpoint_every": 0}, seed=seed)
    return model.eval(), time.perf_counter() - began


@torch.no_grad()
def recall(model: Model) -> float:
    """Right answers, %, of 500 prompts that no training draws."""
    prompt = TASK.sample(500, torch.Generator().manual_seed(1234567))
    right = TASK.errors(model(prompt.inputs), prompt)["accuracy"]
    return 100 * float(right[prompt.scored].double().mean())


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    for seed in SEEDS:
        for name, kind in KINDS.items():
            dense = trained(None, seed)[1]
            model, seconds = trained(kind, seed)
            found[name].append((recall(model), seconds / dense))
    print("| linear layers | recall, % | time of training, over dense |\n| --- | ---: | ---: |")
    for name, runs in found.items():
        right, times = zip(*runs, strict=True)
        half = t95(len(right) - 1) * statistics.stdev(right) / len(right) ** 0.5
        between = f"{statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f})"
        print(f"| {name} | {statistics.mean(right):.1f} ± {half:.1f} | {between if KINDS[name] else 1} |")


if __name__ == "__main__":
    main()
