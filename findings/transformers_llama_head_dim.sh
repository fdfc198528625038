#!/usr/bin/env bash
# transformers 5.24.0: Llama's configuration has `head_dim`, which sets the size of a head apart from the width, and still
# refuses a width that is no multiple of the number of heads. Mistral, Qwen2 and Qwen3, whose layers have the same shapes,
# take it, so that a Llama whose width was cut cannot be saved as one.
#
# A good guess: where `head_dim` is given, nothing divides the width by the heads.
# Seen, width 20, three heads of 8:
#   LlamaConfig     The hidden size (20) is not a multiple of the number of attention heads (3).
#   MistralConfig   taken: q_proj 24 x 20, o_proj 20 x 24
#   Qwen2Config     taken: q_proj 24 x 20, o_proj 20 x 24
#   Qwen3Config     taken: q_proj 24 x 20, o_proj 20 x 24
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip --disable-pip-version-check --quiet install torch==2.13.0 transformers==5.24.0
"$folder/env/bin/python" - <<'PY'
import transformers

seen = {}
for name in ("Llama", "Mistral", "Qwen2", "Qwen3"):
    try:
        config = getattr(transformers, f"{name}Config")(
            hidden_size=20, num_attention_heads=3, num_key_value_heads=3, head_dim=8, num_hidden_layers=1,
            intermediate_size=8, vocab_size=16,
        )
    except Exception as error:
        seen[name] = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ")
        continue
    attention = getattr(transformers, f"{name}ForCausalLM")(config).model.layers[0].self_attn
    seen[name] = [tuple(attention.q_proj.weight.shape), tuple(attention.o_proj.weight.shape)]
print(seen)
assert "not a multiple of the number of attention heads" in seen.pop("Llama"), seen
assert all(each == [(24, 20), (20, 24)] for each in seen.values()), seen
PY
