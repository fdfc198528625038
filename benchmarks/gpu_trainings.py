"""The parts of `gpu.py` that train or decode models."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from contextlab.models import Model, build_model, preset
from contextlab.prompt import Prompt, Task
from contextlab.tasks import build_task
from contextlab.training import TrainSpec, TrainState, train_step
from contextlab.training.stack import Stack
from contextlab.training.step import loss_and_gradients
from gpu_parts import Size, Tell, ratios, recorded, spread, timed, wait

TRAINED = {"transformer": {"position": "none"}, "gated_delta_net": {"short_conv": 0}}
"""Presets of recipe `demo` on regression, with its options."""
POLICIES = ("full", "streaming_llm", "snapkv", "h2o", "quest", "quantize:bits=4")


def regression() -> Task:
    """The task of recipe `demo`."""
    return build_task("linear_regression", dimensions=5, examples=16, noise=0.5)


def spec_of(size: Size, **changes: Any) -> TrainSpec:
    """How `demo` trains, in float32."""
    given = {
        "steps": 900, "batch": size.batch, "learning_rate": 0.006, "matrix_learning_rate": 0.01, "compile": "off",
        "precision": "float32",
    }  # fmt: skip
    return TrainSpec.parse({**given, **changes})


def trained(name: str, size: Size, task: Task, seed: int = 0) -> Model:
    """A fresh model of `demo`."""
    options = {"width": size.width, "depth": size.depth, "mlp_ratio": 2, **TRAINED[name]}
    return build_model(preset(name, **options).for_task(task), seed=seed).to(size.device).train()


def together(size: Size, tell: Tell) -> None:
    """Steps of M models as one program against the same M one after the other: times, and how far apart they end."""
    task, spec = regression(), spec_of(size)
    for count in sorted(size.members, key=lambda each: each != 16):  # what the issue asks for first
        for name in TRAINED:
            with recorded(tell, model=name, members=count):
                alone = [trained(name, size, task, seed) for seed in range(count)]
                models = [trained(name, size, task, seed) for seed in range(count)]
                states = [TrainState.start(model, spec, seed) for seed, model in enumerate(alone)]
                stacked = [TrainState.start(model, spec, seed) for seed, model in enumerate(models)]
                stack = Stack(models, stacked, [spec] * count)

                def one_by_one(alone: Any = alone, states: Any = states) -> None:
                    for model, state in zip(alone, states, strict=True):
                        train_step(model, task, spec, state)

                def as_one(stack: Stack = stack, states: Any = stacked) -> None:
                    prompts = [task.sample(spec.batch, state.generator, size.device) for state in states]
                    stack.step([task] * len(states), prompts)

                one_by_one()
                as_one()
                pairs = zip(alone, models, strict=True)
                apart = max(float((a - b).abs().max()) for x, y in pairs for a, b in _weights(x, y))
                rounds = size.rounds if count <= 16 else 2  # one by one, 64 take a while
                times = timed({"alone": one_by_one, "together": as_one}, min(rounds, size.rounds), size.steps)
                tell(
                    model=name, members=count, apart_after_one_step=float(f"{apart:.3g}"),
                    ms_alone=spread(times["alone"]), ms_together=spread(times["together"]),
                    times_as_fast=ratios(times["alone"], times["together"]), loss_in_one_call=stack.loss_maps,
                )  # fmt: skip


def _weights(first: Model, second: Model) -> list[tuple[Tensor, Tensor]]:
    return list(zip(first.state_dict().values(), second.state_dict().values(), strict=True))


def bf16(size: Size, tell: Tell) -> None:
    """A step in float32 and under bfloat16 autocast, and the loss that each comes to after 40 rounds of steps."""
    task = build_task("linear_regression", dimensions=20, examples=41)
    for name in TRAINED:
        with recorded(tell, model=name):
            steps, losses = {}, {}
            for precision in ("float32", "bfloat16"):
                model, spec = trained(name, size, task), spec_of(size, precision=precision)
                state = TrainState.start(model, spec)
                losses[precision] = 0.0

                def step(model: Any = model, spec: TrainSpec = spec, state: TrainState = state) -> Tensor:
                    return train_step(model, task, spec, state).loss

                steps[precision] = step
            times = timed(steps, size.rounds, size.steps)
            for precision, step in steps.items():
                last = [step() for _ in range(40 * size.steps)][-size.steps :]
                losses[precision] = float(torch.stack(last).mean())
            tell(
                model=name, **{f"ms_{each}": spread(values) for each, values in times.items()},
                times_as_fast=ratios(times["float32"], times["bfloat16"]),
                **{f"loss_{each}": round(value, 4) for each, value in losses.items()},
            )  # fmt: skip


def captured(size: Size, tell: Tell) -> None:
    """A step as it is, compiled, and with its forward and backward as one CUDA graph."""
    task, spec = regression(), spec_of(size)
    for name in TRAINED:
        plain = trained(name, size, task)
        state = TrainState.start(plain, spec)
        steps: dict[str, Callable[[], Any]] = {"eager": lambda m=plain, s=state: train_step(m, task, spec, s)}
        if size.device == "cuda":
            with recorded(tell, model=name, way="CUDA graph"):
                model = trained(name, size, task)
                steps["graph"] = _graphed(model, task, spec, TrainState.start(model, spec))
            with recorded(tell, model=name, way="CUDA graph of 16 together"):
                _graphed_together(name, size, task, spec, tell)
        with recorded(tell, model=name, way="torch.compile"):
            model = trained(name, size, task)
            compiled: Any = torch.compile(model, backend="inductor" if size.device == "cuda" else "aot_eager")
            other = TrainState.start(model, spec)
            began = time.perf_counter()
            train_step(compiled, task, spec, other)
            wait()
            tell(model=name, way="torch.compile", compile_seconds=round(time.perf_counter() - began, 1))
            steps["compiled"] = lambda m=compiled, s=other: train_step(m, task, spec, s)
        times = timed(steps, size.rounds, size.steps)
        for way, values in times.items():
            tell(model=name, way=way, ms=spread(values), times_as_fast=ratios(times["eager"], values))


def _graphed(model: Model, task: Task, spec: TrainSpec, state: TrainState) -> Callable[[], None]:
    """A step whose loss and gradients come from a CUDA graph; prompts are copied in, the update is as ever."""
    from contextlab.training import optim
    from contextlab.training.schedule import clip

    prompt = task.sample(spec.batch, state.generator, "cuda")
    replay, (_, gradients) = _capture(lambda: loss_and_gradients(model, task, spec, state.params, prompt))

    def step() -> None:
        _copy(task.sample(spec.batch, state.generator, "cuda"), prompt)
        replay()
        clipped, _ = clip(gradients, spec.clip)
        rates = {"learning_rate": spec.learning_rate, "matrix_learning_rate": spec.matrix_learning_rate}
        optim.update(state.params, clipped, state.optimizer, **rates, skip=state.failed)

    return step


def _graphed_together(name: str, size: Size, task: Task, spec: TrainSpec, tell: Tell) -> None:
    """Losses and gradients of 16 members from one graph against the same without it."""
    models = [trained(name, size, task, seed) for seed in range(16)]
    states = [TrainState.start(model, spec, seed) for seed, model in enumerate(models)]
    stack = Stack(models, states, [spec] * 16)
    prompts = [task.sample(spec.batch, state.generator, size.device) for state in states]
    replay, _ = _capture(lambda: stack.gradients([task] * 16, prompts))
    eager: Callable[[], Any] = lambda: stack.gradients([task] * 16, prompts)  # noqa: E731
    times = timed({"eager": eager, "graph": replay}, size.rounds, size.steps)
    tell(
        model=name, way="gradients of 16 together", ms_eager=spread(times["eager"]), ms_graph=spread(times["graph"]),
        times_as_fast=ratios(times["eager"], times["graph"]),
    )  # fmt: skip


def _capture(work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A CUDA graph of some work: what replays it, and the tensors that it fills."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        filled = work()
    return graph.replay, filled


def _copy(source: Prompt, into: Prompt) -> None:
    for name, tensor in into.tensors().items():
        tensor.copy_(source.tensors()[name])


def target(size: Size, tell: Tell) -> None:
    """Wall time to an excess of 0.02 per dimension, as `target.py` measures it; and the public model's step."""
    from target import Yardstick, ours, public, reach

    d, examples, width, layers, seconds = size.target
    task = build_task("linear_regression", dimensions=d, examples=examples)
    yardstick = Yardstick(task, d, size.device, prompts=1024 if size.device == "cuda" else 32)
    tiny = size.device == "cpu"
    spec = TrainSpec(
        steps=20 if tiny else 20_000, batch=4 if tiny else 256, learning_rate=1e-3, matrix_learning_rate=0.01,
        warmup=200, final_fraction=1.0, compile="off",
    )  # fmt: skip
    heads = 4 if tiny else 8
    with recorded(tell, side="contextlab"):
        step, excess = ours(task, yardstick, spec, size.device, depth=layers, width=width, heads=heads, mlp_ratio=4)
        curve: Callable[[int, float, float], None] = lambda step, seconds, excess: tell(  # noqa: E731
            side="contextlab", step=step, seconds=round(seconds, 2), excess=round(excess, 5)
        )
        every = 5 if tiny else 100
        found = reach(step, excess, every=every, seconds=0.8 * seconds, steps=spec.steps, told=curve)
        tell(side="contextlab", reached=found.reached, steps=found.steps, seconds=round(found.seconds, 2))
    with recorded(tell, side="public"):
        step, _ = public(d, examples, 0.0, yardstick, "tiny" if tiny else "standard", size.device)
        tell(side="public", ms_step=spread(timed({"step": step}, size.rounds, size.steps)["step"]))


@torch.no_grad()
def decoding(size: Size, tell: Tell) -> None:
    """Prompts of many tokens read and then decoded from, under policies at a budget of 10%, in bfloat16."""
    from contextlab.experiments import load_recipe
    from contextlab.policies import parse_policy
    from policies import measure

    dtype = torch.bfloat16 if size.device == "cuda" else torch.float32
    model = build_model(load_recipe("byte-lm").trainings()[0].model).to(size.device, dtype).eval()
    source = torch.Generator().manual_seed(0)

    def clock() -> float:
        wait()
        return time.perf_counter()

    for length in size.lengths:
        tokens = torch.randint(256, (1, length + size.decoded), generator=source).to(size.device)
        full = 0.0
        for name in POLICIES:
            with recorded(tell, policy=name, length=length):
                policy = None if name == "full" else parse_policy(name, None if ":" in name else "10%")
                measure(model, policy, tokens[:, : min(2048, length)], 4, clock)  # to warm up
                prefill, decode, held = measure(model, policy, tokens, size.decoded, clock)
                full = decode if name == "full" else full
                tell(
                    policy=name, length=length, prefill_seconds=float(f"{prefill:.4g}"),
                    ms_token=float(f"{1000 * decode:.4g}"), state_mib=round(held / 2**20, 2),
                    decode_times_as_fast=float(f"{full / decode:.3g}") if full else None,
                )  # fmt: skip
