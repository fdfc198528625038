"""Time every chunked op against the recurrence that defines it: `python benchmarks/naive.py [--json F] [OP ...]`.

Timed is one forward and backward (gradients of all inputs), float32, batch 2, 4 heads of 64, in turns in one process,
medians: the op at T, 2 T and 4 T tokens, and its recurrence, a loop over tokens, at T = 1024 (in three turns with the
op, for it is slow). Growth is the time at 4 T over that at 2 T: at T the caches still hold what is read twice. Ratios
are of runs in the same turn, medians with quartiles over turns.
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

from contextlab import ops
from ops import BATCH, HEADS, SIZE, interleaved, step, times, told

Draw = Callable[..., Tensor]


def inputs(kind: str, length: int) -> list[Tensor]:
    """What an op reads, with gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(BATCH, length, HEADS, *shape, generator=generator)

    q, k, v = draw(SIZE), F.normalize(draw(SIZE), dim=-1), draw(SIZE)
    gate, gates, beta = F.logsigmoid(draw() + 3), F.logsigmoid(draw(SIZE) + 3), draw().sigmoid()
    found = {
        "simple_gla": [q, k, v, gate],
        "gla": [q, k, v, gates],
        "rwkv6": [q, k, v, gates, torch.randn(HEADS, SIZE, generator=generator)],
        "gated_delta_rule": [q, k, v, gate, beta],
        "kda": [q, k, v, gates, beta],
        "dplr_delta_rule": [q, k, v, -k, k * beta.unsqueeze(-1), gates],
        "mlstm": [q, k, v, draw(), draw() + 3],
        "titans": [q, k, v, beta, F.logsigmoid(draw() - 2), gate],
        "mesa": [q, k, v, gate, beta, torch.ones(HEADS, SIZE)],
        "mamba3": [v, F.softplus(draw() - 4), -draw().exp(), q, k, draw().sigmoid(), draw(SIZE // 4)],
        "linear_scan": [v.flatten(2), gates.flatten(2)],
        "selective_scan": [
            v.flatten(2),
            F.softplus(draw(SIZE).flatten(2) - 4),
            -torch.arange(1.0, 17).repeat(HEADS * SIZE, 1),
            draw(4).flatten(2),
            draw(4).flatten(2),
            torch.ones(HEADS * SIZE),
        ],
    }[kind]
    return [x.detach().requires_grad_() for x in found]


OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "simple_gla": (ops.simple_gla, ops.naive_simple_gla),
    "gla": (ops.gla, ops.naive_gla),
    "rwkv6": (ops.rwkv6, ops.naive_rwkv6),
    "gated_delta_rule": (ops.gated_delta_rule, ops.naive_gated_delta_rule),
    "kda": (ops.kda, ops.naive_kda),
    "dplr_delta_rule": (ops.dplr_delta_rule, ops.naive_dplr_delta_rule),
    "mlstm": (ops.mlstm, ops.naive_mlstm),
    "titans": (ops.titans, ops.naive_titans),
    "mesa": (ops.mesa, ops.naive_mesa),
    "mamba3": (ops.mamba3, ops.naive_mamba3),
    "linear_scan": (ops.linear_scan, ops.naive_linear_scan),
    "selective_scan": (ops.selective_scan, ops.naive_selective_scan),
}


LOOPS = 3


def first(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """The outputs alone, without the state."""
    return lambda *a: function(*a)[0]


def measure(names: list[str], length: int = 1024, runs: int = 5) -> list[dict[str, Any]]:
    """One row an op."""
    rows = []
    for name in names:
        fast, naive = OPS[name]
        torch.testing.assert_close(
            first(fast)(*inputs(name, 64)), first(naive)(*inputs(name, 64)), rtol=1e-3, atol=1e-3
        )
        steps = {str(n): step(first(fast), inputs(name, n * length)) for n in (1, 2, 4)}
        seconds = interleaved(steps, runs)
        turns = interleaved({"op": steps["1"], "loop": step(first(naive), inputs(name, length))}, LOOPS)
        rows.append(
            {
                "op": name,
                "seconds": statistics.median(seconds["1"]),
                "times faster than its recurrence": times(turns["loop"], turns["op"]),
                "growth": times(seconds["4"], seconds["2"]),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(OPS)}; all by default")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    unknown = [name for name in options.ops if name not in OPS]
    if unknown:
        parser.error(f"unknown op {unknown[0]!r}; known: {', '.join(OPS)}")
    rows = measure(options.ops or list(OPS))
    table = Table(title=f"forward + backward, batch {BATCH}, 1024 tokens, {HEADS} heads of {SIZE}, float32")
    for column in ("op", "ms", "times faster than its recurrence", "time(4096) / time(2048)"):
        table.add_column(column, justify="left" if column == "op" else "right")
    for row in rows:
        faster, growth = row["times faster than its recurrence"], row["growth"]
        table.add_row(row["op"], f"{1e3 * row['seconds']:.0f}", told(faster), told(growth))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
