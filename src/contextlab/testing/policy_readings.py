"""The small model on which the laws of policies are held, and how it reads: in pieces, token by token, padded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contextlab.models import build_model

SIZE = 20


def model(seed: int = 0, depth: int = 2, **options: Any) -> Any:
    """A small model of softmax attention, float64; options of its mixer, or `position`."""
    position = options.pop("position", "rope")
    layer = {"mixer": "attention", "options": {"kv_heads": 2, **options}}
    spec = {"width": 32, "position": position, "depth": depth, "heads": 4, "mlp_ratio": 1, "layers": [layer]}
    return build_model({**spec, "input_size": SIZE, "output_size": SIZE, "read_in": "token"}, seed=seed).double()


def tokens(batch: int = 2, length: int = 60, seed: int = 0) -> Tensor:
    """[batch, length] int64 for `model`."""
    return torch.randint(0, SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(reader: Any, x: Tensor, pieces: list[int], mask: Tensor | None = None) -> tuple[Tensor, Any, list[int]]:
    """Read x [B, T] in pieces of these lengths; what is left after them is read token by token.

    Returns logits [B, T, V], the last state and the bytes after each piece.
    """
    outputs, sizes, at = [], [], 0
    state: Any = None
    for size in [*pieces, *[1] * (x.shape[1] - sum(pieces))]:
        piece = slice(at, at + size)
        y, state = reader.read(x[:, piece], state, None if mask is None else mask[:, piece])
        outputs.append(y)
        sizes.append(state.nbytes)
        at += size
    return torch.cat(outputs, 1), state, sizes


def read_on(reader: Any, x: Tensor, state: Any, mask: Tensor | None = None) -> tuple[Tensor, Any]:
    """Read x [B, T] token by token from a state. Returns logits [B, T, V] and the last state."""
    outputs = []
    for t in range(x.shape[1]):
        y, state = reader.read(x[:, t : t + 1], state, None if mask is None else mask[:, t : t + 1])
        outputs.append(y)
    return torch.cat(outputs, 1), state


def masked(x: Tensor, pads: tuple[int, ...] | None) -> Tensor | None:
    """The mask [B, T] bool of so much left padding in each row of x [B, T]."""
    return None if pads is None else torch.arange(x.shape[1]) >= torch.tensor(pads)[:, None]
