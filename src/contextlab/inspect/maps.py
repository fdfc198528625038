"""Which token looks at which, in mixers of any family: their unrolled matrices, and what heads do by them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.inspect.capturing import capture
from contextlab.inspect.edits import whole_numbers
from contextlab.inspect.layout import Plan, unnoticed
from contextlab.mixers import Mixer
from contextlab.spec import describe

SCORES = ("previous", "same", "duplicate", "induction", "first")


def mixing(model: nn.Module, inputs: Tensor, layers: Iterable[int] | None = None) -> dict[str, Tensor]:
    """The matrices by which each layer's heads mix the values of a text, exactly: o_t = sum_j M[t, j] v_j.

    Of softmax attention they are its weights; of linear attention, the delta rule and state-space layers what their
    recurrence comes to when it is unrolled (`Mixer.mixing`).

    model: of ours. inputs: [B, T] or [B, T, d]. layers: those that are wanted; default all that tell.
    Returns "blocks.N.mixer" -> [B, H, T, T], in the order of the layers.

    They are made anew of what each mixer reads: what is patched before a layer is in them, what is patched inside its
    mixer is not. A layer that some tokens skip tells none.

    Raises InputError where a layer that is asked for tells no matrices, or none does.
    """
    plan = Plan(model)
    telling = {
        layer.name: layer.mixer
        for layer in plan.layers
        if getattr(layer.mixer, "tells_mixing", False) and getattr(layer.block, "router", None) is None
    }
    wanted = list(telling) if layers is None else [f"blocks.{n}" for n in whole_numbers("layers", layers)]
    for name in wanted:
        if name not in telling:
            raise InputError(f"mixing: {name} tells no matrices; those that do are {', '.join(telling) or 'none'}")
    if not wanted:
        raise InputError("mixing: no layer of this model tells by which matrices it mixes tokens")
    found = {}
    with capture(model, [f"{name}.mixer.input" for name in wanted]) as taken:
        model(inputs)
    for name in wanted:
        mixer = telling[name]
        assert isinstance(mixer, Mixer)
        with unnoticed():
            found[f"{name}.mixer"] = mixer.mixing(taken[f"{name}.mixer.input"])
    return found


@torch.no_grad()
def head_scores(model: nn.Module, tokens: Tensor, layers: Iterable[int] | None = None) -> pd.DataFrame:
    """How much of each head's looking goes where, a row a head and score.

    A row of its matrix (see `mixing`), in absolute values, is what a token looks at, and is made to sum to 1, as that
    of softmax attention without sinks does. Scores are means over the tokens that have such a place to look at:

    - previous: the token before.
    - same: the token itself.
    - duplicate: earlier tokens that are the same symbol.
    - induction: the tokens that followed those, which say what comes next (2209.11895).
    - first: the first token, where a head that looks at nothing rests; of tokens from the second on.

    model: of ours, that reads tokens. tokens: [B, T] int64, in which symbols come again. layers: see `mixing`.
    Returns columns layer, head, score, value.
    """
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
        told = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else describe(tokens)
        raise InputError(f"head_scores: expected token ids [B, T] int64, got {told}")
    places = _places(tokens)
    rows: list[dict[str, Any]] = []
    for name, matrix in mixing(model, tokens, layers).items():
        share = matrix.abs().double()
        share = share / share.sum(-1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
        for score, where in places.items():
            looked = (share * where[:, None]).sum(-1)
            counts = where.any(-1)[:, None]
            value = (looked * counts).sum((0, 2)) / counts.sum((0, 2)).clamp_min(1)
            layer = int(name.split(".")[1])
            rows += [
                {"layer": layer, "head": head, "score": score, "value": each}
                for head, each in enumerate(value.tolist())
            ]
    return pd.DataFrame(rows, columns=["layer", "head", "score", "value"])


def _places(tokens: Tensor) -> dict[str, Tensor]:
    """Score -> where each token would look, [B, T, T] bool."""
    length = tokens.shape[1]
    at = torch.arange(length, device=tokens.device)
    back = (at[:, None] - at).expand(len(tokens), -1, -1)
    alike = (tokens[:, :, None] == tokens[:, None, :]) & (back > 0)
    after = torch.zeros_like(alike)
    after[:, :, 1:] = alike[:, :, :-1]
    first = ((at[None, :] == 0) & (at[:, None] > 0)).expand_as(alike)
    return {
        "previous": back == 1,
        "same": back == 0,
        "duplicate": alike,
        "induction": after & (back >= 0),
        "first": first,
    }
