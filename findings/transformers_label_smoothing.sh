#!/usr/bin/env bash
# transformers 5.24.0, accelerate 1.15.0, torch 2.13.0 (CPU): Trainer's label smoothing shifts the labels by one token for
# causal models whose class name stands in transformers' own table, and for no others. A causal model of another name (a
# subclass, a model registered for AutoModelForCausalLM, one loaded with trust_remote_code) shifts its labels in its own
# forward, as the documentation asks, and with label_smoothing_factor > 0 is trained to repeat the token that it sees.
#
# A good guess: a subclass of LlamaForCausalLM that changes nothing but its name is trained on the same loss.
# Seen, one batch, equal weights, smoothing 0.1: each class's loss against that of the next and of the same token:
#   LlamaForCausalLM  next token: 0.000 away  same token: 0.458 away
#   Renamed           next token: 0.458 away  same token: 0.000 away
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
pip() { "$folder/env/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
pip install torch==2.13.0
pip install transformers==5.24.0 accelerate==1.15.0
cd "$folder"
"$folder/env/bin/python" - <<'PY'
import torch
import transformers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

assert transformers.__version__ == "5.24.0"


class Renamed(LlamaForCausalLM):
    pass


config = LlamaConfig(
    vocab_size=23, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5
)
torch.manual_seed(0)
tokens = torch.randint(23, (2, 9))
weights = LlamaForCausalLM(config).state_dict()
away = {}
for kind in (LlamaForCausalLM, Renamed):
    model = kind(config).eval()
    model.load_state_dict(weights)
    arguments = TrainingArguments("out", label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    with torch.no_grad():
        loss = Trainer(model, arguments).compute_loss(model, {"input_ids": tokens, "labels": tokens.clone()})
        logits = model(tokens).logits
        due = {
            "next token": F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), label_smoothing=0.1),
            "same token": F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), label_smoothing=0.1),
        }
    away[kind.__name__] = {name: abs(float(loss - value)) for name, value in due.items()}
    print(kind.__name__, {name: round(far, 3) for name, far in away[kind.__name__].items()})
assert away["LlamaForCausalLM"]["next token"] < 1e-5 < away["LlamaForCausalLM"]["same token"], away
assert away["Renamed"]["same token"] < 1e-5 < away["Renamed"]["next token"], away
PY
