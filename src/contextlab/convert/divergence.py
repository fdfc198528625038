"""How far a student is from its teacher on a task: its quality, and its predictions beside the teacher's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.models.answer import answer
from contextlab.prompt import HIGHER_IS_BETTER, Prompt, Task, task_name, wide
from contextlab.training.distributed import seeded

BATCH = 16


@dataclass(frozen=True)
class Compared:
    """Teacher and student on the same prompts of a task, of its test part where it has one; scored positions only.

    task: its name. metric: of the quality, "bits" (a token; a byte where tokens are bytes) where the task tells it.
    before, after: means of the metric of teacher and student.
    divergence: the mean KL divergence of the student's predictions from the teacher's, in nats; of real predictions the
        squared difference over the teacher's mean square.
    agreement: the share of positions where both think the same token likeliest; NaN of real predictions.
    prompts: how many.
    """

    task: str
    metric: str
    before: float
    after: float
    divergence: float
    agreement: float
    prompts: int

    @property
    def higher_is_better(self) -> bool:
        return self.metric in HIGHER_IS_BETTER


@torch.no_grad()
def compare(teacher: Any, student: Any, task: Task, prompts: int = 64, seed: int = 0) -> Compared:
    """Teacher and student, models of the same sizes, on `prompts` prompts of a task; see `Compared`."""
    asked = held_out(task)
    parameter = next(teacher.parameters())
    generator = seeded("conversion", seed, device=parameter.device)
    totals = torch.zeros(5, dtype=torch.float64)
    metric = ""
    modes = [(model, model.training) for model in (teacher, student)]
    try:
        for model, _ in modes:
            model.eval()
        for start in range(0, prompts, BATCH):
            prompt = asked.sample(min(BATCH, prompts - start), generator, parameter.device)
            prompt = prompt.to(parameter.dtype) if parameter.dtype != torch.float32 else prompt
            theirs, ours = answer(teacher, prompt), answer(student, prompt)
            before, after = asked.errors(theirs, prompt), asked.errors(ours, prompt)
            metric = "bits" if "bits" in before else asked.metric
            values = [before[metric], after[metric], *_apart(wide(theirs), wide(ours), prompt)]
            totals[:4] += torch.stack([_sum(value, prompt) for value in values]).cpu()
            totals[4] += int(prompt.scored.sum())
    finally:
        for model, mode in modes:
            model.train(mode)
    first, second, apart, agree = (totals[:4] / totals[4].clamp_min(1)).tolist()
    if prompt.targets.is_floating_point():  # both were squares: the difference as a share of the teacher's
        apart, agree = apart / max(agree, 1e-30), float("nan")
    return Compared(task_name(task), metric, first, second, apart, agree, prompts)


def kl(theirs: Tensor, ours: Tensor) -> Tensor:
    """The KL divergence, in nats, from the teacher's predictions to the student's: logits [..., V] -> [...]."""
    return F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def held_out(task: Task) -> Task:
    """The task on its test part, where it tells training's documents from those of the test."""
    names = {each.name for each in dataclasses.fields(task)}
    return task.replace(part="test") if "part" in names else task


def _apart(theirs: Tensor, ours: Tensor, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """KL divergence and agreement [B, T]; of real predictions the squared difference, and the teacher's square."""
    if prompt.targets.is_floating_point():
        return (ours - theirs).square().sum(-1), theirs.square().sum(-1)
    return kl(theirs, ours), (theirs.argmax(-1) == ours.argmax(-1)).float()


def _sum(value: Tensor, prompt: Prompt) -> Tensor:
    return (value.double() * prompt.scored).sum()
