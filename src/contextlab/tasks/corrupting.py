"""Parts of `Task.corrupt` that tasks of tokens share: symbols that are exchanged, keys that are bound anew."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.prompt import Prompt, last_scored


def chosen_of(fits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One of those that fit, evenly: its number [B, 1] int64, and whether there is one [B, 1] bool. fits: [B, n]."""
    score = torch.rand(fits.shape, generator=generator, device=fits.device).masked_fill(~fits, -1)
    return score.argmax(1, keepdim=True), fits.any(1, keepdim=True)


def exchanged(tokens: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Two symbols in each other's places. tokens: [B, T]; one, other: [B, 1], the symbols of each row."""
    return torch.where(tokens == one, other, torch.where(tokens == other, one, tokens))


def exchange_answers(prompt: Prompt, generator: torch.Generator, low: int, high: int) -> tuple[Prompt, Tensor, Tensor]:
    """The answer and another symbol in each other's places, throughout: for tasks to which such symbols are all alike.

    low, high: ids of these symbols, low .. high - 1. The answer is the last one that is such a symbol and another than
    the token that asks for it, which stays as it is.

    Returns the prompt, `hidden` as it was, and the two symbols [B, 1], which are the same in a row that has no such
    answer. Raises InputError where there are fewer than three symbols.
    """
    if high - low < 3:
        raise InputError(f"corrupt: to exchange an answer takes 3 symbols or more, and there are {high - low}")
    fits = (prompt.targets >= low) & (prompt.targets < high) & (prompt.targets != prompt.inputs)
    place = last_scored(prompt, fits)[:, None]
    at = place.clamp_min(0)
    answer, asks = prompt.targets.gather(1, at), prompt.inputs.gather(1, at)
    symbols = torch.arange(low, high, device=at.device)
    other = low + chosen_of((symbols != answer) & (symbols != asks), generator)[0]
    other = torch.where(place < 0, answer, other)
    made = dataclasses.replace(
        prompt,
        inputs=exchanged(prompt.inputs, answer, other),
        targets=exchanged(prompt.targets, answer, other),
    )
    return made, answer, other


def bound_anew(prompt: Prompt, generator: torch.Generator, keys: Tensor, context: int, back: int = 0) -> Tensor:
    """Inputs in whose context the key that is asked for last and another one stand in each other's places.

    keys: [B, n], the keys that stand in the context, the first `context` tokens. back: tokens from the key to the place
    that asks for it. A row without another key stays as it is.
    """
    asked = prompt.inputs.gather(1, last_scored(prompt)[:, None] - back)
    number, there = chosen_of(keys != asked, generator)
    other = torch.where(there, keys.gather(1, number), asked)
    inputs = prompt.inputs.clone()
    inputs[:, :context] = exchanged(inputs[:, :context], asked, other)
    return inputs
