"""A training whose objective is a teacher: what of the student is trained, on which prompts, whether it is possible.

The targets are those of `convert.teacher`. Here the whole student is what is trained and saved, so that checkpoints are
models, as those of every other training; `convert.transfer` keeps its mixers' apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from contextlab.convert.conversion import differing
from contextlab.convert.students import Watched, mixer_of, side_by_side
from contextlab.convert.teacher import Distil, task_of
from contextlab.convert.transfer import check_matrices
from contextlab.errors import InputError
from contextlab.models import Model, ModelSpec
from contextlab.models.digest import fingerprint
from contextlab.models.outline import without_memory
from contextlab.prompt import Task

SIZES = ("read_in", "input_size", "output_size")


class NewMixers(Watched):
    """A student of which the new mixers alone are run, side by side; parameters and names are the student's own.

    matrices: what is given is the matrices by which they mix tokens, [B, T, n H T].
    """

    def __init__(self, model: Model, layers: Sequence[int], matrices: bool = False) -> None:
        super().__init__(model)
        self.layers, self.matrices = tuple(layers), matrices

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [B, T, n D], what each of the n mixers is given -> what each gives, [B, T, n D]."""
        return side_by_side([mixer_of(self._model[0], i) for i in self.layers], inputs, self.matrices)


@contextmanager
def taught(
    student: Model, teacher: Model, tasks: Sequence[Task], distil: Distil
) -> Iterator[tuple[nn.Module, list[Task]]]:
    """What `training.train` is to be given so that a student learns from its teacher: a module, and tasks.

    student: trained in place. teacher: on the device that is trained on; it is left in evaluation mode.
    tasks: whose prompts both read. distil: what is learned; `attention` and `matrix` train the mixers in which the two
    differ, and nothing else is run.

    Within, only what is trained needs gradients. Raises InputError as `check_objective` does.
    """
    layers = check_objective(student.spec, teacher.spec, distil)
    teacher.eval()
    digest = fingerprint(teacher)
    wrapped = [task_of(teacher, task, distil, layers, digest) for task in tasks]
    if not distil.by_layer:
        yield (Watched(student) if distil.hidden else student), wrapped
        return
    new = {id(parameter) for i in layers for parameter in mixer_of(student, i).parameters()}
    rest = [each for each in student.parameters() if each.requires_grad and id(each) not in new]
    for parameter in rest:
        parameter.requires_grad_(False)
    try:
        yield NewMixers(student, layers, bool(distil.matrix)), wrapped
    finally:
        for parameter in rest:
            parameter.requires_grad_(True)


def check_objective(student: ModelSpec, teacher: ModelSpec, distil: Distil) -> list[int]:
    """The layers in which a student differs from its teacher, found from specs; [] where nothing asks for them.

    Raises InputError where the two cannot be compared as `distil` says.
    """
    for size in SIZES:
        own, theirs = getattr(student, size), getattr(teacher, size)
        if own != theirs:
            what = "another vocabulary" if size == "output_size" and student.read_in == "token" else "other sizes"
            raise InputError(f"the teacher is of {what}: its {size} is {theirs!r}, the model's {own!r}")
    if student.pool != teacher.pool:
        raise InputError("one of model and teacher predicts once a prompt (pool), the other at every token")
    if not (distil.by_layer or distil.hidden):
        return []
    what = "attention" if distil.attention else "matrix" if distil.matrix else "hidden"
    for key in ("width", "depth"):
        own, theirs = getattr(student, key), getattr(teacher, key)
        if own != theirs:
            raise InputError(f"{what}: the teacher's {key} is {theirs}, the model's {own}; expected one, or logits")
    for who, spec in (("model", student), ("teacher", teacher)):
        if spec.loops != 1 or any(layer.share is not None for layer in spec.pattern()):
            raise InputError(f"{what}: the {who} uses blocks several times (loops, share); take logits")
    if not distil.by_layer:
        return []
    layers = differing(teacher, student)
    if not layers:
        raise InputError(
            f"{what}: is learned by layers that were replaced, and all are the teacher's; give replace or convert, "
            "or take logits"
        )
    for i in layers:
        for who, spec in (("model", student), ("teacher", teacher)):
            layer = spec.pattern()[i]
            if layer.kv == "shared" or layer.with_input or spec.sources().count(i) > 1:
                raise InputError(
                    f"{what}: layer {i} of the {who} shares keys and values with another, or reads the model's "
                    "input, so that it cannot be run alone; take logits"
                )
            if layer.skip is not None:
                raise InputError(f"{what}: some tokens skip layer {i} of the {who}; take hidden or logits")
    outlines = [without_memory(each) for each in (teacher, student)]
    if distil.matrix and outlines[0] is not None and outlines[1] is not None:
        check_matrices(outlines[0], outlines[1], layers)
    return layers
