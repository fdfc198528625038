#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): Bamba counts places from 0 in every call that is given no `position_ids`,
# though the cache that it is given says how much was read. Its rotary attention then takes tokens for as near as if the
# cache were empty, and nothing is said. Llama adds what the cache holds.
#
# A good guess: a model that is handed its cache goes on where it stopped.
# Seen, random models in float64, 24 tokens in pieces of 16, 1 and 7, the largest difference of a logit from the whole,
# of the largest logit:
#   llama  2e-16 without position_ids, 2e-16 with them
#   bamba  0.034 without position_ids, 3e-08 with them
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip --disable-pip-version-check --quiet install torch==2.13.0 transformers==5.24.0
"$folder/env/bin/python" - <<'PY'
import torch
import transformers

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MAMBA = {
    "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}


def made(config, model):
    torch.manual_seed(0)
    model = model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


models = {
    "llama": made(transformers.LlamaConfig(**SIZES), transformers.LlamaForCausalLM),
    "bamba": made(transformers.BambaConfig(**SIZES, **MAMBA), transformers.BambaForCausalLM),
}
ids = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(0))
found = {}
with torch.no_grad():
    for name, model in models.items():
        whole = model(ids, use_cache=False).logits
        for told in ("without", "with"):
            cache, read = None, []
            for at, piece in zip((0, 16, 17), ids.split((16, 1, 7), 1), strict=True):
                places = torch.arange(at, at + piece.shape[1])[None]
                given = {"position_ids": places} if told == "with" else {}
                answer = model(piece, cache=cache, use_cache=True, **given)
                cache = answer.cache
                read.append(answer.logits)
            found[name, told] = float((torch.cat(read, 1) - whole).abs().max() / whole.abs().max())
print({f"{name} {told}": f"{each:.1e}" for (name, told), each in found.items()})
assert found["bamba", "without"] > 0.01, found
assert max(found["llama", "without"], found["llama", "with"], found["bamba", "with"]) < 1e-6, found
PY
