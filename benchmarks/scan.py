"""Time the scans against plain recurrences: `python benchmarks/scan.py [--json F]`.

Timed is one forward and backward (gradients of all inputs), float32, batch 2, 256 channels, interleaved runs in one
process, medians and quartiles:

- linear scan: `linear_scan` and `naive_linear_scan`, the loop over tokens that defines it, the same x and g.
- selective scan (512 tokens: the backward of transformers' path is quadratic in the length, two minutes at 2048):
  `selective_scan` and Mamba's `mamba_selective_scan` of transformers (the scan part of its torch path,
  without projections and convolution), the same x, dt, A, B, C, D, state size 16.
- growth: the time at T over that at T / 2.
- memory: bytes that the selective scan keeps for its backward, over those of the states of all tokens.

Ratios of times are of runs in the same turn, medians with quartiles over turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from contextlab.ops.scan import linear_scan, naive_linear_scan, selective_scan
from ops import interleaved, step, times, told

BATCH, CHANNELS, STATE = 2, 256, 16


def linear_inputs(length: int, generator: torch.Generator) -> list[Tensor]:
    """x and g of a linear scan."""
    x, g = (torch.randn(BATCH, length, CHANNELS, generator=generator) for _ in range(2))
    return [x.requires_grad_(), F.logsigmoid(g + 3).requires_grad_()]


def mamba_inputs(length: int, generator: torch.Generator) -> list[Tensor]:
    """x, dt, A, B, C, D of Mamba's layer."""
    draw = lambda size: torch.randn(BATCH, length, size, generator=generator)  # noqa: E731
    A, D = -torch.arange(1.0, STATE + 1).repeat(CHANNELS, 1), torch.ones(CHANNELS)
    inputs = draw(CHANNELS), F.softplus(draw(CHANNELS) - 4), A, draw(STATE), draw(STATE), D
    return [t.requires_grad_() for t in inputs]


def kept_bytes(function: Callable[..., Tensor], inputs: list[Tensor]) -> int:
    """Bytes that one forward keeps for its backward, the inputs' own included; each storage counts once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = function(*inputs)  # alive, so that no address is taken twice
    del held
    return sum(storages.values())


def measure(length: int = 512, runs: int = 7) -> dict[str, Any]:
    """All timings. Needs transformers."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    generator = torch.Generator().manual_seed(0)
    s, s_half = linear_inputs(length, generator), linear_inputs(length // 2, generator)
    m, m_half = mamba_inputs(length, generator), mamba_inputs(length // 2, generator)

    def ours(*a: Tensor) -> Tensor:
        return selective_scan(*a)[0]

    def scan(*a: Tensor) -> Tensor:
        return linear_scan(*a)[0]

    def loop(*a: Tensor) -> Tensor:
        return naive_linear_scan(*a)[0]

    def theirs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return mamba_selective_scan(x.mT, dt.mT, A, B.mT, C.mT, D).mT

    torch.testing.assert_close(ours(*m), theirs(*m), rtol=1e-3, atol=1e-3)
    seconds = interleaved(
        {
            "selective_scan": step(ours, m),
            "selective_scan, T/2": step(ours, m_half),
            "transformers Mamba": step(theirs, m),
            "linear_scan": step(scan, s),
            "linear_scan, T/2": step(scan, s_half),
            "naive linear_scan": step(loop, s),
            "naive linear_scan, T/2": step(loop, s_half),
        },
        runs,
    )
    rows = [
        {"name": name, "median_s": statistics.median(values), "quartiles_s": statistics.quantiles(values, n=4)[::2]}
        for name, values in seconds.items()
    ]
    found, found_half = seconds["selective_scan"], seconds["selective_scan, T/2"]
    linear, linear_half = seconds["linear_scan"], seconds["linear_scan, T/2"]
    ratios: dict[str, Any] = {
        "selective_scan: times faster than transformers": times(seconds["transformers Mamba"], found),
        "linear_scan: times faster than naive": times(seconds["naive linear_scan"], linear),
        "linear_scan: times faster than naive, T/2": times(seconds["naive linear_scan, T/2"], linear_half),
        "selective_scan: time(T) / time(T/2)": times(found, found_half),
        "linear_scan: time(T) / time(T/2)": times(linear, linear_half),
        "selective_scan: bytes kept / bytes of the states of all tokens": kept_bytes(ours, m)
        / (4 * BATCH * length * CHANNELS * STATE),
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
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    result = measure(options.length, options.runs)
    table = Table(title=f"forward + backward, batch {BATCH}, T {result['length']}, {CHANNELS} channels, float32")
    for column in ("op", "median ms", "quartiles ms"):
        table.add_column(column, justify="left" if column == "op" else "right")
    for row in result["rows"]:
        low, high = row["quartiles_s"]
        table.add_row(row["name"], f"{1e3 * row['median_s']:.1f}", f"{1e3 * low:.1f} - {1e3 * high:.1f}")
    console = Console()
    console.print(table)
    for name, ratio in result["ratios"].items():
        console.print(f"{name}: {told(ratio) if isinstance(ratio, dict) else f'{ratio:.2f}'}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
