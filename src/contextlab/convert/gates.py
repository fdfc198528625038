"""Which layers become another mixer, by gates that are trained between the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.convert.students import mixer_of
from contextlab.convert.teacher import Distil, task_of
from contextlab.convert.transfer import StageResult, refuse_divergence
from contextlab.errors import InputError
from contextlab.mixers.base import Mixer
from contextlab.models.digest import fingerprint
from contextlab.models.stack import Model
from contextlab.prompt import Task
from contextlab.state import State
from contextlab.training.spec import TrainSpec
from contextlab.training.trainer import train

RATE = 0.1
"""AdamW's peak: a gate is one number, and has to come from the middle to an end."""
HALVINGS = 60


def capped(scores: Tensor, count: float) -> Tensor:
    """Gates sigmoid(scores + c) [n], with the c with which they add up to `count`, 0 < count < n; differentiable."""
    with torch.no_grad():
        low, high = -scores.max() - 40, -scores.min() + 40
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            more = (scores + middle).sigmoid().sum() < count
            low, high = torch.where(more, middle, low), torch.where(more, high, middle)
        shift = (low + high) / 2
        gates = (scores + shift).sigmoid()
        slopes = gates * (1 - gates)
    # One step of Newton's method from c: of no size, but with the slope that c has in the scores.
    total = (scores + shift).sigmoid().sum()
    return (scores + shift - (total - total.detach()) / slopes.sum().clamp_min(1e-30)).sigmoid()


class Gate(Mixer):
    """(1 - g) old + g new, of whole texts."""

    def __init__(self, old: nn.Module, new: nn.Module, width: int) -> None:
        super().__init__(width)
        self.old, self.new = old, new
        self.share: Tensor | None = None

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """x: [B, T, D]; without a state."""
        assert self.share is not None
        assert not keep_state
        y, other = (each(x, None, mask, False)[0] for each in (self.old, self.new))
        return torch.lerp(y, other, self.share.to(y.dtype)), None

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: what both hold."""
        return sum(each.state_nbytes(length, batch, dtype) for each in (self.old, self.new))  # type: ignore[operator]

    def flops(self, length: int) -> int:
        """See `Mixer.flops`: of both."""
        return sum(each.flops(length) for each in (self.old, self.new))  # type: ignore[operator]


class Gated(nn.Module):
    """A student whose changed layers are gates between the old mixer and the new one; only the gates are trained.

    count: what the gates add up to. The student is as it was after `leave`.
    """

    def __init__(self, teacher: Model, student: Model, layers: Sequence[int], count: int) -> None:
        super().__init__()
        self.spec = student.spec
        self.count = count
        self.scores = nn.Parameter(torch.zeros(len(layers), device=next(student.parameters()).device))
        self._model, self._layers = (student,), tuple(layers)  # in a tuple, so that its parameters are not trained
        self._new = [mixer_of(student, i) for i in layers]
        self._gates = [
            Gate(mixer_of(teacher, i), new, student.spec.width) for i, new in zip(layers, self._new, strict=True)
        ]
        for i, gate in zip(layers, self._gates, strict=True):
            student.blocks[i].mixer = gate

    def gates(self) -> Tensor:
        """The share of the new mixer in each layer, [n]."""
        return capped(self.scores, self.count)

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [B, T] or [B, T, d] -> predictions [B, T, output_size]."""
        for gate, share in zip(self._gates, self.gates().unbind(), strict=True):
            gate.share = share
        answer: Tensor = self._model[0](inputs)
        return answer

    def leave(self) -> None:
        """Put the new mixers back into the student."""
        for i, new in zip(self._layers, self._new, strict=True):
            self._model[0].blocks[i].mixer = new


def train_gates(
    teacher: Model,
    student: Model,
    tasks: Sequence[Task],
    layers: Sequence[int],
    count: int,
    steps: int,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    folder: Any = None,
    progress: Any = None,
) -> tuple[dict[int, float], StageResult]:
    """The gate of each layer, 0 where the old mixer is needed and 1 where the new one serves, and how it was trained.

    Both models stay as they are; the mixed one learns to give the teacher's predictions (KL divergence) by its gates
    alone, which add up to `count` throughout.

    teacher, student: differ in the mixers of `layers`. tasks: the prompts that are read, synthetic recall above all.
    settings: keys of a TrainSpec but its steps, rate and adapters, such as batch.
    """
    if count == len(layers):
        return dict.fromkeys(layers, 1.0), StageResult("gates", 0, 0, 0.0, 0.0, 0.0)
    if steps < len(tasks):
        raise InputError(f"layers: gates:{count} are trained, and {steps} steps are too few for {len(tasks)} tasks")
    kept = {key: value for key, value in (settings or {}).items() if key not in ("lora", "freeze")}
    given = {
        "batch": 16, "warmup": 0, "final_fraction": 0.1, "log_every": max(1, min(20, steps // 10)), "compile": "off",
        **kept, "steps": steps, "learning_rate": RATE, "optimizer": "adamw", "weight_decay": 0.0,
    }  # fmt: skip
    digest = fingerprint(teacher)
    wrapped = [task_of(teacher, task, Distil(logits=1.0), layers, digest) for task in tasks]
    needed = [(each, each.requires_grad) for model in (teacher, student) for each in model.parameters()]
    modes = teacher.training, student.training
    teacher.eval()
    student.eval()
    model = Gated(teacher, student, layers, count)
    try:
        for parameter, _ in needed:
            parameter.requires_grad_(False)
        result = train(
            model, wrapped, TrainSpec.parse(given, "train"), seed=seed, folder=folder, resume=folder is not None,
            progress=progress,
        )  # fmt: skip
    finally:
        model.leave()
        for parameter, wanted in needed:
            parameter.requires_grad_(wanted)
        teacher.train(modes[0])
        student.train(modes[1])
    refuse_divergence("layers: gates", result, folder)
    history = result.history
    told = StageResult(
        "gates", result.step, int(history["tokens"].iloc[-1]), float(history["seconds"].iloc[-1]),
        float(history["loss"].iloc[0]), float(history["loss"].iloc[-1]),
    )  # fmt: skip
    with torch.no_grad():
        return dict(zip(layers, model.gates().tolist(), strict=True)), told
