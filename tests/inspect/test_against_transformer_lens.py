"""Patching against TransformerLens' own functions, on a small Llama of random weights that both read.

It needs `transformer_lens`, which is not among what tests install.
"""

from __future__ import annotations

import pytest
import torch

from contextlab.inspect import patch_effects
from contextlab.models import load

pytest.importorskip("transformer_lens")
transformers = pytest.importorskip("transformers")

LAYERS, HEADS, WIDTH, VOCABULARY, T = 3, 4, 32, 50, 9


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights in our stack and in TransformerLens'."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformer_lens.model_bridge import TransformerBridge

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=32, initializer_range=0.3,
        tie_word_embeddings=False,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    theirs.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w3")
    hooked = TransformerBridge.boot_transformers(str(folder), hf_model=theirs, tokenizer=tokenizer, device="cpu")
    ours = load(folder, native=True).eval()
    return ours, hooked


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (2, T), generator=generator) for _ in range(2)]


def score(logits):
    return logits[:, -1, 7] - logits[:, -1, 11]


@torch.no_grad()
def test_both_answer_alike(models, texts):
    ours, hooked = models
    torch.testing.assert_close(ours(texts[0]), hooked(texts[0]), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("named", "site", "by"),
    [
        ("get_act_patch_attn_head_out_all_pos", "blocks.*.mixer.heads", ["heads"]),
        ("get_act_patch_attn_head_out_by_pos", "blocks.*.mixer.heads", ["places", "heads"]),
        ("get_act_patch_attn_head_q_all_pos", "blocks.*.mixer.q", ["heads"]),
        ("get_act_patch_attn_head_v_all_pos", "blocks.*.mixer.v", ["heads"]),
        ("get_act_patch_resid_pre", "blocks.*.input", ["places"]),
        ("get_act_patch_mlp_out", "blocks.*.mlp.output", ["places"]),
    ],
)
def test_patching_is_theirs(models, texts, named, site, by):
    from transformer_lens import patching

    ours, hooked = models
    clean, corrupted = texts
    _, cache = hooked.run_with_cache(clean)
    expected = getattr(patching, named)(hooked, corrupted, cache, lambda logits: score(logits).mean())
    found = patch_effects(ours, clean, corrupted, score, site, by)
    moved = (expected - score(ours(corrupted)).mean()).abs().max()
    assert moved > 0.01  # there is something to compare
    torch.testing.assert_close(
        torch.tensor(found["score"].to_numpy()).float(), expected.flatten(), rtol=1e-5, atol=1e-5
    )
