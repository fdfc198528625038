#!/usr/bin/env bash
# transformers 5.22.2 and 5.23.0, torch 2.13.0 (CPU): Mamba-2 with n_groups > 1 is another model before 5.23. Its gated
# normalisation takes the mean square over all channels, where the published Mamba-2 (mamba_ssm: group_size is
# d_inner / n_groups) and transformers from 5.23 on take it over each group. Weights, names and shapes are the same, so a
# checkpoint loads in both without a word, and answers differently.
#
# A good guess: a release that adds no option and renames no weight computes what the one before did.
# Seen, a random mixer of two groups, the largest difference of the norm's output from each of the two forms:
#   5.22.2  over all channels: 0.000  over each group: 1.428
#   5.23.0  over all channels: 1.428  over each group: 0.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install torch==2.13.0
for release in 5.22.2 5.23.0; do
  pip install "transformers==$release"
  "$folder/env/bin/python" - "$release" <<'PY'
import sys

import torch
import transformers
from torch.nn import functional as F
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

assert transformers.__version__ == sys.argv[1]
torch.manual_seed(0)
config = transformers.Mamba2Config(
    hidden_size=16, num_heads=4, head_dim=8, state_size=8, n_groups=2, num_hidden_layers=1, vocab_size=11, expand=2
)
mixer = Mamba2Mixer(config, layer_idx=0).eval()
seen = {}
mixer.norm.register_forward_hook(lambda module, given, result: seen.update(given=given, result=result))
with torch.no_grad():
    mixer(torch.randn(1, 6, 16))
    x, gate = seen["given"][:2]
    gated = x.float() * F.silu(gate.float())

    def normed(h):
        return h * (h.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).rsqrt()

    forms = {
        "over all channels": normed(gated),
        "over each group": normed(gated.unflatten(-1, (config.n_groups, -1))).flatten(-2),
    }
    away = {name: float((seen["result"] - y * mixer.norm.weight).abs().max()) for name, y in forms.items()}
print(sys.argv[1], {name: round(far, 3) for name, far in away.items()})
right, wrong = ("over all channels", "over each group") if sys.argv[1] == "5.22.2" else ("over each group", "over all channels")
assert away[right] < 1e-5, away
assert away[wrong] > 0.5, away
PY
done
