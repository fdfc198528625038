"""What looking inside costs: `python benchmarks/inside.py [--run runs/demo] [--json F]`.

- capture: a forward of each preset in which all residual streams are taken, over a plain one (width 64, depth 4, 64
  prompts of 32 tokens, no gradients).
- patching: activation patching of all heads and places of the demo's transformer (4 layers, 4 heads, prompts of 16
  tokens), many at once, against one patch after the other by PyTorch's own hooks; of 1 and of 8 prompts.
- maps: bytes that the matrices of one layer of 4 heads take at 4,096 tokens, at the most that the process holds.
- estimate (with --run, a finished run of the demo): of activation patching's ten largest effects on associative recall,
  how many attribution patching has among its ten largest, and its time over that of patching; for each model, mean over
  prompts. A corrupted prompt is one in which the key that is asked for last had another value.

Ratios are of turns in one process, medians with quartiles. What a figure is for: capture at most 1.1, patching at least
10 times as fast, maps under 1 GiB, nine of ten at 2% of the time.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from contextlab import build_model, capture
from contextlab.experiments import find_model, load_recipe
from contextlab.inspect import attribution_effects, mixing, patch_effects
from contextlab.models import Model
from ops import interleaved, times, told

PRESETS = ("transformer", "gated_delta_net", "mamba2", "mambaformer", "retnet")


def ratio(one: Callable[[], Any], other: Callable[[], Any], turns: int) -> dict[str, float]:
    """The time of one over that of the other, turn by turn."""
    seconds = interleaved({"one": one, "other": other}, turns)
    return times(seconds["one"], seconds["other"])


@torch.no_grad()
def capture_cost(name: str, turns: int) -> dict[str, float]:
    """Of all residual streams."""
    model = build_model(name, width=64, depth=4, input_size=64, output_size=64, read_in="token").eval()
    tokens = torch.randint(0, 64, (64, 32))

    def plain() -> None:
        for _ in range(10):
            model(tokens)

    def taking() -> None:
        with capture(model, ["blocks.*.output"]):
            for _ in range(10):
                model(tokens)

    return ratio(taking, plain, turns)


def by_hooks(model: Model, clean: Tensor, corrupted: Tensor, score: Callable[[Tensor], Tensor]) -> list[float]:
    """Activation patching as it is written by hand: a hook, a place and a head after the other."""
    found = []
    for block in model.blocks:
        taken: list[Tensor] = []
        projection = block.mixer.out_proj  # whose input the heads' answers are
        handle = projection.register_forward_pre_hook(lambda _, given, into=taken: into.append(given[0]))
        model(clean)
        handle.remove()
        heads, size = block.mixer.heads, taken[0].shape[-1] // block.mixer.heads
        for place in range(clean.shape[1]):
            for head in range(heads):
                channels = slice(head * size, (head + 1) * size)

                def put(_: Any, given: Any, place: int = place, channels: slice = channels, into: Any = taken) -> Any:
                    value = given[0].clone()
                    value[:, place, channels] = into[0][:, place, channels]
                    return (value,)

                handle = projection.register_forward_pre_hook(put)
                found.append(score(model(corrupted)).mean().item())
                handle.remove()
    return found


@torch.no_grad()
def patching(prompts: int, turns: int) -> tuple[dict[str, float], float]:
    """How many times as fast many at once are as one after the other, and the greatest difference of their scores."""
    model = build_model("transformer", width=64, depth=4, input_size=64, output_size=64, read_in="token").eval()
    clean, corrupted = (torch.randint(0, 64, (prompts, 16)) for _ in range(2))

    def score(y: Tensor) -> Tensor:
        return y[:, -1, 0]

    apart = torch.tensor(by_hooks(model, clean, corrupted, score)) - torch.tensor(
        patch_effects(model, clean, corrupted, score)["score"].to_numpy()
    )
    slow, fast = (
        (lambda: by_hooks(model, clean, corrupted, score)),
        (lambda: patch_effects(model, clean, corrupted, score)),
    )
    return ratio(slow, fast, turns), apart.abs().max().item()


def map_bytes() -> float:
    """GiB by which the process' peak grows while the matrices of a layer of 4,096 tokens are made."""
    model = build_model("gated_delta_net", width=64, depth=1, input_size=64, output_size=64, read_in="token").eval()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.no_grad():
        mixing(model, torch.randint(0, 64, (1, 4096)))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def estimates(folder: Path, prompts: int = 16) -> pd.DataFrame:
    """A row a model of the demo's recall: how many of patching's ten largest the estimate has, and its time."""
    task = load_recipe(folder / "experiment.yaml").build_task("recall")
    prompt = task.sample(prompts, torch.Generator().manual_seed(0))
    clean, rows = prompt.inputs, torch.arange(prompts)
    last = prompt.scored.float().cumsum(1).argmax(1)  # the last place that is scored
    answer, asked = prompt.targets[rows, last], clean[rows, last]
    corrupted, values = clean.clone(), clean[:, 1 : 2 * 16 : 2]  # prompts begin with their 16 pairs of key and value
    first = (clean[:, : 2 * 16 : 2] == asked[:, None]).float().argmax(1)
    corrupted[rows, 2 * first + 1] = values[rows, (first + 1) % 16]

    def score(y: Tensor) -> Tensor:
        return y[rows, last, answer]

    found = []
    for training in sorted((folder / "trainings").glob("recall.*.seed0")):
        model = find_model(training)[1]
        begun = time.perf_counter()
        exact = patch_effects(model, clean, corrupted, score)
        middle = time.perf_counter()
        guess = attribution_effects(model, clean, corrupted, score)
        took = time.perf_counter() - middle
        top = [set(each["effect"].abs().nlargest(10).index) for each in (exact, guess)]
        told = {"of ten": len(top[0] & top[1]), "share of time": took / (middle - begun)}
        correlation = exact["effect"].corr(guess["effect"])
        found.append({"model": training.name.split(".")[1], **told, "correlation": correlation})
    return pd.DataFrame(found)


def main() -> None:
    """Print all figures; --json writes them, too."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--turns", type=int, default=21)
    options.add_argument("--run", type=Path, help="a finished run of the demo")
    options.add_argument("--json", type=Path)
    given = options.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {f"capture, {name}": capture_cost(name, given.turns) for name in PRESETS}
    for prompts in (1, 8):
        of = f"patching, {prompts} prompt{'s' * (prompts > 1)}"
        found[f"{of}, times as fast"], found[f"{of}, greatest difference"] = patching(prompts, given.turns)
    found["maps, GiB"] = map_bytes()
    table = Table("what", "median (quartiles)")
    for what, value in found.items():
        table.add_row(what, told(value) if isinstance(value, dict) else f"{value:.3g}")
    console = Console()
    console.print(table)
    if given.run is not None:
        estimated = estimates(given.run)
        console.print(estimated.to_string(index=False))
        found["estimates"] = estimated.to_dict("records")
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
