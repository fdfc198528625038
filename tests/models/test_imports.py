"""Checkpoints in our own stack: the logits of transformers within 1e-8, in float64."""

from __future__ import annotations

import inspect

import pytest
import torch

from contextlab.errors import InputError
from contextlab.models import Model, load
from contextlab.ops import rope_frequencies

from .checkpoints import V, checkpoint, exactly

transformers = pytest.importorskip("transformers", minversion="5")

NORM_BY_GROUP = (
    "group_size" in inspect.signature(transformers.models.mamba2.modeling_mamba2.MambaRMSNormGated).parameters
)

CASES = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "attention_bias": True}),
    ("llama", {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    (
        "qwen3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    ("mistral", {}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("gemma", {}),
    ("gemma", {"tie_word_embeddings": False, "head_dim": 16}),
    ("qwen3", {}),
    ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("mamba", {}),
    ("mamba", {"tie_word_embeddings": False, "expand": 1, "time_step_rank": 5}),
    ("mamba2", {}),
    ("mamba2", {"n_groups": 1, "tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_logits_are_those_of_transformers(kind, changes, tmp_path, monkeypatch):
    if kind == "mamba2" and changes.get("n_groups") != 1 and not NORM_BY_GROUP:
        pytest.skip("this release of transformers normalizes all groups of Mamba-2 together, unlike the paper's code")
    theirs = checkpoint(kind, tmp_path, **changes)
    ours = load(tmp_path, native=True)
    assert isinstance(ours, Model)
    added = 0
    if kind == "qwen2":  # a bias of zeros after the heads
        added = 2 * ours.spec.width
    if kind == "gemma" and theirs.config.tie_word_embeddings:  # what is read in is scaled
        added = V * ours.spec.width
    assert ours.parameter_count == sum(p.numel() for p in theirs.parameters()) + added
    tokens = torch.randint(3, V, (2, 21), generator=torch.Generator().manual_seed(0))
    if "rope_parameters" in changes:  # they keep the frequencies in float32, which shows beyond 1e-8 (test_position)
        mixer = ours.blocks[0].mixer
        exact, _ = rope_frequencies(mixer.rotary, mixer.rope_base, mixer.rope_scaling)
        torch.testing.assert_close(theirs.model.rotary_emb.inv_freq.double(), exact, rtol=1e-6, atol=0)
        theirs.model.rotary_emb.inv_freq = exact
    with torch.no_grad(), exactly(monkeypatch):
        expected = theirs(tokens, use_cache=False).logits
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-8)
        first, state = ours.read(tokens[:, :13])
        second, _ = ours.read(tokens[:, 13:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), expected, rtol=0, atol=1e-8)
    # Written on from the state, greedily: the ids that the logits of whole sequences give.
    written, line = ours.generate(tokens[:, :13], 4), tokens[:, :13]
    with torch.no_grad(), exactly(monkeypatch):
        for _ in range(4):
            line = torch.cat([line, theirs(line, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, line[:, 13:])


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "gpt2",
            {},
            r"'gpt2' cannot be imported natively \(known: gemma, llama, mamba, mamba2, mistral, qwen2, qwen3\)",
        ),
        ("llama", {"mlp_bias": True}, r"mlp_bias = True cannot be imported natively \(only False\); leave out"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary positions of type 'dynamic'",
        ),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu' cannot be imported natively"),
        ("mamba", {"use_bias": True}, "use_bias = True cannot be imported natively"),
    ],
)
def test_what_cannot_be_imported_is_refused(kind, changes, message, tmp_path):
    checkpoint(kind, tmp_path, torch.float32, **changes)
    with pytest.raises(InputError, match=message):
        load(tmp_path, native=True)
    load(tmp_path)  # through transformers it runs
