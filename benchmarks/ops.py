"""Time the recurrent ops against the fallbacks in transformers: `python benchmarks/ops.py [--json F]`.

Timed is one forward and backward (gradients of all inputs), float32, batch 2, 4 heads of 64, interleaved
runs in one process, medians and quartiles:

- gated delta rule: `gated_delta_rule` and Qwen3-Next's `torch_chunk_gated_delta_rule`, the same q, k, v, g,
  beta.
- SSD: `ssd` and Mamba-2's `mamba2_chunk_scan` (the scan part of its torch path, without projections,
  convolution and norm), the same x, dt, A, B, C, D, state size 64, one group of B and C as in Mamba-2,
  chunks of 256 (its default, as transformers runs it) and, to be fair to the algorithm, of 64.
- growth: the time at T over that at T / 2.

Ratios are of runs in the same turn, medians with quartiles over turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from contextlab.ops.delta import gated_delta_rule
from contextlab.ops.linear import ssd

BATCH, HEADS, SIZE = 2, 4, 64


def delta_inputs(length: int, generator: torch.Generator) -> list[Tensor]:
    """q, k (normalised), v, g, beta of a gated delta rule."""
    draw = lambda *shape: torch.randn(BATCH, length, HEADS, *shape, generator=generator)  # noqa: E731
    q, k = (F.normalize(draw(SIZE), dim=-1) for _ in range(2))
    inputs = [q, k, draw(SIZE), F.logsigmoid(draw() + 3), draw().sigmoid()]
    return [x.requires_grad_() for x in inputs]


def ssd_inputs(length: int, generator: torch.Generator) -> list[Tensor]:
    """x, dt, A, B, C, D of Mamba-2's layer."""
    draw = lambda *shape: torch.randn(BATCH, length, *shape, generator=generator)  # noqa: E731
    x, dt = draw(HEADS, SIZE), F.softplus(draw(HEADS) - 4)
    A, D = -torch.arange(1.0, HEADS + 1), torch.ones(HEADS)
    return [t.requires_grad_() for t in (x, dt, A, draw(1, SIZE), draw(1, SIZE), D)]


def step(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    """One forward and backward, to be timed."""
    weight = torch.randn_like(function(*inputs).detach())

    def run() -> None:
        torch.autograd.grad(function(*inputs), inputs, weight)

    return run


def interleaved(steps: dict[str, Callable[[], None]], runs: int) -> dict[str, list[float]]:
    """Seconds of each step, taken in turns so that a busy machine slows all alike; one warm-up is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(runs + 1):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def times(more: list[float], less: list[float]) -> dict[str, float]:
    """How many times as long the one takes as the other in the same turn: the median, and the quartiles over turns."""
    ratios = [a / b for a, b in zip(more, less, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def told(found: dict[str, float]) -> str:
    """4.62 (4.31 to 4.93), in three digits."""
    return f"{found['median']:.3g} ({found['low']:.3g} to {found['high']:.3g})"


def measure(length: int = 2048, runs: int = 15) -> dict[str, Any]:
    """All timings. Needs transformers."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    generator = torch.Generator().manual_seed(0)
    d, d_half = delta_inputs(length, generator), delta_inputs(length // 2, generator)
    s, s_half = ssd_inputs(length, generator), ssd_inputs(length // 2, generator)

    def ours_delta(*a: Tensor) -> Tensor:
        return gated_delta_rule(*a)[0]

    def ours_ssd(*a: Tensor) -> Tensor:
        return ssd(*a)[0]

    def qwen(*a: Tensor) -> Tensor:
        return torch_chunk_gated_delta_rule(*a)[0]

    def mamba(chunk: int) -> Callable[..., Tensor]:
        return lambda x, dt, A, B, C, D: mamba2_chunk_scan(x, dt, A, B, C, chunk, D=D)

    seconds = interleaved(
        {
            "gated_delta_rule": step(ours_delta, d),
            "gated_delta_rule, T/2": step(ours_delta, d_half),
            "transformers Qwen3-Next": step(qwen, d),
            "ssd": step(ours_ssd, s),
            "ssd, T/2": step(ours_ssd, s_half),
            "transformers Mamba-2, chunk 256": step(mamba(256), s),
            "transformers Mamba-2, chunk 64": step(mamba(64), s),
        },
        runs,
    )
    rows = [
        {"name": name, "median_s": statistics.median(values), "quartiles_s": statistics.quantiles(values, n=4)[::2]}
        for name, values in seconds.items()
    ]
    delta, scan = seconds["gated_delta_rule"], seconds["ssd"]
    ratios = {
        "gated_delta_rule: times faster than transformers": times(seconds["transformers Qwen3-Next"], delta),
        "ssd: times faster than transformers": times(seconds["transformers Mamba-2, chunk 256"], scan),
        "ssd: times faster than transformers with chunks of 64": times(seconds["transformers Mamba-2, chunk 64"], scan),
        "gated_delta_rule: time(T) / time(T/2)": times(delta, seconds["gated_delta_rule, T/2"]),
        "ssd: time(T) / time(T/2)": times(scan, seconds["ssd, T/2"]),
    }
    return {
        "length": length,
        "runs": runs,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "rows": rows,
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=15)
    options = parser.parse_args()
    result = measure(options.length, options.runs)
    table = Table(title=f"forward + backward, batch {BATCH}, T {result['length']}, {HEADS} heads of {SIZE}, float32")
    for column in ("op", "median ms", "quartiles ms"):
        table.add_column(column, justify="left" if column == "op" else "right")
    for row in result["rows"]:
        low, high = row["quartiles_s"]
        table.add_row(row["name"], f"{1e3 * row['median_s']:.1f}", f"{1e3 * low:.1f} - {1e3 * high:.1f}")
    console = Console()
    console.print(table)
    for name, ratio in result["ratios"].items():
        console.print(f"{name}: {told(ratio)}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
