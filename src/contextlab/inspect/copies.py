"""Whether a head copies: raises the logit of the token that it looks at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.inspect.layout import Layer, Plan, unnoticed
from contextlab.mixers import Mixer

TOLERANCE = 1e-3
"""Of what is linear: how far, relative to the values, sums may be off. Rounding of float32 is far below it."""


class _Known(Exception):
    """The values that a mixer writes, [N, T, H, V]."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values


@torch.no_grad()
def copying_scores(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The copying score of each head, and of layers for which there is none why.

    What a head that looks at token i adds to the logits, straight from the embedding of i to the read-out, is a matrix
    over the vocabulary, W_U W_O W_V W_E. The score is the sum of its eigenvalues over the sum of their sizes: 1 where
    each token raises its own logit, -1 where it lowers it, near 0 where neither (2209.11895; transformer-circuits.pub's
    Mathematical Framework). The norm before the mixer is applied to the embeddings, that before the read-out by its
    weights alone; what a logit gets in common with all others is taken out.

    It is defined where values are linear in the token and logits in the heads' answers, whatever mixes the tokens: not
    behind a non-linear convolution, a norm of the heads or a gate. That is measured, not declared.

    model: of ours. Returns "blocks.N.mixer" -> [H] float64, and "blocks.N.mixer" -> a reason.
    """
    found, reasons = {}, {}
    for layer in Plan(model).layers:
        name = f"{layer.name}.mixer"
        circuit = _circuit(model, layer)
        if isinstance(circuit, str):
            reasons[name] = circuit
        else:
            found[name] = _positive(*circuit)
    return found, reasons


def _positive(values: Tensor, logits: Tensor) -> Tensor:
    """Sum of eigenvalues over sum of their sizes, [H]. values: [tokens, H, V]. logits: [H, V, tokens]."""
    # The product over the vocabulary has the eigenvalues of that over a head's V dimensions, and zeros.
    inner = torch.einsum("hvt,thw->hvw", logits.double(), values.double())
    eigenvalues = torch.linalg.eigvals(inner)
    size = eigenvalues.abs().sum(-1)
    least = 1e-9 * values.double().norm() * logits.double().flatten(1).norm(dim=1)
    return torch.where(size > least, eigenvalues.real.sum(-1) / size.clamp_min(1e-300), 0.0)


def _circuit(model: Any, layer: Layer) -> tuple[Tensor, Tensor] | str:
    """Each token's values [tokens, H, V], and what a head's dimensions add to the logits; or why there is none."""
    spec, mixer = getattr(model, "spec", None), layer.mixer
    block: Any = layer.block
    if spec is None or spec.read_in != "token" or spec.pool is not None or spec.input_size != spec.output_size:
        return "logits are not of the tokens that are read"
    if not isinstance(mixer, Mixer) or getattr(block, "reads_shared", False) or mixer.reads_tokens:
        return "values are not made of the stream alone"
    weight = getattr(model.read_out_norm, "weight", None)
    if not isinstance(model.read_out_norm, nn.Identity | nn.RMSNorm | nn.LayerNorm):
        return "the norm before the read-out is of another kind"
    ids = torch.arange(spec.input_size, device=next(model.parameters()).device)
    x = block.mixer_norm(model.read_in(ids))[:, None]  # [tokens, 1, D]
    v = _values(mixer, x)
    if v is None:
        return "the mixer names no values"
    if not _linear_values(mixer, x, v):
        return "values are not linear in the token"
    none = _values(mixer, torch.zeros_like(x[:1]))
    assert none is not None
    shape = _heads(mixer, x[:1])
    if shape is None or shape[0] % v.shape[2] or shape[1] != v.shape[3]:
        return "the mixer names no heads that answer with values"
    heads, size = shape
    units = torch.eye(heads * size, dtype=x.dtype, device=x.device).view(-1, 1, heads, size)
    moved = _answers(mixer, x[:1], units)
    again = _answers(mixer, x[-1:], units)
    twice = _answers(mixer, x[:1], 2 * units)
    if not (_alike(moved, again) and _alike(2 * moved, twice)):
        return "answers are not linear in the heads"
    stream = moved[:, 0]  # [H V, D]
    if isinstance(model.read_out_norm, nn.LayerNorm):
        stream = stream - stream.mean(-1, keepdim=True)
    logits = model.read_out(stream if weight is None else stream * weight)
    logits = logits - model.read_out(torch.zeros_like(stream))
    logits = logits - logits.mean(-1, keepdim=True)
    values = (v - none)[:, 0].repeat_interleave(heads // v.shape[2], 1)
    return values, logits.view(heads, size, -1)


def _values(mixer: Mixer, x: Tensor) -> Tensor | None:
    """What is written of texts x [N, T, D], [N, T, H, V]."""

    def take(name: str, value: Tensor) -> Tensor:
        if name == "v":
            raise _Known(value)
        return value

    return _stopped(mixer, x, take)


def _heads(mixer: Mixer, x: Tensor) -> tuple[int, int] | None:
    """How many heads answer, and of which size."""

    def take(name: str, value: Tensor) -> Tensor:
        if name == "heads":
            raise _Known(value)
        return value

    found = _stopped(mixer, x, take)
    return None if found is None or found.ndim != 4 else (found.shape[2], found.shape[3])


def _stopped(mixer: Mixer, x: Tensor, take: Any) -> Tensor | None:
    before, mixer.tap = mixer.tap, take
    try:
        with unnoticed():
            mixer(x, None, None, False)
    except _Known as known:
        return known.values
    finally:
        mixer.tap = before
    return None


def _linear_values(mixer: Mixer, x: Tensor, v: Tensor) -> bool:
    """Whether values are linear in the token, but for a constant, and of it alone."""
    other = x.roll(1, 0)
    both, none, pair = (_values(mixer, each) for each in (x + other, torch.zeros_like(x), torch.cat((other, x), 1)))
    assert both is not None
    assert none is not None
    assert pair is not None
    return _alike(both + none, v + v.roll(1, 0)) and _alike(pair[:, 1:], v)


def _answers(mixer: Mixer, x: Tensor, heads: Tensor) -> Tensor:
    """What the mixer answers to token x [1, 1, D] where its heads answer this, [N, 1, H, V], less than to zeros."""
    given = torch.cat((heads, torch.zeros_like(heads[:1])))
    before, mixer.tap = mixer.tap, lambda name, value: given if name == "heads" else value
    try:
        with unnoticed():
            y = mixer(x.expand(len(given), -1, -1), None, None, False)[0]
    finally:
        mixer.tap = before
    return y[:-1] - y[-1:]


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool(F.mse_loss(a, b).sqrt() <= TOLERANCE * max(a.square().mean().sqrt().item(), 1e-12))
