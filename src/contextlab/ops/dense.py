"""The matrix product of a linear layer, and RMS normalisation, in few passes over memory on a CPU.

On AMD's processors with AVX-512, MKL's float32 products run at less than half the speed of oneDNN's, which
PyTorch also carries: there large float32 products go through oneDNN, and, without gradients, those of large matrices
with however few tokens (1.6 to 2.4 times as fast on two threads, as fast on one). Elsewhere PyTorch's own functions
serve.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.ops import backend
from contextlab.ops.backend import onednn
from contextlab.ops.precision import without_autocast

_FORWARD_FROM, _WEIGHT_FROM = 2**22, 2**24  # multiply-adds from which oneDNN's overhead pays
_READ_FROM = 2**17
"""Numbers of a matrix from which on oneDNN is faster for a few tokens, too: MKL reads it with one thread alone.

These are of a Zen 5 CPU. To measure them again: `python benchmarks/training.py` and `python benchmarks/decode.py`.
"""


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, with gradients of any order.

    x: [..., I]. weight: [O, I]. bias: [O] or None. Returns [..., O]; float32 results are the same as those of
    `torch.nn.functional.linear` up to rounding. Tensors of other classes, and all under `use_backend("torch")`, are
    given to that function.
    """
    if (
        not torch.compiler.is_compiling()  # first: an exported program would be bound to the sizes below the threshold
        and (
            x.numel() * weight.shape[0] >= _FORWARD_FROM
            or (weight.numel() >= _READ_FROM and not torch.is_grad_enabled())
        )
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and _serves(x, weight)
        and not torch.is_autocast_enabled("cpu")
    ):
        if not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            return _product(x, weight, bias)  # a call of a Function costs half as much as a token's product
        y: Tensor = _Dense.apply(x, weight, bias)
        return y
    return F.linear(x, weight, bias)


def _serves(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN may take tensors x and weight of any shape: of PyTorch's own kind, on a CPU where it is faster."""
    return type(x) in _OWN and type(weight) in _OWN and backend.forced() != "torch" and onednn()[0]


_OWN = (Tensor, torch.nn.Parameter)  # others (quantized, distributed) know how they are multiplied


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [N, I] @ weight.T, weight [O, I], without gradients: a step of a blockwise pass on a CPU.

    Both are best without gaps in memory, or the weight's transpose is. Of any size; see `dense` for which library.
    """
    return _product(x, weight, None) if x.dtype == torch.float32 and _serves(x, weight) else x @ weight.T


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (1910.07467, eq. 4), with gradients of any order.

    x: [..., D]. weight: [D] or None (ones). eps: None takes the dtype's machine epsilon. Returns [..., D].
    """
    # Without gradients PyTorch's own takes one pass, and a call of ours costs more than a token's norm.
    if (
        weight is not None
        and torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
    ):
        y: Tensor = _RmsNorm.apply(x, weight, torch.finfo(x.dtype).eps if eps is None else eps)[0]
        return y
    if weight is not None and weight.dtype != x.dtype:
        weight = weight.to(x.dtype)  # under autocast x can be of half precision; PyTorch's fused kernels want one dtype
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class _Dense(torch.autograd.Function):
    """Products through oneDNN; a backward that is differentiated again is written in PyTorch's own."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        rows, drows = x.flatten(0, -2), dy.flatten(0, -2)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight if torch.is_grad_enabled() else _product(dy, weight.t(), None)
        if ctx.needs_input_grad[1]:
            if torch.is_grad_enabled() or rows.numel() * weight.shape[0] < _WEIGHT_FROM:
                dweight = drows.t() @ rows
            else:
                dweight = _weight_gradient(rows, drows)
        return dx, dweight, drows.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        return torch.vmap(F.linear, in_dims, randomness=info.randomness)(x, weight, bias), 0


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        weight = weight.contiguous()  # oneDNN reads rows with gaps by its reference code, a hundred times slower
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """dy.T @ x for x [N, I], dy [N, O]; oneDNN reads the first factor by rows, so the narrower one is copied."""
    if x.shape[1] < dy.shape[1]:
        return _product(x.t().contiguous(), dy.t(), None).t()
    return _product(dy.t().contiguous(), x.t(), None)


class _RmsNorm(torch.autograd.Function):
    """Three passes forward and eight backward; PyTorch's on a CPU is composed of more than twice as many."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        inverse = _inverse_rms(x, eps)
        return x * inverse * weight, inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor | None, _: Any) -> Any:
        if dy is None:
            return None, None, None
        x, weight, inverse = ctx.saved_tensors
        again = torch.is_grad_enabled()  # then the result is differentiated, and `inverse` must hang on x
        inverse = _inverse_rms(x, ctx.eps) if again else inverse
        unit = x * inverse
        slope = dy * unit
        # d unit / dx = (1 - unit unit^T / D) / rms
        share = (slope @ weight).unsqueeze(-1) / -x.shape[-1]
        dunit = dy * weight
        dx = torch.addcmul(dunit, unit, share) * inverse if again else dunit.addcmul_(unit, share).mul_(inverse)
        return dx, slope.flatten(0, -2).sum(0) if slope.ndim > 1 else slope, None


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()
