"""What a student is trained to give: the weights of the terms of its loss."""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveFloat, model_validator

from contextlab.errors import InputError
from contextlab.spec import Spec


class Distil(Spec):
    """What a student is trained to give, as weights of the terms of its loss.

    attention: the outputs of the teacher's mixers on the teacher's own inputs of those layers, as a share of their mean
        square. It is a stage of its own: no other weight may stand beside it.
    matrix: the matrices by which the teacher's heads mix tokens, on the same inputs: the squared Frobenius norm of the
        difference, as a share of their own. A stage of its own, too; of mixers that tell theirs, with as many heads.
    hidden: the teacher's hidden vectors after every block, as a share of their mean square.
    logits: the teacher's predictions where the task scores: the KL divergence from teacher to student, times the square
        of the temperature (1503.02531); of real predictions the squared difference, as a share of their mean square.
    task: the task's own loss.
    temperature: by which both models' logits are divided.
    """

    attention: NonNegativeFloat = 0.0
    matrix: NonNegativeFloat = 0.0
    hidden: NonNegativeFloat = 0.0
    logits: NonNegativeFloat = 0.0
    task: NonNegativeFloat = 0.0
    temperature: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _possible(self) -> Distil:
        given = [name for name in Distil.model_fields if name != "temperature" and getattr(self, name)]
        if self.by_layer and len(given) > 1:
            raise InputError(
                f"{given[0]}: is learned on the teacher's own inputs, so {given[1]} cannot stand beside it; give them "
                "to two stages, one after the other"
            )
        if not given:
            raise InputError(
                "all weights are 0: give one of attention, matrix, hidden, logits and task, for example logits=1"
            )
        return self

    @property
    def by_layer(self) -> bool:
        """Whether layers learn each by itself, on the teacher's own inputs."""
        return bool(self.attention or self.matrix)
