"""Decoding by context length: recurrent mixers stay flat in time and state; attention's state and time grow.

`python benchmarks/decode.py [--lengths 256,1024,4096,16384] [--json FILE]`; each length in a process of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from contextlab.evaluation import cost
from contextlab.models import preset

MODELS = ("transformer", "samba", "retnet", "lightning", "mamba2", "gated_delta_net", "lstm")
SIZES = {"width": 64, "depth": 2, "read_in": "token", "input_size": 256, "output_size": 256}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="256,1024,4096,16384")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    lengths = [int(each) for each in options.lengths.split(",")]
    table, found = Table(title="decoding: microseconds a token | bytes of state"), {}
    table.add_column("model")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    for name in MODELS:
        results = cost(preset(name, **SIZES), lengths, repeats=options.repeats, name=name)
        wide = results.pivot_table(index="length", columns="metric", values="value")
        times, states = wide["decode_seconds_per_token"] * 1e6, wide["state_bytes"]
        found[name] = {"microseconds": times.tolist(), "state_bytes": states.tolist(), "lengths": lengths}
        table.add_row(name, *(f"{t:.0f} | {s:,.0f}" for t, s in zip(times, states, strict=True)))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
