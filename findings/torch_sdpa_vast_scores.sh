#!/usr/bin/env bash
# torch 2.13.0 (CPU, float32): scaled_dot_product_attention of scores about 1e9 is right forward; its gradients are NaN
# and infinite. The kernel that it picks keeps the logarithm of each row's sum and makes the weights again in the
# backward pass, as exp(score - logarithm): a score of 1e9 is known to 64 in float32, and exp of
# that is no weight. The matrix products of SDPBackend.MATH, which keep the weights, give the right gradients.
#
# A good guess: softmax is safe for scores of any size, as the largest is subtracted; a kernel only differs in speed.
# Seen, 64 causal tokens of whole numbers, the largest gradient of v, and whether all are finite, by size of scores:
#   1e3  float64   37.17   kernel   37.17, finite   products   37.17, finite
#   1e9  float64   37.17   kernel     inf, no   products   37.17, finite
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip --disable-pip-version-check --quiet install torch==2.13.0 numpy
"$folder/env/bin/python" - <<'PY'
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

assert torch.__version__.split("+")[0] == "2.13.0"
torch.manual_seed(0)
q, k = ((torch.randn(1, 1, 64, 16) * 100).round() for _ in range(2))
v = torch.randn(1, 1, 64, 16)
every = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # as without a choice


def gradients(dtype, backends, scale):
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(backends):
        y = scaled_dot_product_attention(*leaves, is_causal=True, scale=scale)
    assert y.isfinite().all()
    return torch.autograd.grad(y.square().sum(), leaves)


for size, scale in (("1e3", 1e-2), ("1e9", 1e4)):
    exact = gradients(torch.float64, SDPBackend.MATH, scale)
    found = {"kernel": gradients(torch.float32, every, scale), "products": gradients(torch.float32, SDPBackend.MATH, scale)}
    words = [f"{size}  float64 {float(exact[2].abs().max()):7.2f}"]
    for name, slopes in found.items():
        finite = all(bool(x.isfinite().all()) for x in slopes)
        words.append(f"{name} {float(slopes[2].abs().max()):7.2f}, {'finite' if finite else 'no'}")
        assert finite == (name == "products" or size == "1e3"), (name, size)
        if finite:
            torch.testing.assert_close(slopes[2].double(), exact[2], rtol=1e-3, atol=1e-3)
    print("   ".join(words))
PY
