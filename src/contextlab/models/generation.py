"""Write on from a prompt, one token at a time, with any model that reads tokens and hands on a state."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError


class Reader(Protocol):
    """What `generate` needs of a model."""

    def read(self, inputs: Tensor, state: Any = None, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        """Logits [B, T, V] of token ids [B, T], and the state after them."""


@torch.no_grad()
def generate(
    model: Reader,
    prompt: Tensor,
    tokens: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Continue token sequences from the state.

    prompt: [B, T] int64, T >= 1. tokens: how many to add. temperature: 0 takes the likeliest.
    generator: needed when temperature > 0. mask: [B, T] bool, False at padding, left or right of a row's tokens; each
        row goes on from its own last token.
    Returns [B, tokens] int64.
    """
    check_prompt(prompt)
    if temperature > 0 and generator is None:
        raise InputError("generate: temperature > 0 needs a torch.Generator, so that the draw can be repeated")
    logits, state = model.read(prompt, None, mask)
    last, written = last_logits(logits, mask), []
    for _ in range(tokens):
        if temperature > 0:
            chosen = torch.multinomial(F.softmax(last / temperature, -1), 1, generator=generator)
        else:
            chosen = last.argmax(-1, keepdim=True)
        written.append(chosen)
        if len(written) < tokens:
            logits, state = model.read(chosen, state)
            last = logits[:, -1]
    return torch.cat(written, 1) if written else prompt[:, :0]


def check_prompt(prompt: Tensor) -> None:
    """Raises InputError where a prompt is not [B, T] with a token."""
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise InputError(f"generate: expected a prompt [B, T] of at least one token, got {list(prompt.shape)}")


def last_logits(logits: Tensor, mask: Tensor | None) -> Tensor:
    """The logits [B, V] of each row's last token, of [B, T, V]."""
    if mask is None:
        return logits[:, -1]
    place = torch.arange(mask.shape[1], device=mask.device)
    at = torch.where(mask, place, -1).amax(1)
    if bool((at < 0).any()):
        raise InputError(f"generate: row {int((at < 0).nonzero()[0])} of the prompt is padding only; give it a token")
    answered = logits.shape[1] - mask.shape[1]  # some answer the last place only
    return logits[torch.arange(len(logits), device=logits.device), at + answered]
