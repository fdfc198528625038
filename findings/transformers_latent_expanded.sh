#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): DeepSeek-V3 (also deepseek_v2, minicpm3, kimi_linear and their like) keeps
# only the latent of each token in its cache, but makes the keys and values of all heads of all cached tokens anew for
# every token that it decodes. The memory of the paper is there; its decoding, in which the projection is absorbed into
# the query, is not: each step costs what reading the whole text again costs that projection.
#
# A good guess: with a cache a step projects the new token, and only attention grows with what was read.
# Seen, 1,000 tokens read and three decoded, how many tokens the up-projection of keys and values is given in each step:
#   cache (1, 1, 1000, 128) and (1, 1, 1000, 16); expanded 1001, 1002, 1003
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip --disable-pip-version-check --quiet install torch==2.13.0 transformers==5.24.0
"$folder/env/bin/python" - <<'PY'
import torch
import transformers

config = transformers.DeepseekV3Config(
    vocab_size=64, hidden_size=256, intermediate_size=64, num_hidden_layers=1, first_k_dense_replace=1,
    num_attention_heads=16, num_key_value_heads=16, kv_lora_rank=128, q_lora_rank=64, qk_rope_head_dim=16,
    qk_nope_head_dim=32, v_head_dim=32,
)
model = transformers.DeepseekV3ForCausalLM(config).eval()
expanded = []
for module in model.modules():
    if hasattr(module, "kv_b_proj"):
        module.kv_b_proj.register_forward_pre_hook(lambda _, given: expanded.append(given[0].shape[:-1].numel()))
ids = torch.randint(3, 64, (1, 1000), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    answer = model(ids, use_cache=True)
    layer = answer.cache.layers[0]
    shapes = [tuple(each.shape) for each in (layer.keys, layer.values)]
    expanded.clear()
    for _ in range(3):
        answer = model(ids[:, :1], cache=answer.cache, use_cache=True)
print(shapes, expanded)
assert shapes == [(1, 1, 1000, 128), (1, 1, 1000, 16)], shapes
assert expanded == [1001, 1002, 1003], expanded
PY
