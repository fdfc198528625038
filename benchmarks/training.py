"""What a training step costs, and what the optimiser and compilation bring.

    python benchmarks/training.py               step against GPT-2 of `transformers`; share of drawing prompts
    python benchmarks/training.py --optimizers  loss after the same steps with AdamW and with Muon
    python benchmarks/training.py --compile     what torch.compile costs and saves
    ... --json FILE                             the same figures as data
    ... --threads N                             PyTorch's threads

Rivals run in turns in one process, so that both see the same machine; medians and quartiles are shown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from contextlab.files import write_json
from contextlab.models import Model, build_model, preset
from contextlab.prompt import Task
from contextlab.tasks import build_task
from contextlab.training import TrainSpec, TrainState, train, train_step

WIDTH, DEPTH, HEADS, BATCH, EXAMPLES, DIMENSIONS = 64, 4, 4, 128, 16, 5
SPEC = TrainSpec(steps=100_000, batch=BATCH, warmup=10, precision="float32", compile="off")


def interleave(steps: dict[str, Callable[[], Any]], rounds: int, each: int = 3) -> dict[str, list[float]]:
    """Milliseconds a step, one figure a round, rivals taking turns."""
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(each):
                step()
            times[name].append(1000 * (time.perf_counter() - began) / each)
    return times


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def shown(found: dict[str, float], unit: str = "") -> str:
    return f"{found['median']:.2f}{unit} ({found['low']:.2f} to {found['high']:.2f})"


def our_step(model: Model, task: Task, spec: TrainSpec) -> Callable[[], Any]:
    state = TrainState.start(model, spec)
    compiled: Any = torch.compile(model) if spec.compile == "on" else model
    return lambda: train_step(compiled, task, spec, state)


def gpt2_step(d: int, examples: int) -> tuple[Callable[[], Any], int]:
    """The step of the public in-context-learning code (2208.01066), and its parameters.

    Vectors x_1, (y_1, 0), x_2, ... go through a linear read-in to GPT2Model as `inputs_embeds`; squared error
    at the x tokens; Adam.
    """
    from transformers import GPT2Config, GPT2Model

    config = GPT2Config(
        n_positions=2 * examples,
        n_embd=WIDTH,
        n_layer=DEPTH,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    read_in, backbone, read_out = nn.Linear(d, WIDTH), GPT2Model(config).train(), nn.Linear(WIDTH, 1)
    model = nn.ModuleList([read_in, backbone, read_out])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        xs = torch.randn(BATCH, examples, d)
        ys = (xs @ torch.randn(BATCH, d, 1))[..., 0] + 0.5 * torch.randn(BATCH, examples)
        wide = torch.cat((ys.unsqueeze(-1), torch.zeros(BATCH, examples, d - 1)), 2)
        tokens = torch.stack((xs, wide), 2).view(BATCH, 2 * examples, d)
        optimizer.zero_grad()
        hidden = backbone(inputs_embeds=read_in(tokens)).last_hidden_state
        loss = (read_out(hidden)[:, ::2, 0] - ys).square().mean()
        loss.backward()
        optimizer.step()
        loss.item()

    return step, sum(p.numel() for p in model.parameters())


def regression(layout: str) -> Task:
    return build_task("linear_regression", dimensions=DIMENSIONS, examples=EXAMPLES, noise=0.5, layout=layout)


def transformer(task: Task, depth: int = DEPTH, seed: int = 0, **options: Any) -> Model:
    spec = preset("transformer", width=WIDTH, depth=depth, heads=HEADS, **options)
    return build_model(spec.for_task(task), seed=seed)


def against_gpt2(console: Console, rounds: int) -> dict[str, Any]:
    """The whole step at 32 tokens of vectors, and at the 16 paired tokens that say the same.

    Ours has RMS norm, rotary positions and no biases; the last row has GPT-2's layer norm and learned positions.
    """
    theirs, parameters = gpt2_step(DIMENSIONS, EXAMPLES)
    steps = {"transformers GPT-2, Adam, 32 tokens": theirs}
    sizes = {"transformers GPT-2, Adam, 32 tokens": parameters}
    for layout, tokens in (("interleaved", 32), ("paired", 16)):
        for optimizer in ("adamw", "muon"):
            task, spec = regression(layout), SPEC.model_copy(update={"optimizer": optimizer})
            name, model = f"contextlab transformer, {optimizer}, {tokens} tokens", transformer(task)
            steps[name], sizes[name] = our_step(model, task, spec), model.parameter_count
    task, spec = regression("interleaved"), SPEC.model_copy(update={"optimizer": "adamw"})
    model = transformer(task, position="learned", max_length=2 * EXAMPLES, norm="layer")
    name = "contextlab with GPT-2's norm and positions, adamw, 32 tokens"
    steps[name], sizes[name] = our_step(model, task, spec), model.parameter_count
    times = interleave(steps, rounds)
    reference = next(iter(times.values()))
    title = f"Training step on CPU: width {WIDTH}, depth {DEPTH}, heads {HEADS}, batch {BATCH}, float32"
    table = Table("model", "parameters", "ms a step (quartiles)", "times as fast (quartiles)", title=title)
    found = {}
    for name, values in times.items():
        ratio = spread([a / b for a, b in zip(reference, values, strict=True)])
        found[name] = {"parameters": sizes[name], "milliseconds": spread(values), "speedup": ratio}
        table.add_row(name, f"{sizes[name]:,}", shown(spread(values)), shown(ratio))
    console.print(table)
    return found


def drawing(console: Console, rounds: int) -> dict[str, Any]:
    """The share of a step that drawing its prompts takes."""
    table = Table("task", "drawing, ms", "step, ms", "share (target < 5%)", title="Drawing prompts")
    recall = build_task("associative_recall", vocabulary=128, pairs=16, length=96)
    found = {}
    for name, task, depth in (
        ("linear_regression, 16 paired tokens, depth 4", regression("paired"), 4),
        ("linear_regression, 32 interleaved tokens, depth 4", regression("interleaved"), 4),
        ("associative_recall, 96 tokens, depth 2", recall, 2),
    ):
        source = torch.Generator().manual_seed(0)
        steps = {
            "draw": lambda task=task, source=source: task.sample(BATCH, source),  # type: ignore[misc]
            "step": our_step(transformer(task, depth), task, SPEC),
        }
        times = interleave(steps, rounds)
        share = spread([a / b for a, b in zip(times["draw"], times["step"], strict=True)])
        found[name] = {
            "draw": spread(times["draw"]),
            "step": spread(times["step"]),
            "share": share,
        }
        table.add_row(name, shown(spread(times["draw"])), shown(spread(times["step"])), f"{100 * share['median']:.2f}%")
    console.print(table)
    return found


def optimizers(console: Console, steps: int) -> dict[str, Any]:
    """Excess squared error over the Bayes-optimal ridge, divided by d, after the same number of steps."""
    task = regression("paired")
    prompt = task.sample(2048, torch.Generator().manual_seed(1))
    best = next(iter(task.learners().values()))(prompt)
    table = Table("optimiser", "learning rate", "excess / d by seed", "mean", "s", title=f"Optimisers, {steps} steps")
    found = []
    for optimizer, rate in (
        ("adamw", 1e-3),
        ("adamw", 3e-3),
        ("adamw", 1e-2),
        ("muon", 1e-3),
        ("muon", 3e-3),
    ):
        spec = TrainSpec(steps=steps, optimizer=optimizer, learning_rate=rate)  # type: ignore[arg-type]
        excesses, seconds = [], 0.0
        for seed in range(3):
            model = transformer(task, depth=4, seed=seed)
            seconds += train(model, task, spec, seed=seed).seconds / 3
            with torch.no_grad():
                excess = (model(prompt.inputs) - best).square()[:, 1:].mean() / DIMENSIONS
            excesses.append(excess.item())
        mean = statistics.mean(excesses)
        found.append({"optimizer": optimizer, "learning_rate": rate, "excess": excesses, "seconds": seconds})
        table.add_row(optimizer, f"{rate:g}", " ".join(f"{e:.4f}" for e in excesses), f"{mean:.4f}", f"{seconds:.1f}")
    console.print(table)
    console.print("Muon's matrices have matrix_learning_rate 0.02; the rate shown is that of its other parameters.")
    return {"steps": steps, "rows": found}


def compilation(console: Console, rounds: int) -> dict[str, Any]:
    """Compile seconds against milliseconds saved, and the run length from which compiling pays."""
    task = regression("interleaved")
    eager = our_step(transformer(task), task, SPEC)
    compiled = our_step(transformer(task), task, SPEC.model_copy(update={"compile": "on"}))
    began = time.perf_counter()
    compiled()
    seconds = time.perf_counter() - began
    times = interleave({"eager": eager, "compiled": compiled}, rounds)
    saved = statistics.median([a - b for a, b in zip(times["eager"], times["compiled"], strict=True)])
    pays = f"{1000 * seconds / saved:,.0f} steps" if saved > 0 else "never"
    table = Table("eager, ms", "compiled, ms", "compile, s", "saved, ms", "pays from", title="torch.compile on CPU")
    table.add_row(
        shown(spread(times["eager"])),
        shown(spread(times["compiled"])),
        f"{seconds:.1f}",
        f"{saved:.2f}",
        pays,
    )
    console.print(table)
    return {
        "eager": spread(times["eager"]),
        "compiled": spread(times["compiled"]),
        "compile_seconds": seconds,
        "saved_milliseconds": saved,
        "pays_from": pays,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", action="store_true", help="compare AdamW and Muon only")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile only")
    parser.add_argument("--rounds", type=int, default=15, help="of each timing")
    parser.add_argument("--steps", type=int, default=200, help="of each training of --optimizers")
    parser.add_argument("--threads", type=int, help="PyTorch's threads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)  # GPT-2's parameters and prompts
    console = Console()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    if given.optimizers:
        found["optimizers"] = optimizers(console, given.steps)
    if given.compile:
        found["compile"] = compilation(console, given.rounds)
    if not (given.optimizers or given.compile):
        found["step"] = against_gpt2(console, given.rounds)
        found["drawing"] = drawing(console, given.rounds)
    if given.json:
        write_json(given.json, found)


if __name__ == "__main__":
    main()
