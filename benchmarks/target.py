"""How long until in-context regression is learned: wall time to an excess of 0.02 per dimension, of ours and another.

    python benchmarks/target.py [--times 10] [--public tiny|small|standard] [--noise 0.5] [--threads N] [--json FILE]

The task is the regression of recipe `demo`: y = w x + noise of 0.5, d = 5, 16 examples; `--noise 0` is that of Garg et
al. (2208.01066). The excess is the mean over all positions of the squared distance to the best prediction (ridge; least
squares without noise), divided by d; one that predicts 0 has about 0.75. It is measured on the same 2,048 fresh prompts
for both, outside the clock.

Ours: the transformer of recipe `demo`, each example one token, Muon, batch 128. The public side: `GPT2Model` of
transformers with a linear read-in and read-out over x_1, y_1, x_2, ..., as their code builds it, and their settings:
Adam at 1e-4, batch 64, width 256, 12 layers, 8 heads ("standard"; "small" is 128, 6, 4 and "tiny" 64, 3, 2), examples
from 11 up by 2 every 2,000 steps. It is stopped at `--times` ours: its factor is then "at least".
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.files import write_json
from contextlab.models import build_model, preset
from contextlab.prompt import Prompt, Task
from contextlab.tasks import build_task
from contextlab.training import TrainSpec, TrainState, train_step

EXCESS, PROMPTS = 0.02, 2048
PUBLIC = {"standard": (256, 12, 8), "small": (128, 6, 4), "tiny": (64, 3, 2)}
"""Width, layers and heads of the sizes that the public code has."""
OURS = TrainSpec(
    steps=800, batch=128, learning_rate=0.006, matrix_learning_rate=0.01, warmup=20, final_fraction=0.1, compile="off"
)


@dataclass
class Reached:
    """What came of one side. seconds: of training until the excess was reached, or until it was stopped.

    curve: (step, seconds, excess) each time that it was measured.
    """

    reached: bool
    seconds: float
    steps: int
    curve: list[tuple[int, float, float]] = field(default_factory=list)


class Yardstick:
    """The excess of predictions for fixed prompts of a task whose examples have d dimensions."""

    def __init__(self, task: Task, d: int, device: torch.device | str = "cpu", prompts: int = PROMPTS) -> None:
        self.prompt: Prompt = task.sample(prompts, torch.Generator().manual_seed(1))
        best = min(task.learners().values(), key=lambda each: self._error(each(self.prompt)))
        self.best, self.d, self.prompt = best(self.prompt).to(device), d, self.prompt.to(device)

    def _error(self, prediction: Tensor) -> float:
        return float((prediction - self.prompt.targets).square()[self.prompt.scored].mean())

    def __call__(self, prediction: Tensor) -> float:
        """prediction: [prompts, T, 1], as a model's for `prompt`."""
        far = (prediction.to(self.best) - self.best).square()[self.prompt.scored]
        return float(far.mean()) / self.d


def reach(
    step: Callable[[], Any],
    excess: Callable[[], float],
    *,
    every: int,
    seconds: float,
    steps: int | None = None,
    told: Callable[[int, float, float], None] = lambda step, seconds, excess: None,
    target: float = EXCESS,
) -> Reached:
    """Train until the excess is reached, or for so many seconds or steps; it is measured outside the clock."""
    spent, done, found = 0.0, 0, Reached(False, 0.0, 0)
    while spent < seconds and (steps is None or done < steps):
        began = time.perf_counter()
        for _ in range(every):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent, done = spent + time.perf_counter() - began, done + every
        now = excess()
        found.curve.append((done, spent, now))
        told(done, spent, now)
        if now <= target:
            found.reached = True
            break
    found.seconds, found.steps = spent, done
    return found


def ours(
    task: Task, yardstick: Yardstick, spec: TrainSpec, device: torch.device | str = "cpu", **options: Any
) -> tuple[Callable[[], Any], Callable[[], float]]:
    """A step of our transformer, and its excess."""
    model = build_model(preset("transformer", position="none", **options).for_task(task), seed=0).to(device).train()
    state = TrainState.start(model, spec, seed=0)

    @torch.no_grad()
    def excess() -> float:
        return yardstick(model(yardstick.prompt.inputs))

    return lambda: train_step(model, task, spec, state), excess


def public(
    d: int,
    examples: int,
    noise: float,
    yardstick: Yardstick,
    size: str,
    device: torch.device | str = "cpu",
) -> tuple[Callable[[], Any], Callable[[], float]]:
    """A step of the public code's model and recipe, and its excess; a curriculum over d needs d > 5."""
    from transformers import GPT2Config, GPT2Model

    width, layers, heads = PUBLIC[size]
    torch.manual_seed(0)
    config = GPT2Config(
        n_positions=2 * examples, n_embd=width, n_layer=layers, n_head=heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )  # fmt: skip
    parts = nn.ModuleList([nn.Linear(d, width), GPT2Model(config), nn.Linear(width, 1)]).to(device).train()
    read_in, backbone, read_out = parts
    optimizer = torch.optim.Adam(parts.parameters(), lr=1e-4)
    done = 0

    def predict(xs: Tensor, ys: Tensor) -> Tensor:
        wide = torch.cat((ys.unsqueeze(-1), ys.new_zeros(*ys.shape, d - 1)), 2)
        tokens = torch.stack((xs, wide), 2).flatten(1, 2)
        hidden = backbone(inputs_embeds=read_in(tokens)).last_hidden_state
        predicted: Tensor = read_out(hidden)[:, ::2, 0]
        return predicted

    def step() -> None:
        nonlocal done
        points, used = min(examples, 11 + 2 * (done // 2000)), min(d, 5 + done // 2000)
        xs = torch.randn(64, points, d, device=device)
        xs[..., used:] = 0
        ys = (xs @ torch.randn(64, d, 1, device=device))[..., 0] + noise * torch.randn(64, points, device=device)
        optimizer.zero_grad()
        (predict(xs, ys) - ys).square().mean().backward()
        optimizer.step()
        done += 1

    @torch.no_grad()
    def excess() -> float:
        prompt = yardstick.prompt
        return yardstick(predict(*_examples(prompt)).unsqueeze(-1))

    return step, excess


def _examples(prompt: Prompt) -> tuple[Tensor, Tensor]:
    assert prompt.xs is not None
    assert prompt.ys is not None
    return prompt.xs, prompt.ys[..., 0]


def main() -> None:
    """Measure ours, then the public side; print and write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=float, default=10.0, help="of ours, after which the public side is stopped")
    parser.add_argument("--public", choices=list(PUBLIC), default="standard")
    parser.add_argument("--noise", type=float, default=0.5, help="of the examples' outputs")
    parser.add_argument("--threads", type=int, help="PyTorch's threads")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    task = build_task("linear_regression", dimensions=5, examples=16, noise=given.noise)
    yardstick = Yardstick(task, 5)

    def told(name: str) -> Callable[[int, float, float], None]:
        return lambda step, seconds, excess: print(
            f"{name}: step {step:,}, {seconds:.1f} s, excess {excess:.4f}", flush=True
        )

    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; excess per dimension wanted: {EXCESS}")
    step, excess = ours(task, yardstick, OURS, depth=4, width=64, heads=4, mlp_ratio=2)
    first = reach(step, excess, every=20, seconds=600, steps=OURS.steps, told=told("contextlab"))
    found: dict[str, Any] = {"contextlab": vars(first), "threads": torch.get_num_threads()}
    if first.reached:
        step, excess = public(5, 16, given.noise, yardstick, given.public)
        second = reach(step, excess, every=20, seconds=given.times * first.seconds, told=told("public"))
        factor = second.seconds / first.seconds
        found |= {"public": vars(second), "size": given.public, "factor": factor, "at_least": not second.reached}
        print(f"{'' if second.reached else 'at least '}{factor:.1f} times as fast")
    else:
        print("ours did not reach it")
    if given.json:
        write_json(given.json, found)


if __name__ == "__main__":
    main()
