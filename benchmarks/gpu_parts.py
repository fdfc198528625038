"""The parts of `gpu.py`: `gpu_parts.py NAME ROWS [--rehearse]` appends what it finds to ROWS, a JSON object a line."""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import first_line

Tell = Callable[..., None]
REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Size:
    """What a rehearsal makes small.

    device: where all runs. rounds: of each timing. tokens: of the ops. batch: of the ops and the trainings.
    steps: of a timed round of training. members: that train together. depth, width, heads: of trained models.
    target: dimensions, examples, width, layers and seconds of the part `target`. lengths: of prompts that are decoded.
    decoded: tokens after them.
    """

    device: str = "cuda"
    rounds: int = 5
    tokens: int = 4096
    batch: int = 128
    steps: int = 10
    members: tuple[int, ...] = (4, 16, 64)
    depth: int = 4
    width: int = 64
    target: tuple[int, int, int, int, float] = (20, 41, 256, 12, 75.0)
    lengths: tuple[int, ...] = (32_768, 131_072)
    decoded: int = 64


TINY = Size("cpu", 1, 64, 4, 1, (2,), 1, 16, (3, 5, 16, 1, 1.0), (256,), 4)


def wait() -> None:
    """Until the GPU has done all that it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(steps: dict[str, Callable[[], Any]], rounds: int, each: int = 1) -> dict[str, list[float]]:
    """Milliseconds of one call each, rivals in turns; a first round is dropped."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            wait()
            began = time.perf_counter()
            for _ in range(each):
                step()
            wait()
            if i:
                found[name].append(1000 * (time.perf_counter() - began) / each)
    return found


def spread(values: list[float]) -> list[float]:
    """The median, the least and the most, rounded to four digits."""
    return [float(f"{value:.4g}") for value in (statistics.median(values), min(values), max(values))]


def ratios(slow: list[float], fast: list[float]) -> list[float]:
    """How many times as fast, round by round."""
    return spread([a / b for a, b in zip(slow, fast, strict=True)])


@contextmanager
def recorded(tell: Tell, **what: Any) -> Iterator[None]:
    """A fault within is a row of its own, and what comes after still runs."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        tell(**what, fault=f"{type(error).__name__}: {first_line(error)[:300]}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def machine(size: Size, tell: Tell) -> None:
    """What it runs on."""
    from contextlab.evaluation.machine import machine_record
    from contextlab.words import flat

    for key, value in flat(machine_record()):
        tell(what=key, value=value)
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        tell(what="GPU", value=f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}")


def tests(size: Size, tell: Tell) -> None:
    """The device half of the test suite, `tests/device`."""
    told = {**os.environ, "CONTEXTLAB_TEST_DEVICE": size.device}
    command = [sys.executable, "-m", "pytest", "-rf", "--tb=line", "-p", "no:cacheprovider", "tests/device"]
    done = subprocess.run(command, cwd=REPOSITORY, env=told, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr, flush=True)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    tell(**{"exit code": done.returncode, **counts})
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            tell(fault=line[:300])
    if done.returncode:
        raise SystemExit(done.returncode)


def op_inputs(name: str, size: Size, dtype: torch.dtype) -> tuple[Callable[..., Any], list[Tensor]]:
    """An op that flash-linear-attention has, too, and inputs for it: 2 sequences, 8 heads of 64."""
    from contextlab.ops.delta import delta_rule, gated_delta_rule
    from contextlab.ops.dplr import dplr_delta_rule, kda
    from contextlab.ops.linear import simple_gla

    source = torch.Generator(size.device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, size.tokens, 8, *shape, generator=source, device=size.device)

    q, k, v = F.normalize(draw(64), dim=-1), F.normalize(draw(64), dim=-1), draw(64)
    beta, g, gs = draw().sigmoid(), F.logsigmoid(draw() + 3), F.logsigmoid(draw(64) + 3)
    functions: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
        "simple_gla": (simple_gla, [q, k, v, g]),
        "gated_delta_rule": (gated_delta_rule, [q, k, v, g, beta]),
        "delta_rule": (delta_rule, [q, k, v, beta]),
        "kda": (kda, [q, k, v, gs, beta]),
        "dplr_delta_rule": (dplr_delta_rule, [q, k, v, -k, k * beta.unsqueeze(-1), gs]),
    }
    function, inputs = functions[name]
    return function, [x.to(dtype).requires_grad_() for x in inputs]


def kernels(size: Size, tell: Tell) -> None:
    """Forward and backward of ops on PyTorch and on flash-linear-attention's kernels, in bfloat16; errors of both."""
    from contextlab.ops.backend import FLA_MODULES, load_fla, use_backend

    for name in FLA_MODULES:
        with recorded(tell, op=name):
            function, exact = op_inputs(name, size, torch.float32)
            _, inputs = op_inputs(name, size, torch.bfloat16)
            with use_backend("torch"):
                wanted = function(*exact)[0].detach()

            def step(backend: str, function: Any = function, inputs: Any = inputs) -> Callable[[], list[Tensor]]:
                def run() -> list[Tensor]:
                    with use_backend(backend):
                        y = function(*inputs)[0]
                        return [y, *torch.autograd.grad(y.float().square().sum(), inputs)]

                return run

            def error(backend: str, step: Any = step, wanted: Tensor = wanted) -> float:
                found = step(backend)()[0].detach().float()
                return float(f"{float((found - wanted).norm() / wanted.norm()):.3g}")

            module, why = load_fla(name)
            backends = ["torch"] + ["fla"] * (module is not None and size.device == "cuda")
            errors = {f"error_{each}": error(each) for each in backends}
            times = timed({each: step(each) for each in backends}, size.rounds)
            row: dict[str, Any] = {f"ms_{each}": spread(values) for each, values in times.items()}
            row["fla"] = why
            if "fla" in times:
                row["fla_times_as_fast"] = ratios(times["torch"], times["fla"])
            tell(op=name, tokens=size.tokens, **row, **errors)


def main() -> None:
    """Run the part that is named."""
    from gpu_trainings import bf16, captured, decoding, target, together

    parts: dict[str, Callable[[Size, Tell], None]] = {
        "machine": machine, "together": together, "kernels": kernels, "target": target, "tests": tests,
        "decoding": decoding, "captured": captured, "bf16": bf16,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(parts))
    parser.add_argument("rows", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    given = parser.parse_args()

    faults = 0
    with given.rows.open("a") as file:

        def tell(**row: Any) -> None:
            nonlocal faults
            faults += "fault" in row
            file.write(json.dumps(row, default=str) + "\n")
            file.flush()

        parts[given.name](TINY if given.rehearse else Size(), tell)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
