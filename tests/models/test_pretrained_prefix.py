"""peft's prefix tuning on our models: learned keys and values that every text attends to first (2101.00190)."""

from __future__ import annotations

import pytest
import torch

from contextlab.errors import InputError
from contextlab.models import build_model
from contextlab.models.imports import native_model
from contextlab.ops.position import pairs_of_halves

transformers = pytest.importorskip("transformers", minversion="5")
peft = pytest.importorskip("peft")

SIZES = {"width": 16, "depth": 2, "heads": 4, "mlp_ratio": 1, "read_in": "token", "input_size": 31, "output_size": 31}
TOKENS = torch.randint(1, 30, (3, 7), generator=torch.Generator().manual_seed(0))
N = 3


def tuned(model, **options):
    from contextlab.models.pretrained import ContextlabForCausalLM

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N, **options)
    made = peft.get_peft_model(ContextlabForCausalLM.of(model.eval()), config).eval()
    with torch.no_grad():
        for each in made.prompt_encoder.parameters():
            each.normal_(generator=torch.Generator().manual_seed(1))
    return made


def ours(**layer):
    mixer = layer.pop("mixer", "attention")
    return build_model({**SIZES, "layers": [{"mixer": mixer, "options": layer}]}, seed=3)


@torch.no_grad()
def test_answers_are_those_of_transformers_llama_with_the_same_prefix():
    """Of grouped heads of a size of their own; its rotary pairs stand apart, so that its keys are reordered."""
    config = transformers.LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=6, max_position_embeddings=64,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    model = tuned(native_model(theirs.config, dict(theirs.state_dict()), "llama"))
    reference = peft.get_peft_model(theirs, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=N)).eval()
    weight = reference.prompt_encoder["default"].embedding.weight
    weight.normal_(generator=torch.Generator().manual_seed(1))
    keys, values = weight.unflatten(1, (2, 2, 2, 6)).unbind(2)  # [N, layers, 2, heads, size] of keys and values
    same = torch.stack((pairs_of_halves(keys, 6), values), 2).flatten(1)
    model.prompt_encoder["default"].embedding.weight.copy_(same)
    for mask in (torch.ones_like(TOKENS), (torch.arange(7) < torch.tensor((7, 5, 2))[:, None]).long()):
        got, expected = (each(input_ids=TOKENS, attention_mask=mask).logits for each in (model, reference))
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layer", [{}, {"short_conv": 3, "position": "none"}, {"position": "alibi"}])
def test_padded_rows_are_answered_as_alone(layer):
    model = tuned(ours(**layer))
    sizes = (7, 5, 2)
    for mask in (
        torch.arange(7) < torch.tensor(sizes)[:, None],
        torch.arange(7) >= 7 - torch.tensor(sizes)[:, None],
    ):
        got = model(input_ids=TOKENS, attention_mask=mask.long()).logits
        for row, real in enumerate(mask):
            alone = model(input_ids=TOKENS[row : row + 1, real]).logits[0]
            torch.testing.assert_close(got[row, real], alone, rtol=0, atol=1e-5)
        assert not torch.allclose(got[0], model.get_base_model()(TOKENS).logits[0], atol=1e-2)
    with pytest.raises(InputError, match="after a prefix rows that are padded leave no cache"):
        model(input_ids=TOKENS, attention_mask=mask.long(), use_cache=True)


def test_a_prefix_alone_is_learned():
    model = tuned(ours(kv_heads=2)).train()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    assert sum(each.numel() for each in model.parameters() if each.requires_grad) == N * 2 * 2 * 2 * 4
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    torch.optim.SGD([each for each in model.parameters() if each.requires_grad], 1.0).step()
    moved = {name for name, each in model.state_dict().items() if not torch.equal(each, before[name])}
    assert moved == {"prompt_encoder.default.embedding.weight"}
    assert model(input_ids=TOKENS, labels=TOKENS).loss.item() < loss.item()


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ({"layers": ["gated_delta_net"]}, {}, "layer 0 (GatedDeltaNet) does not keep all keys and values; prompt"),
        ({"layers": ["attention", "mla"]}, {}, "layer 1 (LatentAttention) does not keep all keys and values"),
        ({"loops": 2}, {"num_layers": 4}, "not for models that run layers several times"),
        ({}, {"num_layers": 3}, "the model has 2 layers, the prefix 3; give num_layers=2"),
        (
            {"layers": ["attention", {"mixer": "attention", "options": {"kv_heads": 1}}]}, {},
            "layer 1 holds 1 key heads of 4; give num_attention_heads=1 and token_dim=4",
        ),
    ],
)  # fmt: skip
def test_what_cannot_hold_a_prefix_is_told_in_one_line(spec, options, message):
    model = tuned(build_model({**SIZES, "layers": ["attention"], **spec}, seed=3), **options)
    with pytest.raises(InputError) as error:
        model(input_ids=TOKENS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
