"""Policies at a long context: what one costs while the prompt is read, and what it saves afterwards.

`python benchmarks/policies.py [--length 16384] [--budget 10%] [--policy NAME ...] [--batch 1] [--repeats 3]
[--threads N] [--cpu-time]`.
The model is that of recipe byte-lm, untrained: what is measured does not depend on its weights. The full cache and the
policies take turns in one process; ratios are medians over turns, with the least and the most. `--cpu-time` counts the
process' own time, with one thread: for machines that others use, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from contextlab.experiments import load_recipe
from contextlab.models import build_model
from contextlab.policies import parse_policy

POLICIES = ("streaming_llm", "snapkv", "tova", "expected_attention", "keydiff", "h2o")
TARGETS = {"decode": 4.0, "bytes": 0.105, "overhead": 0.15, "h2o_prefill": 1.3}


def measure(
    model: Any, policy: Any, tokens: torch.Tensor, decoded: int, clock: Callable[[], float]
) -> tuple[float, float, int]:
    """Seconds of prefill, seconds of a decoded token, bytes of state after the prompt."""
    length = tokens.shape[1] - decoded
    with contextlib.nullcontext() if policy is None else policy.attach(model):
        began = clock()
        _, state = model.read(tokens[:, :length])
        prefill = clock() - began
        held = state.nbytes
        _, state = model.read(tokens[:, length : length + 1], state)  # the full cache's buffers are copied here once
        began = clock()
        for t in range(length + 1, length + decoded):
            _, state = model.read(tokens[:, t : t + 1], state)
        return prefill, (clock() - began) / (decoded - 1), held


@torch.no_grad()
def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--budget", default="10%")
    parser.add_argument("--policy", action="append")
    parser.add_argument("--batch", type=int, default=1, help="sequences that are decoded at once")
    parser.add_argument("--threads", type=int, help="of PyTorch; default its own choice")
    parser.add_argument("--decoded", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    clock = time.process_time if options.cpu_time else time.perf_counter
    if options.cpu_time or options.threads:
        torch.set_num_threads(1 if options.cpu_time else options.threads)
    model = build_model(load_recipe("byte-lm").trainings()[0].model).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(256, (options.batch, options.length + options.decoded), generator=generator)
    policies = {name: parse_policy(name, options.budget) for name in options.policy or POLICIES}
    for policy in (None, *policies.values()):
        measure(model, policy, tokens[:, : min(1024, options.length)], 4, clock)
    runs: dict[str, list[tuple[float, float, int]]] = {name: [] for name in ("full", *policies)}
    for turn in range(options.repeats):
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            runs[name].append(measure(model, policies.get(name), tokens, options.decoded, clock))

    full = runs["full"]
    plain_cache = (
        options.batch
        * options.length
        * sum(
            (layer.key_dim + layer.value_dim) * layer.kv_heads * 4
            for layer in next(iter(policies.values())).layers(model)
        )
    )
    threads = torch.get_num_threads()
    title = (
        f"{options.length:,} tokens x {options.batch}, budget {options.budget}, {threads} thread{'s' * (threads > 1)}"
    )
    table = Table("policy", "prefill s", "overhead", "decode ms", "decode x", "state", "of the cache", title=title)
    found: dict[str, Any] = {
        "length": options.length, "batch": options.batch, "budget": options.budget, "threads": threads,
        "targets": TARGETS, "policies": {},
    }  # fmt: skip
    for name, own in runs.items():
        slower = [a[0] / b[0] for a, b in zip(own, full, strict=True)]
        faster = [b[1] / a[1] for a, b in zip(own, full, strict=True)]
        prefill, decode = (statistics.median(each[i] for each in own) for i in (0, 1))
        held, plain = own[0][2], name == "full"
        more = f"{statistics.median(slower) - 1:+.0%} ({min(slower) - 1:+.0%}, {max(slower) - 1:+.0%})"
        times = f"{statistics.median(faster):.2f} ({min(faster):.2f}, {max(faster):.2f})"
        found["policies"][name] = {
            "prefill_seconds": prefill, "decode_seconds": decode, "state_bytes": held, "part": held / plain_cache,
            "prefill_ratios": slower, "decode_ratios": faster,
        }  # fmt: skip
        table.add_row(
            name, f"{prefill:.2f}", "" if plain else more, f"{1000 * decode:.2f}", "" if plain else times,
            f"{held / 2**20:.2f} MiB", f"{held / plain_cache:.1%}",
        )  # fmt: skip
    Console(width=110).print(table)
    aims = (f"decode {TARGETS['decode']}x", f"state {TARGETS['bytes']:.1%}", f"overhead {TARGETS['overhead']:.0%}")
    print(f"targets: {', '.join(aims)} (of scores that take no mass of attention), {TARGETS['h2o_prefill']}x for h2o")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
