"""One solver of error feedback: a weight is changed column by column, and what is left makes up for it.

The columns of a linear layer's weight are rounded, or set to zero, one after another. After each the columns that are
still free are moved so that the layer's outputs on the calibration inputs change least: optimal brain quantisation
with a fixed order for all rows and lazy batches (GPTQ, 2210.17323), which is optimal brain surgery where the change is
a zero (SparseGPT, 2301.00774).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from contextlab.errors import InputError

Rule = Callable[[int, Tensor, Tensor], Tensor]
"""Called with a column's place in the weight, the values [O, n] of it and the columns of its block that are still free
(as they have been corrected so far), and their pivots [n]; gives what the column becomes, [O]. The pivot p of a column
says what a change of it costs: (change / p)^2 is added to the squared error of the layer's outputs."""


def feedback(
    weight: Tensor,
    hessian: Tensor,
    rule: Rule,
    *,
    damping: float = 0.01,
    block: int = 128,
    order: Literal["natural", "activations"] = "natural",
) -> Tensor:
    """The weight after `rule` has changed each column and the columns after it have made up for that.

    weight: [O, I] float. hessian: [I, I], the second moments X^T X of the layer's inputs, up to a factor.
    rule: see `Rule`; a rule that chooses for several columns at once looks ahead in what it is given.
    damping: of the mean of the hessian's diagonal, added to the diagonal, so that it can be inverted.
    block: columns that are corrected at once; the rest waits (lazy batches), which changes nothing but the time.
    order: "activations" takes columns with large inputs first (act-order).

    Inputs that are always zero have no say: their columns become what the rule makes of zeros. Returns [O, I] in the
    weight's dtype; all is computed in float64. Raises InputError where the hessian is of another size, or not finite.
    """
    outputs, inputs = weight.shape
    if hessian.shape != (inputs, inputs):
        raise InputError(f"hessian: expected [{inputs}, {inputs}] for a weight [{outputs}, {inputs}], got "
                         f"{list(hessian.shape)}")  # fmt: skip
    left, pivots, places = prepared(weight, hessian, damping, order)
    found = torch.empty_like(left)
    for begin in range(0, inputs, block):
        end = min(begin + block, inputs)
        part, own = left[:, begin:end], pivots[begin:end, begin:end]
        errors = torch.empty_like(part)
        for at in range(end - begin):
            pivot = own.diagonal()[at:]
            changed = rule(int(places[begin + at]), part[:, at:], pivot).to(left.dtype)
            found[:, begin + at] = changed
            errors[:, at] = (part[:, at] - changed) / pivot[0]
            part[:, at:] -= errors[:, at : at + 1] * own[at, at:]
        left[:, end:] -= errors @ pivots[begin:end, end:]
    back = torch.empty_like(found)
    back[:, places] = found
    return back.to(weight.dtype)


def prepared(
    weight: Tensor, hessian: Tensor, damping: float, order: Literal["natural", "activations"] = "natural"
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight [O, I] in float64 and in order, the upper Cholesky factor [I, I] of the inverse hessian, the order.

    Columns of inputs that are always zero are set to zero.
    """
    left = weight.detach().to(torch.float64).clone()
    moments = hessian.detach().to(device=left.device, dtype=torch.float64).clone()
    if not bool(moments.isfinite().all()):
        raise InputError("hessian: it is not finite; the calibration inputs overflow, or the model gives nan on them")
    diagonal = moments.diagonal()
    idle = diagonal <= 0
    mean = 1.0 if bool(idle.all()) else float(diagonal[~idle].mean())
    moments[idle, idle] = mean
    left[:, idle] = 0.0
    diagonal.add_(damping * mean)
    places = torch.arange(left.shape[1], device=left.device)
    if order == "activations":
        places = diagonal.argsort(descending=True, stable=True)
        left, moments = left[:, places], moments[places][:, places]
    lower, failed = torch.linalg.cholesky_ex(moments)
    if int(failed):
        raise InputError(f"damping: the hessian cannot be inverted with {damping:g} of its diagonal added; give more")
    return left, torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True), places
