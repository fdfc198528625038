"""How much each token moves what is said at each other, in any model and mixer: gradient times input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.inspect.capturing import capture, patch
from contextlab.inspect.edits import whole_numbers
from contextlab.inspect.layout import Layer, Plan, unnoticed
from contextlab.inspect.taps import frozen
from contextlab.models import Model

Said = Callable[[Tensor], Tensor]
"""What is said at one place of each text, [N, k] -> how much of it there is, [N]."""
Read = Callable[[Tensor, Tensor], Tensor]
"""(vectors [N, T, D], the texts that they stand in [N]) -> what is said, [N, T, k]."""
AT_ONCE = 2**12
"""Tokens that are read in one batch, about."""


def influence(
    model: nn.Module,
    inputs: Tensor,
    *,
    layer: int | None = None,
    places: Sequence[int] | None = None,
    said: Said | None = None,
) -> Tensor:
    """How much the vector of token j moves what is said at place t, J[t, j]: its gradient times itself, [B, Q, T].

    It needs no matrices, so that recurrent, gated and hybrid models are told of as attention is. Where what is said is
    linear in the tokens, J is what each of them adds to it, exactly; elsewhere it is the slope there. Along a row, it
    sums to p times what is said where that is of degree p in all tokens (Euler).

    model: of ours. inputs: [B, T] or [B, T, d].
    layer: of its mixer alone, by what it reads; None of the whole model, by the tokens' vectors (site "embedded").
    places: Q of the text, those of which is asked what is said there; None all.
    said: what is said at a place, [N, k] -> [N]. None: of logits the largest one less their mean; of vectors and of
        layers their length along themselves.

    Every place of every text is a row of a batch, with one gradient for all; the model is left as it was.
    Raises InputError where it answers once for a whole text, or the layer's mixer does not read the stream alone.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("influence: there are no gradients within torch.inference_mode; call it outside")
    if not isinstance(model, Model):
        raise InputError(f"influence: expected a model of ours, got {type(model).__name__}")
    if model.spec.pool is not None:
        raise InputError("influence: the model answers once for a whole text, not at each place")
    x, read = _whole(model, inputs) if layer is None else _alone(_layer(model, layer), model, inputs)
    count = x.shape[1]
    wanted = list(range(count)) if places is None else whole_numbers("places", places)
    if not wanted or any(not 0 <= place < count for place in wanted):
        raise InputError(f"places: expected one or more from 0 to {count - 1}, got {wanted}")
    if said is None:
        said = top if layer is None and model.spec.read_in == "token" else own_length
    with frozen(model):
        return _slopes(x, read, torch.tensor(wanted, device=x.device), said)


def _slopes(x: Tensor, read: Read, places: Tensor, said: Said) -> Tensor:
    """Gradient times input at each of the places, [B, Q, T]."""
    texts, at = (
        each.flatten() for each in torch.meshgrid(torch.arange(len(x), device=x.device), places, indexing="ij")
    )
    step = max(1, AT_ONCE // x.shape[1])
    found = []
    for some, where in zip(texts.split(step), at.split(step), strict=True):
        with torch.enable_grad():
            rows = x[some].detach().requires_grad_()
            answers = read(rows, some)[torch.arange(len(some), device=x.device), where]
            total = said(answers).sum()
        (slope,) = torch.autograd.grad(total, [rows])
        found.append((slope * rows.detach()).sum(-1))
    return torch.cat(found).view(len(x), len(places), -1)


def top(logits: Tensor) -> Tensor:
    """The largest logit less the mean of all, [N]. logits: [N, k]."""
    return logits.amax(-1) - logits.mean(-1)


def own_length(answers: Tensor) -> Tensor:
    """How long answers are, along what they are, [N]: of degree 1 in them. answers: [N, k]."""
    along = answers.detach()
    return (answers * along).sum(-1) / along.norm(dim=-1).clamp_min(torch.finfo(answers.dtype).tiny)


@torch.no_grad()
def _whole(model: Model, inputs: Tensor) -> tuple[Tensor, Read]:
    """The tokens' vectors, and the model that reads them."""
    with capture(model, "embedded") as taken:
        model(inputs)

    def read(rows: Tensor, texts: Tensor) -> Tensor:
        with patch(model, {"embedded": lambda _: rows}):
            return model(inputs[texts])

    return taken["embedded"], read


@torch.no_grad()
def _alone(layer: Layer, model: Model, inputs: Tensor) -> tuple[Tensor, Read]:
    """What a layer's mixer reads, and the mixer."""
    with capture(model, f"{layer.name}.mixer.input") as taken:
        model(inputs)
    mixer: Any = layer.mixer

    def read(rows: Tensor, texts: Tensor) -> Tensor:
        with unnoticed():
            answers: Tensor = mixer(rows, None, None, False, inputs[texts] if mixer.reads_tokens else None)[0]
        return answers

    return taken[f"{layer.name}.mixer.input"], read


def layers_alone(model: Model) -> dict[int, Layer]:
    """The layers whose mixers read the stream, and all of it."""
    return {
        number: layer
        for number, layer in enumerate(Plan(model).layers)
        if layer.mixer is not None
        and hasattr(layer.mixer, "reads_tokens")
        and getattr(layer.block, "router", None) is None
        and not getattr(layer.block, "reads_shared", False)
    }


def _layer(model: Model, number: int) -> Layer:
    known = layers_alone(model)
    if number not in known:
        told = ", ".join(map(str, known)) or "none"
        raise InputError(f"influence: layer {number} has no mixer that reads the whole stream; those that do: {told}")
    return known[number]
