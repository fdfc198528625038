"""The layers that mixers and models share."""

from __future__ import annotations

from torch import Tensor, nn

from contextlab.ops.dense import dense, rms_norm


class Linear(nn.Linear):
    """`torch.nn.Linear`, at the speed of the CPU's faster library (`contextlab.ops.dense`).

    Weights are drawn with standard deviation inputs^-0.5; a bias starts at zero.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return dense(x, self.weight, self.bias)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm`, in fewer passes over memory on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
