#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): a Llama with `rope_type: dynamic` keeps in its module the frequencies of the
# longest text that it has read. A text of `max_position_embeddings` tokens or more that comes after it is read with
# these; only one that is shorter puts the first frequencies back. So what a model answers depends on what it was asked
# before, by anyone who shares it.
#
# A good guess: a model in `eval()` has no state but its cache, which is none here.
# Seen, a random model in float64 of 16 positions, the same text before and after another of 64 tokens, the largest
# difference of a logit, of the largest logit:
#   linear  : 0.0 at 12, 16 and 32 tokens
#   dynamic : 0.0 at 12, 0.081 at 16, 0.034 at 32
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip --disable-pip-version-check --quiet install torch==2.13.0 transformers==5.24.0
"$folder/env/bin/python" - <<'PY'
import torch
import transformers


def fresh(kind):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, rope_parameters={"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0},
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double().eval()


ids = torch.randint(3, 64, (1, 64), generator=torch.Generator().manual_seed(0))
found = {}
with torch.no_grad():
    for kind in ("linear", "dynamic"):
        for length in (12, 16, 32):
            model = fresh(kind)
            before = model(ids[:, :length], use_cache=False).logits
            model(ids, use_cache=False)
            after = model(ids[:, :length], use_cache=False).logits
            found[kind, length] = float((after - before).abs().max() / before.abs().max())
print({f"{kind} {length}": f"{each:.1e}" for (kind, length), each in found.items()})
assert max(found["linear", length] for length in (12, 16, 32)) == found["dynamic", 12] == 0, found
assert min(found["dynamic", 16], found["dynamic", 32]) > 0.01, found
PY
