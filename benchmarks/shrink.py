"""What shrinking a trained model loses: `python benchmarks/shrink.py [--model FOLDER]` prints docs/shrink.md's table.

The model, four blocks of attention of width 64 with a short convolution, learns associative recall (16 pairs of 128
symbols, 96 tokens) for 300 steps, about a minute on two idle cores; --model takes one that was saved before, or saves
it there. Each method is calibrated on 32 prompts; recall is that of 200 others, with 95% intervals over them. Healing
is 40 steps of AdamW at a batch of 64.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from contextlab import build_model, build_task, load_model, save_model, train
from contextlab.convert import shrink
from contextlab.evaluation.intervals import bounds_of, contrast, weighted
from contextlab.models import Model, ModelSpec

TASK = build_task("associative_recall", vocabulary=128, pairs=16, length=96)
METHODS = (
    *(
        f"{name}{pattern}"
        for pattern in (":packed=true", ":pattern=2:4,packed=true")
        for name in ("magnitude", "wanda", "sparsegpt")
    ),
    *("svd:ratio=0.5", "asvd:ratio=0.5", "svd_llm:ratio=0.5"),
    *("channels:share=0.5,refit=false", "channels:share=0.5"),
    *("drop_blocks:count=1", "drop_blocks:count=1,by=loss", "merge_blocks:size=2"),
    *("drop_sublayers:count=2", "drop_sublayers:count=2,what=mlp"),
)
HEALED = (
    "wanda:share=0.8,packed=true",
    "svd_llm:ratio=0.25",
    "drop_blocks:count=2",
    "channels:share=0.5 svd_llm:ratio=0.5",
)


def trained(folder: Path | None) -> Model:
    """The model; seed 0 everywhere."""
    if folder is not None and (folder / "model.json").exists():
        return load_model(folder).eval()
    layer = {"mixer": "attention", "options": {"short_conv": 4}}
    model = build_model(ModelSpec(width=64, depth=4, heads=2, mlp_ratio=2, layers=[layer]).for_task(TASK))
    train(model, TASK, {"steps": 300, "batch": 64, "learning_rate": 0.002, "checkpoint_every": 0})
    if folder is not None:
        save_model(model, folder)
    return model.eval()


@torch.no_grad()
def recall(model: Model) -> str:
    """Right answers, %, of 200 prompts that no one else draws, and the half of their interval (docs/evaluation.md)."""
    prompt = TASK.sample(200, torch.Generator().manual_seed(1234567))
    right = TASK.errors(model(prompt.inputs), prompt)["accuracy"].double()
    each = torch.where(prompt.scored, right, 0.0).sum(1) / prompt.scored.sum(1)
    told = contrast(weighted([("model", 0, "prompts", each.numpy())], 1.0, bounds_of("accuracy")))
    return f"{100 * told.value:.1f} ± {100 * (told.high - told.value):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path)
    model = trained(parser.parse_args().model)
    print(
        "| method | recall, % | healed | loss | weights, of before | seconds |\n| --- | --- | --- | --- | --- | --- |"
    )
    before = shrink(model, "magnitude:share=0", TASK, prompts=32).losses["before"]
    print(f"| none | {recall(model)} | | {before:.3f} | 1 | |")
    for text in (*METHODS, *HEALED):
        began = time.perf_counter()
        found = shrink(model, text.split(), TASK, prompts=32)
        seconds = time.perf_counter() - began
        healed = ""
        if text in HEALED:
            healed = recall(shrink(model, text.split(), TASK, prompts=32, heal={"steps": 40, "batch": 64}).model)
        share, loss = found.bytes_after / found.bytes_before, found.losses["converted"]
        name = " then ".join(f"`{each}`" for each in text.split())
        print(f"| {name} | {recall(found.model)} | {healed} | {loss:.3f} | {share:.2f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
