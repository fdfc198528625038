"""What context costs a model: counted (parameters, FLOPs, bytes of state) and measured (time, memory)."""

from __future__ import annotations

import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

from contextlab.allocator import give_back
from contextlab.errors import InputError, ResourceError
from contextlab.evaluation.results import table
from contextlab.models import HuggingFaceModel, HuggingFaceSpec, Model, ModelSpec, build_model
from contextlab.models.hub import build_checkpoint
from contextlab.models.room import require_room, require_room_for_tokens

DECODED = 16
"""Tokens decoded in a row for each timing."""


def static_cost(
    model: Model | HuggingFaceModel,
    length: int,
    *,
    name: str = "model",
    run: str = "",
    seed: int = 0,
    task_name: str = "",
) -> pd.DataFrame:
    """Parameters, FLOPs of one forward and bytes of state, for one sequence of `length` tokens; nothing is timed.

    A model that reads whole sequences only (an encoder, a pooled read-out) has no row for the state.

    Returns a tidy table whose split is "cost".
    """
    counts = {
        "parameters": model.parameter_count,
        "flops": model.flops(length),
    }
    if not getattr(model.spec, "reads_whole", False):  # which hands no state on
        counts["state_bytes"] = model.state_nbytes(length)
    who = {"run": run, "model": name, "kind": "model", "seed": seed, "task": task_name, "split": "cost"}
    return table(
        {**who, "metric": m, "length": length, "value": v, "ci_low": v, "ci_high": v, "n": 1} for m, v in counts.items()
    )


def cost(
    model: Model | HuggingFaceModel | ModelSpec | HuggingFaceSpec | dict[str, Any],
    lengths: Sequence[int],
    *,
    batch: int = 1,
    repeats: int = 3,
    device: torch.device | str = "cpu",
    name: str = "model",
    run: str = "",
    plugins: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Measure what reading contexts of these lengths costs. Each length is measured in a process of its own.

    model: a model or its spec; parameters are drawn afresh, their values do not matter.
    lengths: tokens of context. batch: sequences at once. repeats: timings of each figure.
    plugins: modules that the process imports first. progress: called with each length before it is measured.

    Returns a tidy table with split "cost" and a row for each length and metric: parameters; flops (one sequence);
    state_bytes (the state really held); prefill_seconds; decode_seconds_per_token (at that context);
    peak_bytes (the most memory that prefill took beyond what the loaded model already held: resident memory on CPU,
    allocated memory on CUDA). `value` is the median, ci_low and ci_high are the least and the most, n the repeats.
    """
    spec = model.spec if isinstance(model, Model | HuggingFaceModel) else model
    if not isinstance(spec, HuggingFaceSpec):
        spec = ModelSpec.parse(spec)
        require_room(spec)
        if torch.device(device).type == "cpu":
            require_room_for_tokens(spec, max(lengths, default=0), batch)
    rows: list[dict[str, Any]] = []
    for length in lengths:
        if progress is not None:
            progress(length)
        job = {
            "spec": spec.model_dump(mode="json"),
            "huggingface": isinstance(spec, HuggingFaceSpec),
            "length": length,
            "batch": batch,
            "repeats": repeats,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "plugins": list(plugins),
        }
        for metric, values in _measure_apart(job).items():
            rows.append(
                {
                    "run": run,
                    "model": name,
                    "kind": "model",
                    "seed": 0,
                    "task": "",
                    "split": "cost",
                    "metric": metric,
                    "length": length,
                    "value": statistics.median(values),
                    "ci_low": min(values),
                    "ci_high": max(values),
                    "n": len(values),
                }
            )
    return table(rows)


def _measure_apart(job: dict[str, Any]) -> dict[str, list[float]]:
    done = subprocess.run(
        [sys.executable, "-m", "contextlab.evaluation.cost_worker"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    last = (done.stderr.strip().splitlines() or [""])[-1]
    if done.returncode == 2:
        raise InputError(last)
    if done.returncode:
        cause = "it was killed, most likely for want of memory" if done.returncode < 0 else last
        raise ResourceError(f"measuring at {job['length']} tokens failed: {cause}")
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@torch.no_grad()
def measure(job: dict[str, Any]) -> dict[str, list[float]]:
    """Measure one length in this process, which should be a fresh one. Returns metric -> the values found."""
    device = torch.device(job["device"])
    torch.set_num_threads(job["threads"])
    model: Any
    if job["huggingface"]:
        model = build_checkpoint(HuggingFaceSpec.parse(job["spec"]))
    else:
        model = build_model(ModelSpec.parse(job["spec"]))
    model = model.to(device).eval()
    length, batch = job["length"], job["batch"]
    inputs = drawn_inputs(model, batch, length, device)
    step = inputs[:, :1]
    model.read(step, model.read(inputs[:, : min(8, length)])[1])  # first calls load kernels

    watch = PeakMemory(device)
    _, state = model.read(inputs)
    peak = watch.bytes()
    foretold = model.state_nbytes(length, batch)
    if state.nbytes != foretold and not (getattr(model, "state_varies", False) and state.nbytes < foretold):
        raise AssertionError(f"the state holds {state.nbytes} bytes, state_nbytes says {foretold}")

    prefill, decode = [], []
    for _ in range(job["repeats"]):
        prefill.append(seconds_of(lambda: model.read(inputs), device))
        decode.append(seconds_of(lambda: read_on(model, step, state, DECODED), device) / DECODED)
    return {
        "parameters": [model.parameter_count],
        "flops": [model.flops(length)],
        "state_bytes": [state.nbytes],
        "prefill_seconds": prefill,
        "decode_seconds_per_token": decode,
        "peak_bytes": [peak],
    }


def drawn_inputs(model: Model | HuggingFaceModel, batch: int, length: int, device: torch.device) -> torch.Tensor:
    """What a model reads, the same each time: token ids [batch, length] or vectors [batch, length, size]."""
    generator = torch.Generator(device).manual_seed(0)
    size = model.spec.input_size or 1
    if model.spec.read_in == "token":
        return torch.randint(size, (batch, length), generator=generator, device=device)
    return torch.randn(batch, length, size, generator=generator, device=device)


def read_on(model: Any, token: torch.Tensor, state: Any, count: int) -> None:
    """Read a token, [B, 1] or [B, 1, d], so many times one after another from a state on: what decoding costs."""
    for _ in range(count):
        state = model.read(token, state)[1]


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """How long a piece of work takes, until the device is done with it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


class PeakMemory:
    """The most memory held since it was made, beyond what was held then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        give_back()
        # Linux can forget the process' earlier peak; elsewhere the loading of the model may hide a small one.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.before = psutil.Process().memory_info().rss

    def bytes(self) -> float:
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device) - self.before)
        return float(max(0, _peak_resident() - self.before))


def _peak_resident() -> int:
    """Highest resident memory of this process, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
