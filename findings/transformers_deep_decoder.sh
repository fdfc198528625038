#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0 (CPU): BartForCausalLM (also blenderbot, marian, mbart, mvp, pegasus, plbart) whose
# decoder has more layers than its encoder cannot make a cache: the cache counts `num_hidden_layers`, which in these
# configurations is another name of `encoder_layers`, though the model holds the decoder alone.
#
# A good guess: a decoder-only model makes as many layers of cache as it has.
# Seen: decoder of 2 layers, encoder of 1: IndexError: list index out of range; encoder of 2: works.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip --disable-pip-version-check --quiet install torch==2.13.0 transformers==5.24.0
"$folder/env/bin/python" - <<'PY'
import torch
import transformers

seen = {}
for encoder in (1, 2):
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=encoder, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64,
    )
    model = transformers.BartForCausalLM(config).eval()
    try:
        with torch.no_grad():
            seen[encoder] = len(model(torch.ones(1, 4, dtype=torch.long), use_cache=True).cache)
    except IndexError as error:
        seen[encoder] = f"IndexError: {error}"
print(seen)
assert seen == {1: "IndexError: list index out of range", 2: 2}, seen
PY
