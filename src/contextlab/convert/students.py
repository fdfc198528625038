"""The student as a training sees it: whole, its hidden vectors told, or its new mixers alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from contextlab.models.stack import Model, Within


def mixer_of(model: Model, layer: int) -> nn.Module:
    """The mixer of a layer."""
    mixer = model.blocks[layer].mixer
    assert isinstance(mixer, nn.Module)
    return mixer


def matrices_of(mixer: nn.Module, x: Tensor) -> Tensor:
    """The mixing matrices of a whole text x [B, T, D], a row beside the other heads' rows: [B, T, H T]."""
    found: Tensor = mixer.mixing(x)  # type: ignore[operator]
    return found.transpose(1, 2).flatten(2)


def watched(model: Model, inputs: Tensor, hidden: bool) -> Tensor:
    """Predictions [B, T, output_size] and, where wanted, behind them the stream after each block, [B, T, depth D]."""
    if not hidden:
        return model(inputs)
    within = Within(hidden=[])
    answer = model(inputs, within=within)
    assert within.hidden is not None
    return torch.cat((answer, *within.hidden[1:]), -1)


def side_by_side(mixers: Sequence[nn.Module], x: Tensor, matrices: bool) -> Tensor:
    """What n mixers make of what each is given, x [B, T, n D]: [B, T, n D]; or their matrices, [B, T, n H T]."""
    parts = zip(mixers, x.chunk(len(mixers), -1), strict=True)
    made = [matrices_of(each, part) if matrices else each(part, keep_state=False)[0] for each, part in parts]
    return torch.cat(made, -1)


class Layers(nn.Module):
    """The new mixers of a student alone: what each is given, side by side, to what each gives, side by side.

    Their parameters are the student's own, by the student's names, so that a checkpoint tells which they are.

    matrices: what is given is the matrices by which they mix tokens, [B, T, n H T].
    """

    def __init__(self, model: Model, layers: Sequence[int], matrices: bool = False) -> None:
        super().__init__()
        self.matrices = matrices
        self.spec = model.spec
        self.blocks = nn.ModuleDict({str(i): nn.ModuleDict({"mixer": mixer_of(model, i)}) for i in layers})

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, n D] -> [B, T, n D]."""
        return side_by_side([block["mixer"] for block in self.blocks.values()], x, self.matrices)  # type: ignore[index]


class Watched(nn.Module):
    """A student that tells its hidden vectors; parameters and their names are the student's own."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.spec = model.spec
        for name, part in model.named_children():
            self.add_module(name, part)
        self._model = (model,)  # in a tuple, so that its parameters are not counted twice

    def forward(self, inputs: Tensor) -> Tensor:
        """inputs [B, T] or [B, T, d] -> predictions and hidden vectors, see `watched`."""
        return watched(self._model[0], inputs, True)
