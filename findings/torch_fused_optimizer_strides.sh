#!/usr/bin/env bash
# torch 2.13.0 (CPU): fused=True makes SGD, Adagrad, Adam and AdamW read a gradient by its places in memory, whatever its
# strides. torch.autograd.grad returns a gradient of the parameter's shape that may be transposed in memory (here of a
# loss that reads w.t()); set as w.grad it is accepted without a word, and each number of w gets another number's
# update. foreach and the plain loop go by indices. loss.backward() lays out what it stores as the parameter is, so that
# the same training is right or wrong by how its gradient was asked for.
#
# A good guess: fused only means faster; a gradient of the right shape, dtype and device is used as such.
# Seen, the largest difference from the plain loop after one step of rate 0.1 on a 3 x 4 matrix:
#   SGD      foreach 0.000   fused 1.692   fused after backward() 0.000
#   Adagrad  foreach 0.000   fused 0.200   fused after backward() 0.000
#   Adam     foreach 0.000   fused 0.200   fused after backward() 0.000
#   AdamW    foreach 0.000   fused 0.200   fused after backward() 0.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip --disable-pip-version-check --quiet install torch==2.13.0 numpy
"$folder/env/bin/python" - <<'PY'
import torch
from torch import nn

assert torch.__version__.split("+")[0] == "2.13.0"
torch.manual_seed(0)
start, x = torch.randn(3, 4), torch.randn(5, 4, 3)


def stepped(make, backward=False, **how):
    w = nn.Parameter(start.clone())
    optimizer = make([w], lr=0.1, **how)
    loss = (x * w.t()).square().sum()
    if backward:
        loss.backward()
        assert w.grad.stride() == w.stride()
    else:
        (w.grad,) = torch.autograd.grad(loss, [w])
        assert w.grad.shape == w.shape and w.grad.stride() == (1, 3)
    optimizer.step()
    return w.detach()


for make in (torch.optim.SGD, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW):
    plain = stepped(make, foreach=False)
    off = {
        "foreach": stepped(make, foreach=True),
        "fused": stepped(make, fused=True),
        "fused after backward()": stepped(make, backward=True, fused=True),
    }
    off = {name: float((w - plain).abs().max()) for name, w in off.items()}
    print(f"{make.__name__:8}", "   ".join(f"{name} {value:.3f}" for name, value in off.items()))
    assert off["foreach"] < 1e-5 and off["fused after backward()"] < 1e-5 and off["fused"] > 0.1, off
PY
