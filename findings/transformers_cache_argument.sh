#!/usr/bin/env bash
# transformers 5.23.0 and 5.24.0, torch 2.13.0 (CPU): the argument by which a model takes its cache was renamed from
# `past_key_values` to `cache` in 5.24. The new name given to 5.23 is no error: forward's **kwargs takes it, and the
# model answers as if the token before it had never been. The old name given to 5.24 works, with a FutureWarning.
#
# A good guess: an argument that a model does not know is a TypeError, or is handed to something that reads it.
# Seen, a random Llama, logits of a token after 7 others, the largest difference from those of the whole sequence:
#   5.23.0  past_key_values: 0.000  cache: 5.386, no warning
#   5.24.0  past_key_values: 0.000  cache: 0.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install torch==2.13.0
for release in 5.23.0 5.24.0; do
  pip install "transformers==$release"
  "$folder/env/bin/python" - "$release" <<'PY'
import sys
import warnings

import torch
import transformers

assert transformers.__version__ == sys.argv[1]
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=31, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3
)
model = transformers.LlamaForCausalLM(config).eval()
ids = torch.randint(31, (1, 8))
away, told = {}, {}
with torch.no_grad():
    whole = model(ids).logits[:, -1]
    for name in ("past_key_values", "cache"):
        cache = transformers.DynamicCache(config=config)
        model.model(ids[:, :7], use_cache=True, **{"cache" if sys.argv[1] == "5.24.0" else "past_key_values": cache})
        assert cache.get_seq_length() == 7
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            last = model(ids[:, 7:], **{name: cache}).logits[:, -1]
        away[name] = float((last - whole).abs().max())
        told[name] = [each.category.__name__ for each in seen]
print(sys.argv[1], {name: round(far, 3) for name, far in away.items()}, told)
assert away["past_key_values"] < 1e-4
if sys.argv[1] == "5.23.0":
    assert away["cache"] > 0.05, away
    assert told["cache"] == [], told
else:
    assert away["cache"] < 1e-4, away
    assert told == {"past_key_values": ["FutureWarning"], "cache": []}, told
PY
done
