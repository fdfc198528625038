"""How sparse dictionaries are trained: TopK with an auxiliary loss of dead units, JumpReLU with a target of L0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.errors import InputError, unknown

AUXILIARY = 1 / 32
"""Weight of the auxiliary loss, as in 2406.04093."""
DEAD_AFTER = 50
"""Steps in which a unit was in no token's features, after which it counts as dead in training."""
BANDWIDTH = 0.1
"""Of the estimate of a threshold's gradient, in pre-activations of inputs of norm 1 on average (2407.14435: 0.001, of
1,000 times as many tokens)."""
SPARSITY = 0.3
"""Weight of (L0 / k - 1)^2 in the loss of JumpReLU, against the share of the variance that is not told."""


@dataclass(frozen=True)
class FitSpec:
    """What is trained and how. kind, units, k, steps, batch, learning_rate: see `train_dictionary`."""

    kind: Literal["topk", "jumprelu"] = "topk"
    units: int = 256
    k: int = 8
    steps: int = 1000
    batch: int = 512
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        if self.kind not in ("topk", "jumprelu"):
            raise InputError(f"kind: {unknown('kind', self.kind, ('topk', 'jumprelu'))}")
        if not 1 <= self.k <= self.units:
            raise InputError(f"k: expected from 1 to the {self.units} units, got {self.k}")
        if self.steps < 0 or self.batch < 1:
            raise InputError(f"steps, batch: expected at least 0 and 1, got {self.steps} and {self.batch}")


class Weights(NamedTuple):
    """Those of a `Dictionary`."""

    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None


def fit(x: Tensor, y: Tensor | None, spec: FitSpec, generator: torch.Generator) -> Weights:
    """Train a dictionary. x: [N, d_in] float32. y: [N, d_out], what is to be told; None for x itself.

    Inputs are scaled to a norm of 1 on average (root mean square), which is undone in the weights. The decoder's rows
    begin as random directions, the encoder as their transpose (of a transcoder as other random ones), b_dec as the
    mean; rows are kept at norm 1. Adam; the learning rate falls to 0 over the last third.
    steps 0 gives the dictionary as it is drawn. generator: on the CPU.
    """
    wanted = x if y is None else y
    scale_in, scale_out = _scale(x), _scale(wanted)
    x, wanted = x / scale_in, wanted / scale_out
    device = x.device

    def directions(count: int, size: int) -> Tensor:
        return F.normalize(torch.randn(count, size, generator=generator), dim=1).to(device)

    w_dec = directions(spec.units, wanted.shape[1])
    w_enc = (w_dec if y is None else directions(spec.units, x.shape[1])).T.clone()
    b_dec, b_enc = wanted.mean(0), torch.zeros(spec.units, device=device)
    if y is not None:
        b_enc = -(x.mean(0) @ w_enc)
    log_threshold = torch.full((spec.units,), 0.05, device=device).log() if spec.kind == "jumprelu" else None
    own = [w_enc, b_enc, w_dec, b_dec, *([] if log_threshold is None else [log_threshold])]
    variance = (wanted - wanted.mean(0)).square().sum(1).mean().clamp_min(1e-12)
    with torch.enable_grad():
        for tensor in own:
            tensor.requires_grad_()
        optimizer = torch.optim.Adam(own, lr=spec.learning_rate, betas=(0.9, 0.99))
        idle = torch.zeros(spec.units, device=device)
        for step in range(spec.steps):
            rate = min(1.0, 3 * (1 - step / spec.steps), (step + 1) / 20)
            optimizer.param_groups[0]["lr"] = spec.learning_rate * rate
            rows = torch.randint(len(x), (spec.batch,), generator=generator).to(device)
            before = (x[rows] - b_dec if y is None else x[rows]) @ w_enc + b_enc
            if log_threshold is None:
                features = _top(before, spec.k)
                extra: Any = 0.0
            else:
                threshold = log_threshold.exp()
                features = _Jump.apply(before.relu(), threshold)
                number = _Step.apply(before, threshold).sum(1).mean()
                extra = SPARSITY * min(1.0, 3 * step / spec.steps) * (number / spec.k - 1).square()
            left = wanted[rows] - features @ w_dec - b_dec
            loss = left.square().sum(1).mean() / variance + extra
            dead = idle >= DEAD_AFTER
            if log_threshold is None and bool(dead.any()):
                loss = loss + AUXILIARY * _auxiliary(before, dead, left.detach(), w_dec)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                w_dec.copy_(F.normalize(w_dec, dim=1))
                idle = torch.where((features > 0).any(0), 0.0, idle + 1)
    with torch.no_grad():
        ratio = scale_out / scale_in
        above = None if log_threshold is None else log_threshold.exp() * scale_out
        return Weights(w_enc * ratio, b_enc * scale_out, w_dec.detach(), b_dec * scale_out, above)


def _scale(x: Tensor) -> Tensor:
    """By what rows are divided so that their norm is 1 on average."""
    return x.square().sum(1).mean().sqrt().clamp_min(1e-12)


def _top(before: Tensor, k: int) -> Tensor:
    top = before.topk(k, dim=1, sorted=False)
    return torch.zeros_like(before).scatter(1, top.indices, top.values.relu())


def _auxiliary(before: Tensor, dead: Tensor, left: Tensor, w_dec: Tensor) -> Tensor:
    """How badly the dead units tell what the others leave, as a share of it (2406.04093, AuxK)."""
    count = min(int(dead.sum()), max(1, w_dec.shape[1] // 2))
    told = _top(before.masked_fill(~dead, -torch.inf), count) @ w_dec
    return (left - told).square().sum(1).mean() / left.square().sum(1).mean().clamp_min(1e-12)


class _Step(torch.autograd.Function):
    """Whether a pre-activation is above its threshold; gradients of the threshold by a rectangle (2407.14435)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(x, threshold)
        return (x > threshold).to(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, Tensor]:
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() < BANDWIDTH / 2).to(x)
        return None, -(near * gradients[0]).sum(0) / BANDWIDTH


class _Jump(torch.autograd.Function):
    """What is above the threshold, 0 below; gradients of the threshold by a rectangle (2407.14435)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(x, threshold)
        return x * (x > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor]:
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() < BANDWIDTH / 2).to(x)
        moved = -(near * gradients[0]).sum(0) * threshold / BANDWIDTH
        return gradients[0] * (x > threshold), moved
