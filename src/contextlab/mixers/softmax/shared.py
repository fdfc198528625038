"""Attention that reads the keys and values of another layer (cross-layer sharing)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.mixers.layers import Linear
from contextlab.mixers.softmax.attention import Attention
from contextlab.mixers.softmax.base import Tokens, row_start
from contextlab.ops.kv import KVLayer
from contextlab.ops.position import rotate
from contextlab.state import KVState, State


class SharedKeys(Attention):
    """Queries of its own on the keys and values of a layer below (CLA, 2405.12981; YOCO's cross-decoder, 2405.05254).

    It is no registered mixer, for it cannot stand alone: the model hands it, as the state, the one that the other
    layer left after the same tokens. Options are those of `Attention`; keys must be of the same shape and rotation.
    """

    tells_mixing = False  # what it reads is not in its input alone
    reads_other_keys = True  # which tells policies that they cannot serve the model

    def __init__(self, width: int, heads: int = 4, **options: Any) -> None:
        super().__init__(width, heads=heads, **options)
        self.k_norm = None
        self.qkv_proj = Linear(width, heads * self.head_dim, bias=self.qkv_proj.bias is not None)

    def kv_layer(self) -> KVLayer | None:
        """It keeps no keys and values of its own."""
        return None

    def _check(self, x: Tensor, state: State | None, mask: Tensor | None) -> None:
        if not isinstance(state, KVState):
            raise InputError("shared keys: expected the state of the attention layer that makes the keys")

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """x: [B, T, width]. state: of the layer that made the keys, the T tokens of x read. Returns (y, None)."""
        assert isinstance(state, KVState)
        batch, length, _ = x.shape
        q = self.qkv_proj(x).view(batch, length, self.heads, self.head_dim)
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.rotary:
            q = rotate(q, self._rotations(x, state.length - length, row_start(state)))
        q = self.site("q", q)
        k, v = state.cached()
        at = state.positions()
        y = self._score(Tokens(x, q, k, v, mask), k, v, None if at is None else at[:, state.length - length :], at)
        return self._project_out(x, self.site("heads", y).reshape(batch, length, -1)), None

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """0: the other layer holds the keys and values."""
        return 0
