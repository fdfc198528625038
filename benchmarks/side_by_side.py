"""Is this commit slower than another? Training steps and policies of both, in turns.

    git worktree add ../before COMMIT
    python benchmarks/side_by_side.py ../before [--only TEXT] [--rounds 15] [--threads N] [--json FILE]

Two processes, one on the sources of each, take turns: while one works, the other waits. A figure is the ratio of the
two times of a round, new by old, so below 1 is faster; the median and quartiles over the rounds are shown. The cases
are training steps of four models on regression and recall, the prompts and decoded tokens of policies on the model of
`benchmarks/policies.py`, at 4,096 tokens, and recurrent ops, forward and backward, in float32 with 4 heads.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent.parent
MODELS = ("transformer", "gated_delta_net", "mamba2", "gla")
POLICIES = ("full", "streaming_llm", "snapkv", "h2o", "keydiff")
LENGTH, DECODED = 4096, 64
OPS = ("gla", "rwkv6", "gated_delta_rule", "simple_gla", "ssd")
SIZES = ((2, 512, 64), (2, 2048, 64), (2, 8192, 64), (32, 128, 16))  # batch, tokens, size of a head


def training(name: str, task: Any) -> Callable[[], dict[str, float]]:
    """Three steps of a model on a task."""
    from contextlab.models import build_model, preset
    from contextlab.training import TrainSpec, TrainState, train_step

    model = build_model(preset(name, width=64, depth=4, heads=4).for_task(task), seed=0)
    spec = TrainSpec(steps=100_000, batch=64, warmup=10, precision="float32", compile="off")
    state = TrainState.start(model, spec)

    def step() -> dict[str, float]:
        began = time.perf_counter()
        for _ in range(3):
            train_step(model, task, spec, state)
        return {"step": time.perf_counter() - began}

    return step


def reading(model: Any, tokens: torch.Tensor, name: str) -> Callable[[], dict[str, float]]:
    """A prompt, then token by token, under a policy at 10%."""
    from contextlib import nullcontext

    from contextlab.policies import parse_policy

    policy = None if name == "full" else parse_policy(name, "10%")

    @torch.no_grad()
    def read() -> dict[str, float]:
        with nullcontext() if policy is None else policy.attach(model):
            began = time.perf_counter()
            _, state = model.read(tokens[:, :LENGTH])
            prefill = time.perf_counter() - began
            _, state = model.read(tokens[:, LENGTH : LENGTH + 1], state)
            began = time.perf_counter()
            for t in range(LENGTH + 1, LENGTH + DECODED):
                _, state = model.read(tokens[:, t : t + 1], state)
            return {"prefill": prefill, "decode": time.perf_counter() - began}

    return read


def op(name: str, batch: int, length: int, size: int) -> Callable[[], dict[str, float]]:
    """A recurrent op and the gradients of all its inputs."""
    from torch.nn import functional as F

    from contextlab import ops

    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(batch, length, *shape, generator=generator)  # noqa: E731
    q, v, weight, k = draw(4, size), draw(4, size), draw(4, size), F.normalize(draw(4, size), dim=-1)
    gate, gates = F.logsigmoid(draw(4) + 3), F.logsigmoid(draw(4, size)) / 16
    inputs = {
        "gla": [q, k, v, gates],
        "rwkv6": [q, k, v, gates, draw(4, size)[0, 0]],
        "gated_delta_rule": [q, k, v, gate, draw(4).sigmoid()],
        "simple_gla": [q, k, v, gate],
        "ssd": [v, F.softplus(draw(4) - 4), -torch.arange(1.0, 5), draw(1, size), draw(1, size), torch.ones(4)],
    }[name]
    inputs = [x.requires_grad_() for x in inputs]
    function = getattr(ops, name)

    def run() -> dict[str, float]:
        began = time.perf_counter()
        torch.autograd.grad(function(*inputs)[0], inputs, weight)
        return {"forward and backward": time.perf_counter() - began}

    return run


def cases() -> dict[str, Callable[[], dict[str, float]]]:
    """All that is measured, by name."""
    from contextlab.experiments import load_recipe
    from contextlab.models import build_model
    from contextlab.tasks import build_task

    tasks = {
        "regression": build_task("linear_regression", dimensions=5, examples=16, noise=0.5),
        "recall": build_task("associative_recall"),
    }
    found = {f"training {name}, {task}": training(name, tasks[task]) for name in MODELS for task in tasks}
    model = build_model(load_recipe("byte-lm").trainings()[0].model).eval()
    tokens = torch.randint(256, (1, LENGTH + DECODED), generator=torch.Generator().manual_seed(0))
    found |= {f"policy {name}": reading(model, tokens, name) for name in POLICIES}
    return found | {f"op {name}, {b} x {t} tokens of {d}": op(name, b, t, d) for name in OPS for b, t, d in SIZES}


def work(threads: int) -> None:
    """Answer each case's name with its seconds, a line each."""
    torch.set_num_threads(threads)
    found = cases()
    print(json.dumps(list(found)), flush=True)
    for line in sys.stdin:
        print(json.dumps(found[line.strip()]()), flush=True)


def start(root: Path, threads: int) -> tuple[subprocess.Popen[str], list[str]]:
    """A process on these sources, and the names of its cases."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    command = [sys.executable, __file__, "--worker", "--threads", str(threads)]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


def ask(process: subprocess.Popen[str], name: str) -> dict[str, float]:
    """Its seconds for a case."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(name, file=process.stdin, flush=True)
    answer: dict[str, float] = json.loads(process.stdout.readline())
    return answer


def main() -> None:
    """Measure in turns, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="a tree of the commit to compare with")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="only cases whose name begins so: training, policy, op gla, ...")
    options = parser.parse_args()
    if options.worker:
        work(options.threads)
        return
    if options.before is None or not (options.before / "src/contextlab").is_dir():
        parser.error("give a folder that holds src/contextlab of the commit before: git worktree add ../before COMMIT")
    (new, names), (old, _) = (start(root.resolve(), options.threads) for root in (HERE, options.before))
    names = [name for name in names if name.startswith(options.only)]
    ratios: dict[str, list[float]] = {}
    for turn in range(-1, options.rounds):  # the first round warms up
        for name in names:
            order = (new, old) if turn % 2 else (old, new)
            times = {process: ask(process, name) for process in order}
            for part in times[new] if turn >= 0 else ():
                ratios.setdefault(f"{name}: {part}", []).append(times[new][part] / times[old][part])
    for process in (new, old):
        process.communicate()
    found = {}
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[name] = {"median": middle, "low": low, "high": high}
        print(f"{name:45} {middle:.2f} ({low:.2f} to {high:.2f})")
    if options.json is not None:
        options.json.write_text(
            json.dumps({"threads": options.threads, "rounds": options.rounds, "ratios": found}, indent=2)
        )


if __name__ == "__main__":
    main()
