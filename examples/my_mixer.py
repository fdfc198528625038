"""A token mixer of one's own: linear attention whose heads learn, token by token, how fast to forget."""

import torch
from torch import nn
from torch.nn.functional import logsigmoid

from contextlab import Mixer, RecurrentState, register
from contextlab.ops import simple_gla


@register("mixer", "forgetful_attention", family="linear", cases=({}, {"heads": 2}))
class ForgetfulAttention(Mixer):
    """Linear attention with one learned, data-dependent decay a head."""

    parallel_form = "chunks"  # or "attention", "scan", "loop": how it reads many tokens at once

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__(width)
        self.shape = (3, heads, width // heads)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.decay_proj = nn.Linear(width, heads)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x, state=None, mask=None, keep_state=True):
        q, k, v = self.qkv_proj(x).unflatten(-1, self.shape).unbind(-3)
        g = logsigmoid(self.decay_proj(x) + 4)  # log decay, near 0 at first: remember
        if mask is not None:  # left padding must write nothing and forget nothing
            k, g = k * mask[..., None, None], g * mask[..., None]
        before = None if state is None else state["memory"]
        y, memory = simple_gla(q, k, v, g=g, initial_state=before, output_final_state=keep_state)
        length = x.shape[1] + (0 if state is None else state.length)
        after = RecurrentState(memory={"memory": memory}, length=length) if keep_state else None
        return self.out_proj(y.flatten(-2)), after

    def state_nbytes(self, length, batch=1, dtype=torch.float32):
        return batch * self.width * self.shape[2] * dtype.itemsize

    def flops(self, length):
        return 2 * length * (4 * self.width**2 + self.width * self.shape[1] + 2 * self.width * self.shape[2])
