"""Mixtures of experts: a few of many MLPs for each token."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.mixers.layers import Linear, multiplications, with_loss
from contextlab.models.mlp import Mlp, SwiGlu, hidden_width
from contextlab.registry import register


class Experts(nn.Module):
    """One matrix an expert: weight [experts, outputs, inputs]."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs).uniform_(-1, 1) * inputs**-0.5)


@register(
    "mlp",
    "moe",
    family="experts",
    papers=("2101.03961", "2401.04081", "2401.06066", "2405.16039"),
    cases=(
        {"experts": 4},
        {"experts": 3, "top_k": 2, "shared": 1, "activation": "relu"},
        {"experts": 4, "top_k": 3, "router": "sigmoid", "balance": "entropy", "activation": "gelu"},
    ),
)
class MixtureOfExperts(Mlp):
    """Each token goes through the few expert MLPs that a router chooses for it; no token is dropped.

    With scores s = softmax(R x) or sigmoid(R x), y is the sum over the top_k experts of s_e MLP_e(x), scores as
    they are: Switch (2101.03961) is softmax with top_k 1, sigma-MoE (2405.16039) sigmoid with ReLU experts. In
    training a balancing term is added to the gradient of the loss (its value does not show in the loss that is
    reported): "switch" is E sum_e f_e P_e, with f_e the share of choices that fall on e and P_e the mean softmax
    score (2101.03961, eq. 4-6); "entropy" is sum_e P_e log P_e (2405.16039: minus the entropy of the mean). Unlike
    Switch there is no expert capacity: with it, what a token gets would depend on the other tokens of the batch.

    width: size of a token's vector.
    ratio: hidden width of one expert over `width`.
    experts: number of experts.
    top_k: experts that each token goes through.
    shared: further experts that every token goes through (DeepSeekMoE, 2401.06066).
    router: how scores are made of the router's logits.
    activation: of the experts; swiglu has three matrices and two thirds of the hidden width.
    balance: the balancing term.
    balance_weight: its factor.
    """

    trains_alone = "how many tokens an expert gets depends on the data"

    def __init__(
        self,
        width: PositiveInt,
        ratio: PositiveFloat = 4.0,
        experts: PositiveInt = 8,
        top_k: PositiveInt = 1,
        shared: Annotated[int, Field(ge=0)] = 0,
        router: Literal["softmax", "sigmoid"] = "softmax",
        activation: Literal["swiglu", "gelu", "relu"] = "swiglu",
        balance: Literal["switch", "entropy"] = "switch",
        balance_weight: Annotated[float, Field(ge=0)] = 0.01,
    ) -> None:
        super().__init__(width)
        if top_k > experts:
            raise InputError(f"top_k {top_k} is more than the {experts} experts; the nearest that fits is {experts}")
        self.experts, self.top_k, self.shared = experts, top_k, shared
        self.scoring, self.activation, self.balance, self.balance_weight = router, activation, balance, balance_weight
        gated = activation == "swiglu"
        hidden = hidden_width(width, ratio, gated)
        self.router = Linear(width, experts)
        self.up = Experts(experts + shared, width, hidden * (2 if gated else 1))
        self.out_proj = Experts(experts + shared, hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, width] -> [B, T, width]."""
        tokens = x.reshape(-1, self.width)
        logits = self.router(tokens).to(torch.promote_types(x.dtype, torch.float32))
        scores = logits.softmax(-1) if self.scoring == "softmax" else logits.sigmoid()
        weight, chosen = scores.topk(self.top_k, -1)  # [N, top_k]
        # All (token, expert) pairs in order of expert: each expert then reads one contiguous slice.
        order = chosen.flatten().argsort(stable=True)
        source = order // self.top_k
        counts = torch.bincount(chosen.flatten(), minlength=self.experts)
        pieces = tokens[source].split(counts.tolist())
        mixed = torch.cat([self._expert(e, piece) for e, piece in enumerate(pieces)])
        mixed = mixed * weight.flatten()[order].to(mixed.dtype).unsqueeze(-1)
        y = torch.zeros_like(tokens, dtype=mixed.dtype).index_add(0, source, mixed)
        for expert in range(self.experts, self.experts + self.shared):
            y = y + self._expert(expert, tokens)
        if self.training and self.balance_weight and torch.is_grad_enabled():
            y = with_loss(y, self.balance_weight * self._imbalance(logits, counts))
        return y.view_as(x)

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        h = F.linear(x, self.up.weight[expert])
        if self.activation == "swiglu":
            h = SwiGlu.activation(h)
        else:
            h = F.gelu(h) if self.activation == "gelu" else F.relu(h)
        return F.linear(h, self.out_proj.weight[expert])

    def _imbalance(self, logits: Tensor, counts: Tensor) -> Tensor:
        mean = logits.softmax(-1).mean(0)
        if self.balance == "entropy":
            return (mean * mean.log()).sum()
        return self.experts * (counts.to(mean.dtype) * mean).sum() / counts.sum()

    def flops(self, length: int) -> int:
        """See `Mlp.flops`: of the experts that a token goes through."""
        expert = self.up.weight[0].numel() + self.out_proj.weight[0].numel()
        return 2 * length * (multiplications(self.router) + (self.top_k + self.shared) * expert)
