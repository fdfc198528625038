"""Decoding with weights in int8 against float32, of one wide model in one process.

`python benchmarks/decode_int8.py [--width 2048] [--depth 2] [--turns 15] [--json FILE]`: the models take turns, a
few tokens each, so that what else the machine does meets all of them; ratios are of neighbouring turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from contextlab.convert import build_conversion
from contextlab.models import Model, build_model

PROMPT, TOKENS = 16, 4


@torch.no_grad()
def seconds_a_token(model: Model) -> float:
    """Of a few tokens after a short prompt, one row."""
    _, state = model.read(torch.arange(PROMPT)[None])
    begun = time.perf_counter()
    for token in range(TOKENS):
        _, state = model.read(torch.tensor([[token]]), state)
    return (time.perf_counter() - begun) / TOKENS


def main() -> None:
    """Measure in turns, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = {"width": options.width, "depth": options.depth, "heads": options.width // 64}
    plain = build_model("transformer", **sizes, read_in="token", input_size=256, output_size=256).eval()
    int8 = build_conversion("rtn", bits=8, group=None)(plain).model.bfloat16()
    models = {
        "float32": plain,
        "bfloat16": build_model(plain.spec).bfloat16().eval(),
        "int8 (in bfloat16)": int8,
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(options.turns + 1):
        for name, model in models.items():
            took = seconds_a_token(model)
            if turn:  # the first warms up
                times[name].append(took)
    table = Table(title=f"decoding, width {options.width}, depth {options.depth}, {torch.get_num_threads()} threads")
    for column in ("model", "MB of weights", "ms a token", "float32 takes", "middle half"):
        table.add_column(column)
    found = {}
    for name, model in models.items():
        ratios = sorted(a / b for a, b in zip(times["float32"], times[name], strict=True))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        middle = statistics.median(ratios)
        found[name] = {"bytes": model.weight_nbytes, "seconds": times[name], "ratio": middle, "quartiles": [low, high]}
        table.add_row(name, f"{model.weight_nbytes / 1e6:.0f}", f"{1e3 * statistics.median(times[name]):.1f}",
                      f"{middle:.2f}x", f"{low:.2f} to {high:.2f}")  # fmt: skip
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
