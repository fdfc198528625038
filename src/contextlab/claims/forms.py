"""The forms of an op that must agree: the recurrence that defines it, one by matrix products, and the chunked one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pandas as pd
import torch
from pydantic import PositiveInt
from torch import Tensor

from contextlab import ops
from contextlab.claims.costs import by_turns, taken
from contextlab.claims.measures import Measure, apart, measure, told
from contextlab.errors import InputError, unknown
from contextlab.experiments import ExperimentSpec, Run
from contextlab.ops.linear import lightning_decay, retention_decay
from contextlab.ops.merge import attention_with_lse, merge_attention
from contextlab.threads import torch_threads

Dtype = Literal["float64", "float32"]


class Inputs(NamedTuple):
    """What every op is asked of. q, k, v [B, T, H, D], keys of length 1; g [B, T, H] log decay; beta [B, T, H]."""

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor


def drawn(length: int, heads: int, dim: int, batch: int, seed: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Standard normal queries and values, keys on the sphere, log decays of softplus, strengths of sigmoid."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, length, heads, dim, generator=generator, dtype=dtype) for _ in range(3))
    g, beta = (torch.randn(batch, length, heads, generator=generator, dtype=dtype) for _ in range(2))
    k = torch.nn.functional.normalize(k, dim=-1)
    made = Inputs(q, k, v, -torch.nn.functional.softplus(g) / 8, beta.sigmoid())
    return Inputs(*(each.to(device) for each in made))


def masked_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float) -> Tensor:
    """Y = (L o Q K^T) V with L_ts = exp(g_{s+1} + ... + g_t) for s <= t, all pairs at once (2405.21060, eq. 16).

    q, k, v: [B, T, H, D]. g: [B, T, H] log decay.
    """
    sums = g.double().cumsum(1).transpose(1, 2)
    between = (sums[..., :, None] - sums[..., None, :]).tril().exp().tril().to(v)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale * between
    return torch.einsum("bhts,bshd->bthd", scores, v)


Form = Callable[[Inputs], Tensor]


def _decaying(decay: Callable[[Inputs], Tensor], fast: Form, scale: float | None = None) -> dict[str, Form]:
    """The three forms of a state that decays by a scalar of each head and token. decay: its logarithm [B, T, H]."""

    def recurrence(x: Inputs) -> Tensor:
        return ops.naive_simple_gla(x.q, x.k, x.v, decay(x), scale=scale)[0]

    def attention(x: Inputs) -> Tensor:
        return masked_attention(x.q, x.k, x.v, decay(x), x.q.shape[-1] ** -0.5 if scale is None else scale)

    return {"recurrence": recurrence, "attention": attention, "chunks": fast}


def _constant(gamma: Callable[[int], Tensor]) -> Callable[[Inputs], Tensor]:
    return lambda x: gamma(x.g.shape[-1]).to(x.g).expand_as(x.g)


def _ssd(x: Inputs) -> Tensor:
    """dt = -g and A = -1, so that dt A is the log decay; the input that SSD multiplies by dt is v / dt."""
    minus = -torch.ones(x.g.shape[-1], dtype=x.g.dtype, device=x.g.device)
    return ops.ssd(x.v / -x.g[..., None], -x.g, minus, x.k, x.q)[0]


def _channels(x: Inputs) -> Tensor:
    """Log decays of each channel of the key, [B, T, H, D]."""
    return x.g[..., None] * torch.linspace(0.5, 2.0, x.k.shape[-1], dtype=x.g.dtype, device=x.g.device)


def _parts(x: Inputs, count: int = 5) -> Tensor:
    """Softmax attention over so many parts of the keys apart, which are then merged; each query sees all keys."""
    k, v, scale = x.k.transpose(1, 2), x.v.transpose(1, 2), x.q.shape[-1] ** -0.5
    pairs = zip(k.chunk(count, 2), v.chunk(count, 2), strict=True)
    return merge_attention([attention_with_lse(x.q, a, b, scale=scale) for a, b in pairs])


def _whole(x: Inputs) -> Tensor:
    scores = torch.einsum("bthd,bshd->bhts", x.q, x.k) * x.q.shape[-1] ** -0.5
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), x.v)


FORMS: Mapping[str, Mapping[str, Form]] = {
    "ssd": _decaying(lambda x: x.g, _ssd, 1.0),
    "retention": _decaying(_constant(retention_decay), lambda x: ops.retention(x.q, x.k, x.v)[0]),
    "lightning_attention": _decaying(_constant(lightning_decay), lambda x: ops.lightning_attention(x.q, x.k, x.v)[0]),
    "linear_attention": _decaying(lambda x: 0 * x.g, lambda x: ops.linear_attention(x.q, x.k, x.v)[0]),
    "gla": {
        "recurrence": lambda x: ops.naive_gla(x.q, x.k, x.v, _channels(x))[0],
        "chunks": lambda x: ops.gla(x.q, x.k, x.v, _channels(x))[0],
    },
    "delta_rule": {
        "recurrence": lambda x: ops.naive_gated_delta_rule(x.q, x.k, x.v, None, x.beta)[0],
        "chunks": lambda x: ops.delta_rule(x.q, x.k, x.v, x.beta)[0],
    },
    "gated_delta_rule": {
        "recurrence": lambda x: ops.naive_gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)[0],
        "chunks": lambda x: ops.gated_delta_rule(x.q, x.k, x.v, x.g, x.beta)[0],
    },
    "attention_in_parts": {"whole": _whole, "parts": _parts},
}
"""Each op's forms; the first is the one that defines it."""


class OfForms(Measure):
    """Base: of the forms of an op."""

    op: str

    def names(self, spec: ExperimentSpec | None) -> Sequence[str]:
        if self.op not in FORMS:
            raise InputError(f"op: {unknown('op with several forms', self.op, FORMS)}")
        return list(FORMS[self.op])


@measure("form_agreement")
@dataclass(frozen=True)
class FormAgreement(OfForms):
    """The greatest difference of each form of an op from the form that defines it, over the greatest answer.

    op: with several forms.
    length: tokens. heads, dim: of queries, keys and values. batch: sequences a draw. draws: of inputs.
    dtype: of the inputs and of the computation.
    defined_by: the op whose defining form is compared with; default its own. Another one is a negative control.
    """

    kind = "draws"

    op: str
    length: PositiveInt = 192
    heads: PositiveInt = 2
    dim: PositiveInt = 16
    batch: PositiveInt = 2
    draws: PositiveInt = 10
    dtype: Dtype = "float64"
    defined_by: str | None = None

    def names(self, spec: ExperimentSpec | None) -> Sequence[str]:
        if self.defined_by is not None and self.defined_by not in FORMS:
            raise InputError(f"defined_by: {unknown('op with several forms', self.defined_by, FORMS)}")
        return super().names(spec)

    @torch.no_grad()
    def rows(self, run: Run | None, device: torch.device) -> pd.DataFrame:
        define = next(iter(FORMS[self.defined_by or self.op].values()))
        found = []
        for draw in range(self.draws):
            x = drawn(self.length, self.heads, self.dim, self.batch, draw, getattr(torch, self.dtype), device)
            wanted = define(x)
            for name, form in FORMS[self.op].items():
                away = apart(form(x), wanted)
                found.append({"model": name, "seed": draw, "metric": "difference", "value": away})
        return told(found)


@measure("form_time")
@dataclass(frozen=True)
class FormTime(OfForms):
    """Seconds a token of each form of an op at each length, all of them in each turn; which is first goes round.

    On CPU they are seconds of processor time, which what else runs there does not add to.

    op: with several forms.
    lengths: of the sequences.
    heads, dim: of queries, keys and values.
    turns: how often each is timed, at least six; one more before them is not counted.
    dtype: of the inputs. threads: of torch.
    """

    kind = "turns"

    op: str
    lengths: tuple[PositiveInt, ...]
    heads: PositiveInt = 2
    dim: PositiveInt = 32
    turns: PositiveInt = 15
    dtype: Dtype = "float32"
    threads: PositiveInt = 1

    @torch.no_grad()
    def rows(self, run: Run | None, device: torch.device) -> pd.DataFrame:
        inputs = {n: drawn(n, self.heads, self.dim, 1, 0, getattr(torch, self.dtype), device) for n in self.lengths}
        todo = [(name, length) for length in self.lengths for name in FORMS[self.op]]

        def seconds(name: str, length: int) -> float:
            return taken(lambda: FORMS[self.op][name](inputs[length]), device) / length

        with torch_threads(self.threads):
            timed = by_turns(todo, seconds, self.turns)
        return told(
            {"model": name, "seed": turn, "metric": "seconds", "length": length, "value": value}
            for turn, (name, length), value in timed
        )
