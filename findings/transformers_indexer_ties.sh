#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): a DeepSeek-V3.2 (also axk2, dots3_note, glm_moe_dsa, hy_v4, deepseek_v4) that
# reads with its cache answers unlike one that reads all at once. Its indexer sums ReLUs, so that scores of exactly 0 are
# common, and keeps the `index_topk` highest; which of the tokens that score 0 are kept is left to torch.topk, whose choice
# among equals depends on how many rows and columns it is given. With softplus in place of the ReLU nothing ties, and both
# readings agree.
#
# A good guess: a cache changes no logits beyond rounding.
# Seen, a random model in float64 with index_topk 5, 32 tokens, the largest difference of a logit from the whole, of the
# largest logit:
#   relu      0.22
#   softplus  8.5e-08
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip --disable-pip-version-check --quiet install torch==2.13.0 transformers==5.24.0
"$folder/env/bin/python" - <<'PY'
import torch
import transformers
from torch.nn import functional

torch.manual_seed(0)
config = transformers.DeepseekV32Config(
    vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
    kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=8, head_dim=4, index_n_heads=4,
    index_head_dim=8, index_topk=5, layer_types=["indexed_attention"] * 2, mlp_layer_types=["dense", "sparse"],
)
model = transformers.DeepseekV32ForCausalLM._from_config(config, experts_implementation="eager")
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
model = model.double().eval()
relu, far = functional.relu, {}
with torch.no_grad():
    for name, function in (("relu", relu), ("softplus", functional.softplus)):
        functional.relu, far[name] = function, 0.0
        for seed in range(8):
            ids = torch.randint(3, 48, (2, 32), generator=torch.Generator().manual_seed(seed))
            whole = model(ids, use_cache=False).logits
            cache, read = None, []
            for piece in ids.split(1, 1):
                answer = model(piece, cache=cache, use_cache=True)
                cache = answer.cache
                read.append(answer.logits)
            far[name] = max(far[name], float((torch.cat(read, 1) - whole).abs().max() / whole.abs().max()))
functional.relu = relu
print({name: f"{each:.1e}" for name, each in far.items()})
assert far["relu"] > 0.01, far
assert far["softplus"] < 1e-6, far
PY
