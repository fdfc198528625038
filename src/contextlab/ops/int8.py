"""The product with a weight in int8 for a few tokens, by PyTorch's own kernel on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from contextlab.ops import backend

MOST_TOKENS = 8
"""From more tokens on the product of a weight that was made dense is faster (a Zen 5 CPU, 2048 x 8192)."""


def int8_serves(x: Tensor, codes: Tensor) -> bool:
    """Whether `int8_dense` may take x [..., I] and codes [O, I] int8: bfloat16 on a CPU, few tokens, no gradients.

    In float32 PyTorch's kernel is not vectorised: it would take ten times as long as the dense product.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and x.dtype == torch.bfloat16
        and x.device.type == codes.device.type == "cpu"
        and type(x) is Tensor
        and 0 < x.numel() <= MOST_TOKENS * x.shape[-1]
        and backend.forced() != "torch"
        and available()
    )


def available() -> bool:
    """Whether this PyTorch has the kernel."""
    return hasattr(torch.ops.aten, "_weight_int8pack_mm")


def int8_dense(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x @ (codes * scale).T, where `int8_serves` says so.

    x: [..., I] bfloat16. codes: [O, I] int8. scale: [O] bfloat16. Returns [..., O] bfloat16.
    """
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = torch.ops.aten._weight_int8pack_mm(rows, codes, scale)
    return y.view(*x.shape[:-1], codes.shape[0])
