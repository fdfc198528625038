"""The teacher in the task: what a trained model made of prompts, as what a student is to give.

A teacher is no second model in the training loop. Prompts of other tasks are drawn, the teacher reads them once, and
what it made of them are the targets. So checkpoints, exact resume, schedules, optimisers and accumulation are those of
every training.

- `LayerTask`, attention transfer: what the teacher's layers are given are the inputs, what its mixers gave the targets
  (LoLCATs, 2410.10254; stage 1 of RADLADS, 2505.03005). All new mixers are trained at once from one reading by the
  teacher, which ends at the last of the layers, and nothing of the student is run but them (`Layers`).
- `MatrixTask`: the same with the matrices by which heads mix tokens in place of the outputs (MOHAWK, 2408.10189).
- `TeacherTask`, distillation: hidden states, predictions and the task's own loss, weighed by `Distil`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from contextlab.convert.distil import Distil
from contextlab.convert.divergence import kl
from contextlab.convert.students import matrices_of, mixer_of, watched
from contextlab.models.stack import Model
from contextlab.prompt import Learner, Prompt, Task, wide

SCALE_PROMPTS = 8
"""Prompts on which the sizes of the teacher's vectors are measured, by which errors are divided."""


class _Enough(Exception):
    """The last layer has been seen; the rest of the model need not be run."""


@torch.no_grad()
def read_layers(model: Model, inputs: Tensor, layers: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """What the mixers of these layers are given and what they give, [B, T, D] each, from one reading of whole prompts.

    inputs: [B, T, input_size] float or [B, T] int64. layers: numbers of blocks, each of which is used once. The model
    is run up to the last of them only.
    """
    last = max(layers)
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def hook(index: int) -> Any:
        def note(module: nn.Module, given: tuple[Any, ...], made: tuple[Tensor, Any]) -> None:
            seen[index] = given[0], made[0]
            if index == last:
                raise _Enough

        return note

    handles = [model.blocks[i].mixer.register_forward_hook(hook(i)) for i in layers]  # type: ignore[union-attr]
    try:
        model(inputs)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [seen[i][0] for i in layers], [seen[i][1] for i in layers]


@dataclass(frozen=True)
class _OfTeacher(Task):
    """A task whose prompts a teacher has read.

    task: from which prompts are drawn. teacher: digest of the model. layers: those that are replaced. scales: mean
    squares of the teacher's vectors, by which errors are divided, one for each kind of them. model: the teacher.
    """

    _model: ClassVar[Any]

    task: Task
    teacher: str
    layers: tuple[int, ...]
    scales: tuple[float, ...] = ()
    model: InitVar[Any] = None

    def __post_init__(self, model: Any) -> None:
        object.__setattr__(self, "_model", model)  # no field, as fields tell checkpoints what a task is

    @property
    def input_size(self) -> int:
        return self.task.input_size

    @property
    def output_size(self) -> int:
        return self.task.output_size

    @property
    def read_in(self) -> Any:  # type: ignore[override]
        """That of the task."""
        return self.task.read_in

    def learners(self) -> dict[str, Learner]:
        """None: the teacher is what is best."""
        return {}

    @property
    def growing(self) -> list[str]:
        """Those of the task."""
        return self.task.growing

    def replace(self, **options: Any) -> Any:
        """The same teacher with other options of the task."""
        return dataclasses.replace(self, task=self.task.replace(**options), model=self._model)

    def __repr__(self) -> str:  # stands for the task in checkpoints
        return f"{type(self).__name__}({self.task!r}, {self.teacher})"


@dataclass(frozen=True, repr=False)
class LayerTask(_OfTeacher):
    """Regression of what a teacher's mixers give, [B, T, n D], on what they are given, [B, T, n D], for n layers.

    The loss is the mean over layers of the squared error over the mean square of the teacher's outputs there (measured
    once, so that the objective does not depend on how a batch is cut): 1 for a mixer that answers nothing.
    """

    @staticmethod
    def read(model: Model, inputs: Tensor, layers: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """What the layers' mixers are given, and what is learned of them, [B, T, ...] each."""
        return read_layers(model, inputs, layers)

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts and let the teacher read them, up to the last layer."""
        prompt = self.task.sample(batch, generator, device)
        given, made = self.read(self._model, _for(self._model, prompt.inputs), self.layers)
        scored = torch.ones_like(prompt.scored)
        return Prompt(torch.cat(given, -1), torch.cat(made, -1), scored, prompt.shot)

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """See the class. prediction: [B, T, n D]."""
        return self.errors(prediction, prompt)["error"].mean()

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """error [B, T]: the squared error of a token as a share of the mean square, averaged over layers."""
        square = (wide(prediction) - prompt.targets).square().unflatten(-1, (len(self.layers), -1)).mean(-1)
        return {"error": (square / square.new_tensor(self.scales)).mean(-1)}

    def by_layer(self, prediction: Tensor, prompt: Prompt) -> list[float]:
        """The error of each layer, averaged over tokens [B, T]."""
        square = (wide(prediction) - prompt.targets).square().unflatten(-1, (len(self.layers), -1)).mean((0, 1, 3))
        return (square / square.new_tensor(self.scales)).tolist()


@dataclass(frozen=True, repr=False)
class MatrixTask(LayerTask):
    """Regression of the matrices by which a teacher's mixers mix tokens, [B, T, n H T], on what they are given.

    MOHAWK's matrix orientation (2408.10189, section 4.1), its squared norm divided by that of the teacher's matrices.
    """

    @staticmethod
    def read(model: Model, inputs: Tensor, layers: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
        """See `LayerTask.read`."""
        given, _ = read_layers(model, inputs, layers)
        with torch.no_grad():
            return given, [matrices_of(mixer_of(model, i), x) for i, x in zip(layers, given, strict=True)]


@dataclass(frozen=True, repr=False)
class TeacherTask(_OfTeacher):
    """The prompts of a task with a teacher's predictions and hidden vectors, and their weighed loss.

    distil: the weights. Predictions are [B, T, output_size], behind them the hidden vectors [B, T, depth D] where
    `distil.hidden` counts.
    """

    distil: Distil = field(default_factory=lambda: Distil(logits=1.0))

    @property
    def metric(self) -> str:  # type: ignore[override]
        """That of the task, as are the two that follow."""
        return self.task.metric

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """See `metric`."""
        return self.task.higher_is_better

    def chance(self) -> Mapping[str, float]:
        """See `metric`."""
        return self.task.chance()

    def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
        """Draw prompts and let the teacher read them."""
        prompt = self.task.sample(batch, generator, device)
        if self.distil.logits or self.distil.hidden:
            with torch.no_grad():
                read = watched(self._model, _for(self._model, prompt.inputs), bool(self.distil.hidden))
            prompt.hidden = {**(prompt.hidden or {}), "teacher": read}
        return prompt

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        """See `Distil`."""
        answer, hidden = prediction.tensor_split((self.output_size,), -1)
        total = answer.new_zeros(())
        if self.distil.task:
            total = total + self.distil.task * self.task.loss(answer, prompt)
        if prompt.hidden is None or "teacher" not in prompt.hidden:
            return total
        wanted, wanted_hidden = prompt.hidden["teacher"].tensor_split((self.output_size,), -1)
        if self.distil.logits:
            total = total + self.distil.logits * self._apart(wide(answer), wide(wanted), prompt)
        if self.distil.hidden:
            square = (wide(hidden) - wanted_hidden).square().unflatten(-1, (len(self.scales) - 1, -1)).mean((0, 1, 3))
            total = total + self.distil.hidden * (square / square.new_tensor(self.scales[1:])).mean()
        return total

    def _apart(self, answer: Tensor, wanted: Tensor, prompt: Prompt) -> Tensor:
        count = prompt.scored.sum().clamp_min(1)
        if prompt.targets.is_floating_point():
            square = (answer - wanted).square().mean(-1)
            return (square * prompt.scored).sum() / (count * self.scales[0])
        heat = self.distil.temperature
        return heat**2 * (kl(wanted / heat, answer / heat) * prompt.scored).sum() / count

    def errors(self, prediction: Tensor, prompt: Prompt) -> dict[str, Tensor]:
        """Those of the task, [B, T]."""
        return self.task.errors(prediction[..., : self.output_size], prompt)


def task_of(teacher: Model, task: Task, distil: Distil, layers: Sequence[int], digest: str = "") -> Task:
    """The task with the teacher in it that a stage trains on. digest: of the teacher, see `fingerprint`.

    The teacher's vectors are measured on a few prompts, always the same.
    """
    device = next(teacher.parameters()).device
    prompt = task.sample(SCALE_PROMPTS, torch.Generator(device).manual_seed(0), device)
    inputs = _for(teacher, prompt.inputs)
    kind = MatrixTask if distil.matrix else LayerTask
    if distil.by_layer:
        made = kind.read(teacher, inputs, layers)[1]
    else:
        with torch.no_grad():
            read = watched(teacher, inputs, bool(distil.hidden))
        answer, hidden = read.tensor_split((task.output_size,), -1)
        made = [answer, *(hidden.chunk(teacher.spec.depth, -1) if distil.hidden else ())]
    scales = tuple(max(float(wide(each).square().mean()), 1e-12) for each in made)
    if distil.by_layer:
        return kind(task, digest, tuple(layers), scales, teacher)
    return TeacherTask(task, digest, tuple(layers), scales, teacher, distil)


def _for(model: Model, inputs: Tensor) -> Tensor:
    """Prompts' inputs [B, T] or [B, T, d] as the model reads them."""
    return inputs.to(next(model.parameters()).dtype) if inputs.is_floating_point() else inputs
