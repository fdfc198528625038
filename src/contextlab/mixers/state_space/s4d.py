"""S4D: a linear time-invariant state-space model with a diagonal complex state."""

from __future__ import annotations

import math

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers.base import Mixer
from contextlab.mixers.convolution import without_padding
from contextlab.mixers.layers import Linear, multiplications
from contextlab.mixers.matrix import recurrent
from contextlab.ops.linear import working_dtype
from contextlab.ops.scan import linear_scan
from contextlab.registry import register
from contextlab.state import RecurrentState, State, own, tensor_bytes

CHUNK = 64


@register(
    "mixer",
    "s4d",
    family="state space",
    papers=("2206.11893",),
    cases=({"state_size": 6}, {"state_size": 2, "expand": 2}),
)
class S4D(Mixer):
    """S4D: each channel is convolved with a sum of decaying waves, kept as a diagonal complex state; GLU output.

    h_t = exp(dt A) h_{t-1} + (exp(dt A) - 1) / A x_t, y_t = 2 Re(C . h_t) + D x_t: zero-order hold, B = 1, one of each
    conjugate pair (sections 3 and 4); A starts at -1/2 + i pi n (S4D-Lin). What a token writes and how the state
    decays do not depend on the token, so it cannot select what it remembers.

    width: size of a token's vector.
    state_size: N, real dimensions of a channel's state: N / 2 complex values. Even.
    expand: channels over width.
    """

    parallel_form = "chunks"

    def __init__(self, width: PositiveInt, state_size: PositiveInt = 64, expand: PositiveInt = 1) -> None:
        super().__init__(width)
        if state_size % 2:
            raise InputError(f"state_size must be even, got {state_size}; {state_size + 1} is nearest")
        self.inner, self.pairs = expand * width, state_size // 2
        self.in_proj, self.out_proj = Linear(width, self.inner), Linear(self.inner, 2 * width)
        self.log_dt = nn.Parameter(torch.empty(self.inner, 1).uniform_(math.log(1e-3), math.log(0.1)))
        self.A_log = nn.Parameter(torch.full((self.inner, self.pairs), math.log(0.5)))
        self.A_imaginary = nn.Parameter(math.pi * torch.arange(self.pairs).float().repeat(self.inner, 1))
        self.C = nn.Parameter(torch.randn(self.inner, self.pairs, 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.ones(self.inner))

    def forward(
        self, x: Tensor, state: State | None = None, mask: Tensor | None = None, keep_state: bool = True
    ) -> tuple[Tensor, State | None]:
        """See `Mixer.forward`. Padding writes zero, so that the state stays as it started."""
        before, dtype = recurrent(state), x.dtype
        length, work = x.shape[1], working_dtype(x.dtype)
        u = self.in_proj(without_padding(x, mask)).to(work)
        A = torch.complex(-self.A_log.to(work).exp(), self.A_imaginary.to(work))
        log_decay = A * self.log_dt.to(work).exp()  # [E, N / 2], of one token
        write = torch.expm1(log_decay) / A
        C = 2 * torch.view_as_complex(self.C.to(work).contiguous())
        h0 = (
            write.new_zeros(x.shape[0], self.inner, self.pairs)
            if before is None
            else torch.view_as_complex(before["h"])
        )
        y, h = _lti(u, log_decay, write, C, h0)
        y = F.gelu((y + self.D * u).to(dtype))
        y = F.glu(self.out_proj(y), -1)
        if not keep_state:
            return y, None
        kept = {"h": own(torch.view_as_real(h.contiguous()))}
        return y, RecurrentState(kept, length=length + (0 if before is None else before.length))

    def state_nbytes(self, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> int:
        """See `Mixer.state_nbytes`: the same at every length, in float32 at least."""
        return tensor_bytes(batch, self.inner, self.pairs, 2, dtype=working_dtype(dtype))

    def flops(self, length: int) -> int:
        """See `Mixer.flops`; complex products count as four real ones."""
        projections = multiplications(self.in_proj) + multiplications(self.out_proj)
        size = min(CHUNK, max(1, length))
        return 2 * length * (projections + self.inner * (size + 4 * 2 * self.pairs))


def _lti(u: Tensor, log_decay: Tensor, write: Tensor, C: Tensor, h0: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, T, E] = Re(C . h_t), h_t = exp(log_decay) h_{t-1} + write u_t, and the last h [B, E, M].

    u: [B, T, E] real. log_decay, write, C: [E, M] complex. h0: [B, E, M] complex. By chunks: the convolution with the
    kernel's first values inside a chunk, the states from chunk to chunk.
    """
    batch, length, _ = u.shape
    if length == 0:
        return u, h0
    size = min(CHUNK, length)
    count, extra = -(-length // size), -length % size
    chunks = F.pad(u, (0, 0, 0, extra)).unflatten(1, (count, size))  # [B, N, L, E]
    steps = torch.arange(size + 1, device=u.device, dtype=u.dtype)
    powers = (log_decay.unsqueeze(-1) * steps).exp()  # [E, M, L + 1]
    kernel = torch.einsum("em,eml->el", C * write, powers[..., :-1]).real  # [E, L]
    lag = torch.arange(size, device=u.device)
    toeplitz = kernel[:, (lag[:, None] - lag).clamp(min=0)].tril()  # [E, L, L], row t, column j: the kernel at t - j
    y = torch.einsum("etj,bnje->bnte", toeplitz, chunks)
    # What each chunk adds to the state at its end; the last one's padding must not decay it.
    enter = torch.einsum("bnle,eml->bnem", chunks.to(powers.dtype), powers[..., :-1].flip(-1)) * write
    whole = (log_decay * size).expand(batch, count, -1, -1)
    states, _ = linear_scan(enter, whole, h0)
    before = torch.cat((h0.unsqueeze(1), states[:, :-1]), 1)  # [B, N, E, M]
    y = y + torch.einsum("bnem,eml->bnle", before * C, powers[..., 1:]).real
    rest = size - extra  # tokens of the last chunk
    last = chunks[:, -1, :rest].to(powers.dtype)
    entered = torch.einsum("ble,eml->bem", last, powers[..., :rest].flip(-1)) * write
    h = powers[..., rest] * before[:, -1] + entered
    return y.flatten(1, 2)[:, :length], h
