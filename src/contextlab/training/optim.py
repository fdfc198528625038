"""Optimisers as functions over named tensors: AdamW, and Muon for the matrices inside the blocks.

The state is a flat dict of tensors, so it is saved as it is: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`
for AdamW's parameters, `momentum.NAME` for Muon's. The state's keys say which optimiser a parameter gets.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as torch_adamw

from contextlab.mixers.forms import LinearForm
from contextlab.mixers.layers import TernaryLinear

EPS = 1e-8
MOMENTUM = 0.95
QUINTIC = (3.4445, -4.7750, 2.0315)


def matrices(model: nn.Module) -> set[str]:
    """Names of the parameters that Muon is for: matrices of linear, recurrent layers in `model.blocks`.

    The read-in, the read-out, embeddings, convolutions, norms, biases, adapters and free parameters are AdamW's.
    """
    found = set()
    for prefix, module in model.named_modules():
        if ".lora_" in prefix:
            continue
        if prefix.startswith("blocks.") and isinstance(module, nn.Linear | nn.RNNBase | TernaryLinear | LinearForm):
            own = module.named_parameters(prefix, recurse=False)
            found |= {name for name, parameter in own if parameter.ndim == 2 and parameter.requires_grad}
    return found


def init(params: Mapping[str, Tensor], muon_names: Collection[str] = ()) -> dict[str, Tensor]:
    """The state before the first step.

    params: name -> parameter, of any shape.
    muon_names: parameters, all of them matrices [out, in], that Muon updates; AdamW takes the rest.
    """
    state: dict[str, Tensor] = {}
    for name, parameter in params.items():
        if name in muon_names:
            state[f"momentum.{name}"] = torch.zeros_like(parameter)
        else:
            state[f"exp_avg.{name}"] = torch.zeros_like(parameter)
            state[f"exp_avg_sq.{name}"] = torch.zeros_like(parameter)
            state[f"step.{name}"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return state


@torch.no_grad()
def update(
    params: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    state: dict[str, Tensor],
    *,
    learning_rate: float,
    matrix_learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    skip: Tensor | None = None,
) -> None:
    """One step of AdamW and Muon; `params` and `state` are changed in place.

    gradients: name -> gradient, one for each parameter.
    learning_rate, matrix_learning_rate: AdamW's and Muon's at this step.
    weight_decay: decoupled, of parameters with two or more dimensions.
    skip: scalar float tensor; where it is 1, nothing changes. It stays on its device: no synchronisation.
    """
    if skip is None:
        skip = torch.zeros((), device=next(iter(params.values())).device)
    with_muon = [name for name in params if f"momentum.{name}" in state]
    with_adamw = [name for name in params if f"momentum.{name}" not in state]
    _adamw(with_adamw, params, gradients, state, learning_rate, betas, weight_decay, skip)
    _muon(with_muon, params, gradients, state, matrix_learning_rate, weight_decay, skip)


def _adamw(
    names: list[str],
    params: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    state: dict[str, Tensor],
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    skip: Tensor,
) -> None:
    """AdamW (1711.05101), by PyTorch's fused kernel: one call for all parameters of a kind."""
    decayed = {name for name in names if weight_decay and params[name].ndim >= 2}
    for group, decay in (
        ([n for n in names if n not in decayed], 0.0),
        ([n for n in names if n in decayed], weight_decay),
    ):
        if group:
            torch_adamw(
                [params[n] for n in group],
                [laid_out_as(params[n], gradients[n]) for n in group],
                [state[f"exp_avg.{n}"] for n in group],
                [state[f"exp_avg_sq.{n}"] for n in group],
                [],
                [state[f"step.{n}"] for n in group],
                fused=True,
                found_inf=skip,
                amsgrad=False,
                beta1=betas[0],
                beta2=betas[1],
                lr=learning_rate,
                weight_decay=decay,
                eps=EPS,
                maximize=False,
            )


def laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient, of the parameter's shape [...], with its values in memory as the parameter has them.

    PyTorch's fused kernel reads both by their places in memory, whatever their strides: of a transposed gradient, as
    that of Mamba's `A_log` is, each number would be another number's update.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _muon(
    names: list[str],
    params: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    state: dict[str, Tensor],
    learning_rate: float,
    weight_decay: float,
    skip: Tensor,
) -> None:
    """Muon (K. Jordan 2024; 2502.16982): Nesterov momentum, orthogonalised, times max(1, rows / columns)^0.5.

    Matrices of one shape (or its transpose) go through the iteration as one batch.
    """
    groups: dict[tuple[int, int], list[str]] = {}
    for name in names:
        rows, columns = params[name].shape
        groups.setdefault((min(rows, columns), max(rows, columns)), []).append(name)
    for group in groups.values():
        momentum = [state[f"momentum.{n}"] for n in group]
        keep = 1 - skip.to(momentum[0])  # in the parameters' dtype: the decay is rounded to it
        # A skipped step's gradients are not finite; the momentum in their place leaves itself unchanged.
        found = [torch.where(skip > 0, m, gradients[n]) for n, m in zip(group, momentum, strict=True)]
        torch._foreach_lerp_(momentum, found, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(found, momentum, MOMENTUM)
        tall = [params[n].shape[0] > params[n].shape[1] for n in group]
        stacked = torch.stack([g.mT if t else g for g, t in zip(ahead, tall, strict=True)])
        directions = orthogonalize(stacked).to(stacked.dtype) * keep
        if weight_decay:
            torch._foreach_mul_([params[n] for n in group], 1 - learning_rate * weight_decay * keep)
        for name, direction, transposed in zip(group, directions.unbind(), tall, strict=True):
            rows, columns = params[name].shape
            scale = math.sqrt(max(1.0, rows / columns))
            params[name].add_(direction.mT if transposed else direction, alpha=-learning_rate * scale)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Replace the singular values of each matrix by about 1 (0.7 to 1.2): a quintic Newton-Schulz iteration.

    matrices: [N, rows, columns], rows <= columns. It runs in bfloat16 on CUDA, else in their dtype.
    """
    a, b, c = QUINTIC
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)  # the spectral norm is at most Frobenius'
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
