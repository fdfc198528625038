#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): Falcon with `alibi: true` makes its bias, slope times place, in bfloat16,
# whatever the dtype of the model: its 8 bits know a place of 1,024 to 2,047 to 8 only. Far from a text's start
# neighbours have one bias, and then it jumps; a token that is one place further back may count as near as the last or
# as 8 places further. Bloom, from which the code comes, multiplies in float32.
#
# A good guess: a float32 model has float32 biases, and only the distance of two tokens counts.
# Seen, 2,048 tokens in float32, the largest error of a bias in steps of one place, the kinds of step between neighbours
# beyond place 1,024, and how far the logits of a random model are from those with exact biases, of the largest:
#   bloom   0.0   steps [1.0]
#   falcon  4.0   steps [0.0, 8.0]   logits 0.24
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip --disable-pip-version-check --quiet install torch==2.13.0 transformers==5.24.0
"$folder/env/bin/python" - <<'PY'
import torch
import transformers
from transformers.models.bloom.modeling_bloom import build_alibi_tensor as of_bloom
from transformers.models.falcon import modeling_falcon

HEADS, LENGTH = 8, 2048
SLOPES = torch.tensor([2.0 ** -(head + 1) for head in range(HEADS)])
of_falcon = modeling_falcon.build_alibi_tensor
mask, errors, steps = torch.ones(1, LENGTH, dtype=torch.int64), {}, {}
for name, build in (("bloom", of_bloom), ("falcon", of_falcon)):
    places = build(mask, HEADS, torch.float32).view(HEADS, LENGTH) / SLOPES[:, None]
    errors[name] = float((places - torch.arange(LENGTH)).abs().max())
    steps[name] = sorted(set((places[:, 1025:] - places[:, 1024:-1]).flatten().tolist()))
torch.manual_seed(0)
config = transformers.FalconConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=HEADS, alibi=True, multi_query=False,
    new_decoder_architecture=False, parallel_attn=False, max_position_embeddings=LENGTH,
)
model = transformers.FalconForCausalLM(config).eval()
ids = torch.randint(3, 64, (1, LENGTH), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    plain = model(ids, use_cache=False).logits
    modeling_falcon.build_alibi_tensor = of_bloom
    exact = model(ids, use_cache=False).logits
off = float((plain - exact).abs().max() / exact.abs().max())
print(errors, steps, f"{off:.1e}")
assert errors == {"bloom": 0.0, "falcon": 4.0}, errors
assert steps == {"bloom": [1.0], "falcon": [0.0, 8.0]}, steps
assert off > 0.001, off
PY
