"""What an interactive map shows: of a few prompts, which token each head, layer and the whole model looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.evaluation.evaluate import _evaluating
from contextlab.inspect.influences import influence, layers_alone
from contextlab.inspect.maps import mixing, telling_layers
from contextlab.inspect.probe import Subject
from contextlab.models import Model
from contextlab.prompt import Prompt, Task

ROWS = 48
"""Tokens of a prompt that may be asked what they look at."""
WHOLE = "whole model"


class ViewedPrompt(NamedTuple):
    """One prompt as it is shown.

    words: a text a token. values: of tokens that are vectors their numbers, else "". wanted: place -> (what should be
    predicted there, what the model predicts), where predictions count. rows: the places that can be asked, rising.
    """

    words: list[str]
    values: list[str]
    wanted: dict[int, tuple[str, str]]
    rows: list[int]


class ViewedPart(NamedTuple):
    """A layer, or the whole model.

    heads: their names, or what the one map of it is. maps: of each prompt [H, rows, T], signed shares: each row sums to
    1 in absolute values.
    """

    name: str
    heads: list[str]
    maps: list[Tensor]


@dataclass(frozen=True)
class Viewed:
    """A model on a task, as it is shown. title: of both."""

    title: str
    prompts: list[ViewedPrompt]
    parts: list[ViewedPart]


@torch.no_grad()
def view(model: Model, task: Task, title: str, *, seed: int = 0, prompts: int = 3) -> Viewed:
    """What an interactive map of a model shows.

    The first part is the whole model, by gradient times input; then comes each layer, by the matrices of its heads
    where it tells them (`contextlab.inspect.mixing`), else by gradient times input of its mixer.
    model: of ours. task: whose prompts it reads. seed: of the prompts.
    Raises InputError where the model does not read them, or answers once for a whole text.
    """
    subject = Subject(model, task, seed, name=title)
    subject.require_fitting()
    if model.spec.pool is not None:
        raise InputError(f"{title}: no map of a model that answers once for a whole text")
    prompt = subject.prompts(prompts)
    with _evaluating(model):
        shown = _shown(prompt, model(prompt.inputs), task)
        telling = telling_layers(model)
        matrices = mixing(model, prompt.inputs) if telling else {}
        parts = [ViewedPart(WHOLE, ["influence"], _influences(model, prompt, shown, None))]
        for number in sorted({*layers_alone(model), *(int(name.split(".")[1]) for name in telling)}):
            matrix = matrices.get(f"blocks.{number}.mixer")
            if matrix is None:
                maps, heads = _influences(model, prompt, shown, number), ["influence"]
            else:
                maps = [_shares(matrix[row, :, each.rows]) for row, each in enumerate(shown)]
                heads = [f"head {head}" for head in range(matrix.shape[1])]
            parts.append(ViewedPart(f"layer {number}", heads, maps))
    return Viewed(title, shown, parts)


def pick(places: Sequence[int], counted: Sequence[int], most: int) -> list[int]:
    """At most so many of the places: the last of those whose prediction counts, then others evenly spaced."""
    if len(places) <= most:
        return list(places)
    first = [place for place in places if place in set(counted)][-most:]
    rest = [place for place in places if place not in set(counted)]
    room = most - len(first)
    return sorted(first + (rest[:: -(-len(rest) // room)] if room and rest else []))


def _influences(model: Model, prompt: Prompt, shown: Sequence[ViewedPrompt], layer: int | None) -> list[Tensor]:
    return [
        _shares(influence(model, prompt.inputs[row : row + 1], layer=layer, places=each.rows))
        for row, each in enumerate(shown)
    ]


def _shares(matrix: Tensor) -> Tensor:
    """Rows that sum to 1 in absolute values; float32 on the CPU."""
    return (matrix / matrix.abs().sum(-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)).float().cpu()


def _shown(prompt: Prompt, said: Tensor, task: Task) -> list[ViewedPrompt]:
    symbol = getattr(task, "symbol", str)
    found = []
    for row in range(prompt.batch):
        counted = prompt.scored[row].nonzero()[:, 0].tolist()
        inputs, tokens = prompt.inputs[row].tolist(), prompt.inputs.ndim == 2
        words = [symbol(each) for each in inputs] if tokens else [str(place) for place in range(prompt.length)]
        values = [""] * prompt.length if tokens else [_numbers(each) for each in inputs]
        wanted = {place: _answers(prompt.targets[row, place], said[row, place], task) for place in counted}
        found.append(ViewedPrompt(words, values, wanted, pick(range(prompt.length), counted, ROWS)))
    return found


def _answers(wanted: Tensor, said: Tensor, task: Task) -> tuple[str, str]:
    """What should be predicted, and what is, as a person reads it."""
    symbol = getattr(task, "symbol", str)
    if wanted.is_floating_point():
        return _numbers(wanted.flatten().tolist()), _numbers(said.flatten().tolist())
    if wanted.ndim:  # several answers at once
        return _numbers(wanted.flatten().tolist()), ""
    return symbol(int(wanted)), symbol(int(said.argmax(-1)))


def _numbers(values: Sequence[float], most: int = 8) -> str:
    told = ", ".join(f"{value:.2f}" for value in values[:most])
    return told if len(values) <= most else f"{told}, ... ({len(values)} numbers)"
