"""The old recurrent baselines, over PyTorch's fused kernels."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

from contextlab.mixers.base import Mixer
from contextlab.mixers.layers import Linear, multiplications
from contextlab.registry import register
from contextlab.state import RecurrentState, State, own, tensor_bytes


class _Recurrent(Mixer):
    """What the two cells share: state, padding, projection out."""

    parallel_form = "loop"
    trains_alone = "PyTorch's LSTM and GRU take one set of weights"

    cell: ClassVar[type[nn.LSTM] | type[nn.GRU]]
    parts: ClassVar[tuple[str, ...]]

    def __init__(self, width: PositiveInt, hidden: PositiveInt | None = None) -> None:
        super().__init__(width)
        self.hidden = width if hidden is None else hidden
        self.rnn = self.cell(width, self.hidden, batch_first=True)
        self.out_proj = Linear(self.hidden, width)
        from_x, from_h, bias_x, bias_h = self.rnn.all_weights[0]
        nn.init.normal_(from_x, std=width**-0.5)
        nn.init.orthogonal_(from_h)
        nn.init.zeros_(bias_x)
        nn.init.zeros_(bias_h)

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. x: [B, T, width]."""
        batch, length, _ = x.shape
        if state is None:
            before = {part: x.new_zeros(batch, self.hidden) for part in self.parts}
        else:
            assert isinstance(state, RecurrentState)
            before = state.memory
        initial = tuple(before[part][None] for part in self.parts)
        if mask is None:
            y, last = self._run(x, initial)
        else:
            y, last = self._padded(x, initial, mask)
        y = self.out_proj(y)
        if not keep_state:
            return y, None
        last = last if isinstance(last, tuple) else (last,)
        memory = {part: own(tensor[0]) for part, tensor in zip(self.parts, last, strict=True)}
        return y, RecurrentState(memory, length=length + (0 if state is None else state.length))

    def _run(self, x: Any, initial: tuple[Tensor, ...]) -> tuple[Any, Any]:
        """PyTorch's cell on x, [B, T, width] or packed; under autocast on a CPU in float32.

        oneDNN, which is asked there, has none in float16, and in bfloat16 on some CPUs only.
        """
        given = initial if len(initial) > 1 else initial[0]
        weight = self.rnn.all_weights[0][0]
        if weight.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return self.rnn(x, given)
        with torch.autocast("cpu", enabled=False):
            return self.rnn(x.to(weight.dtype), pytree.tree_map(lambda y: y.to(weight.dtype), given))

    def _padded(self, x: Tensor, initial: tuple[Tensor, ...], mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Run the rows from their first real token on; a row without one keeps its state."""
        batch, length, _ = x.shape
        real = mask.sum(1)
        # PyTorch packs sequences padded on the right: roll each row's real tokens to the left, and back.
        place = torch.arange(length, device=x.device)
        left = (place + (length - real)[:, None]) % length
        rolled = x.gather(1, left[..., None].expand(x.shape))
        packed = pack_padded_sequence(rolled, real.clamp_min(1).cpu(), batch_first=True, enforce_sorted=False)
        packed_y, last = self._run(packed, initial)
        y, _ = pad_packed_sequence(packed_y, batch_first=True, total_length=length)
        back = (place - (length - real)[:, None]) % length
        y = y.gather(1, back[..., None].expand(batch, length, self.hidden))
        some = (real > 0)[:, None]
        last = last if isinstance(last, tuple) else (last,)
        return y, tuple(torch.where(some, new, old) for new, old in zip(last, initial, strict=True))

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length."""
        return tensor_bytes(len(self.parts), batch, self.hidden, dtype=dtype)

    def flops(self, length: int) -> int:
        """See `Mixer.flops`."""
        recurrent = sum(matrix.numel() for matrix in self.rnn.all_weights[0][:2])
        return 2 * length * (recurrent + multiplications(self.out_proj))


@register("mixer", "lstm", family="recurrent", papers=("1409.2329",), cases=({}, {"hidden": 5}))
class Lstm(_Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber 1997), one layer, projected back to the width.

    The forget gate's bias starts at 1 (Jozefowicz et al. 2015), so that the memory lasts from the start.

    width: size of a token's vector.
    hidden: size of the cell; default width.
    """

    cell = nn.LSTM
    parts = ("h", "c")

    def __init__(self, width: PositiveInt, hidden: PositiveInt | None = None) -> None:
        super().__init__(width, hidden)
        with torch.no_grad():
            self.rnn.all_weights[0][2][self.hidden : 2 * self.hidden] = 1.0  # gates: input, forget, cell, output


@register("mixer", "gru", family="recurrent", papers=("1406.1078",), cases=({}, {"hidden": 5}))
class Gru(_Recurrent):
    """Gated recurrent unit (Cho et al. 2014), one layer, projected back to the width.

    width: size of a token's vector.
    hidden: size of the cell; default width.
    """

    cell = nn.GRU
    parts = ("h",)
