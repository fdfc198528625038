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
from contextlab.inspect.looks import looks, places_of, shares
from contextlab.mixers import Mixer
from contextlab.spec import describe

SCORES = ("previous", "same", "duplicate", "induction", "bigram", "first")
VALUES = ("value", "ci_low", "ci_high")
NONE = "no layer of this model tells by which matrices it mixes tokens"


def telling_layers(model: nn.Module) -> dict[str, Mixer]:
    """The layers that tell their matrices, "blocks.N" -> its mixer."""
    return {
        layer.name: layer.mixer
        for layer in Plan(model).layers
        if isinstance(layer.mixer, Mixer) and layer.mixer.tells_mixing and getattr(layer.block, "router", None) is None
    }


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
    telling = telling_layers(model)
    wanted = list(telling) if layers is None else [f"blocks.{n}" for n in whole_numbers("layers", layers)]
    for name in wanted:
        if name not in telling:
            raise InputError(f"mixing: {name} tells no matrices; those that do are {', '.join(telling) or 'none'}")
    if not wanted:
        raise InputError(f"mixing: {NONE}")
    found = {}
    with capture(model, [f"{name}.mixer.input" for name in wanted]) as taken:
        model(inputs)
    for name in wanted:
        with unnoticed():
            found[f"{name}.mixer"] = telling[name].mixing(taken[f"{name}.mixer.input"])
    return found


@torch.no_grad()
def head_scores(model: nn.Module, inputs: Tensor, layers: Iterable[int] | None = None) -> pd.DataFrame:
    """How much of each head's looking goes where, a row a head and score.

    A row of its matrix (see `mixing`), in absolute values, is what a token looks at, and is made to sum to 1, as that
    of softmax attention without sinks does. Scores are means over the tokens that have such a place to look at:

    - previous: the token before.
    - same: the token itself.
    - duplicate: earlier tokens that are the same symbol.
    - induction: the tokens that followed those, which say what comes next (2209.11895).
    - bigram: of these the ones that followed the same last two symbols (2401.12973), over tokens for which there are
      others, too: a head that minds one symbol alone looks at all of them.
    - first: the first token, where a head that looks at nothing rests; of tokens from the second on.

    model: of ours. inputs: tokens [B, T] int64, in which symbols come again; or vectors [B, T, d], for which there are
    `previous`, `same` and `first`. A score for which no token has a place is left out. layers: see `mixing`.
    Returns columns layer, head, score, value, and ci_low and ci_high, of a 95% interval over the rows of the batch.
    """
    if not isinstance(inputs, Tensor) or not inputs.numel() or inputs.ndim != (3 if inputs.is_floating_point() else 2):
        told = f"{inputs.dtype} {list(inputs.shape)}" if isinstance(inputs, Tensor) else describe(inputs)
        raise InputError(f"head_scores: expected token ids [B, T] int64 or vectors [B, T, d], got {told}")
    places = places_of(inputs)
    rows: list[dict[str, Any]] = []
    for name, matrix in mixing(model, inputs, layers).items():
        for score, found in looks(shares(matrix), places).items():
            rows += [
                {"layer": int(name.split(".")[1]), "head": head, "score": score, **dict(zip(VALUES, each, strict=True))}
                for head, each in enumerate(zip(*found, strict=True))
            ]
    return pd.DataFrame(rows, columns=["layer", "head", "score", *VALUES])
