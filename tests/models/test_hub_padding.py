"""Rows of unequal length in transformers' models: each is answered as it is alone, whatever the model makes of padding.

What a soak test finds for all types is held here for one type of each way that a model may go wrong.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from contextlab.errors import InputError
from contextlab.models.hub_model import HuggingFaceModel
from contextlab.models.hub_state import HuggingFaceState, RaggedState
from contextlab.policies import build_policy

from .checkpoints import CONFIGS, reference

transformers = pytest.importorskip("transformers", minversion="5")

V = 31
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {
    **{"vocab_size": V, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    **{"max_position_embeddings": 24, "is_decoder": True, **ENDS},
}
ENCODER = {
    **{"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    **{"max_position_embeddings": 24, "is_decoder": True, "bos_token_id": 1, "eos_token_id": 2},
}
APART = {
    "places without position_ids": ("bart", {**DECODER, "is_encoder_decoder": False}),
    "places from the ids": ("roberta", {**ENCODER, "pad_token_id": 1}),
    "places turn values": ("roformer", {**ENCODER, "embedding_size": 32, "rotary_value": True, "pad_token_id": 0}),
    "no mask": ("xlstm", CONFIGS["xlstm"]),
    "mask not heeded, one row at a time": ("rwkv", CONFIGS["rwkv"]),
    "float64 masks that softmax in float32 takes for -inf": ("gemma2", CONFIGS["gemma2"]),
    "a rotation stretched by the batch": (
        "llama",
        {
            **CONFIGS["llama"],
            "rope_parameters": {
                **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8},
                **{"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]},
            },
        },
    ),
}
TOGETHER = {kind: (kind, CONFIGS[kind]) for kind in ("llama", "mamba2", "jamba")}


def built(way):
    kind, config = {**APART, **TOGETHER}[way]
    if way == "mamba2":  # of float64 without attention it is not known that nothing is masked
        return HuggingFaceModel(reference(kind, torch.float32))
    model = reference(kind, **config) if kind in CONFIGS else other(kind, config)
    if kind == "gemma2":
        model.set_attn_implementation("eager")  # older releases take another by default, which needs no care
    return HuggingFaceModel(model)


def other(kind, config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.double().eval()


def rows(side, lengths, longest):
    """Tokens alone, the same as a padded batch, and its mask."""
    tokens = torch.randint(3, V, (len(lengths), longest + 1), generator=torch.Generator().manual_seed(0))
    real, place = torch.tensor(lengths)[:, None], torch.arange(longest)
    mask = place >= longest - real if side == "left" else place < real
    batch = torch.zeros(len(lengths), longest, dtype=torch.int64)
    batch[mask] = tokens[:, :-1][place < real]
    return tokens, batch, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("way", [*APART, *TOGETHER])
@torch.no_grad()
def test_each_row_is_answered_as_alone(way, side):
    model, lengths = built(way), [7, 12, 7]
    tokens, batch, mask = rows(side, lengths, 12)
    atol = 2e-5 if way == "mamba2" else 2e-6
    alone = [model.read(row[None, :n]) for row, n in zip(tokens, lengths, strict=True)]
    expected = torch.cat([logits[0] for logits, _ in alone])
    torch.testing.assert_close(model(batch, mask)[mask], expected, rtol=0, atol=atol)
    logits, state = model.read(batch, mask=mask)
    assert isinstance(state, RaggedState if way in APART else HuggingFaceState)
    assert state.length == 12
    torch.testing.assert_close(logits[mask], expected, rtol=0, atol=atol)
    following = torch.stack([row[n : n + 1] for row, n in zip(tokens, lengths, strict=True)])
    due = torch.cat([model.read(following[[i]], after)[0] for i, (_, after) in enumerate(alone)])
    torch.testing.assert_close(model.read(following, state)[0], due, rtol=0, atol=atol)
    order = torch.tensor([1, 0, 1, 2])
    picked = state.select(order)
    torch.testing.assert_close(model.read(following[order], picked)[0], due[order], rtol=0, atol=atol)
    torch.testing.assert_close(model.read(following, state)[0], due, rtol=0, atol=atol)  # the state is still good
    written = torch.cat([model.generate(row[None, :n], 3) for row, n in zip(tokens, lengths, strict=True)])
    assert torch.equal(model.generate(batch, 3, mask=mask), written)


@pytest.mark.parametrize("way", [*APART, *TOGETHER])
@torch.no_grad()
def test_left_padding_in_pieces_leaves_the_state_as_it_was(way):
    """Cuts within the padding and behind it, pieces that are padding only, single tokens."""
    model, lengths = built(way), [7, 10]
    tokens, batch, mask = rows("left", lengths, 12)
    sizes = [1, 1, 2, 1, 4, 3]
    read, state = [], None
    for piece, there in zip(batch.split(sizes, 1), mask.split(sizes, 1), strict=True):
        logits, state = model.read(piece, state, there)
        read.append(logits)
    together = torch.cat(read, 1)
    for row, (n, cut) in enumerate([(7, [4, 3]), (10, [2, 1, 4, 3])]):  # the pieces that each row has
        alone, after = [], None
        for piece in tokens[row : row + 1, :n].split(cut, 1):
            logits, after = model.read(piece, after)
            alone.append(logits)
        torch.testing.assert_close(
            together[row, 12 - n :], torch.cat(alone, 1)[0], rtol=0, atol=2e-5, check_dtype=False
        )
    assert state.start.tolist() == [5, 2]


@pytest.mark.parametrize("way", ["places without position_ids", "places from the ids", "llama"])
def test_packed_documents_are_answered_as_alone(way):
    """Forward and backward, from `cu_seqlens` and from `position_ids`."""
    model = built(way)
    ends, (_, batch, _) = [0, 5, 6, 6, 12], rows("left", [12], 12)
    documents = list(pairwise(ends))
    weight = next(model.parameters())
    alone = torch.cat([model(batch[:, a:b]) for a, b in documents if b > a], 1)
    due = torch.autograd.grad(alone.square().sum(), weight)[0]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    places = torch.cat([torch.arange(b - a) for a, b in documents])[None]
    for how in ({"cu_seqlens": cu_seqlens}, {"position_ids": places}):
        packed = model(batch, **how)
        torch.testing.assert_close(packed, alone, rtol=0, atol=1e-9)
        found = torch.autograd.grad(packed.square().sum(), weight)[0]
        torch.testing.assert_close(found, due, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        read, state = model.read(batch, cu_seqlens=cu_seqlens)
        torch.testing.assert_close(read, alone, rtol=0, atol=1e-9)
        following = torch.tensor([[3], [4], [5], [6]])
        after, _ = model.read(following, state)
        for row, (a, b) in enumerate(documents):
            expected = model(torch.cat([batch[:, a:b], following[row : row + 1]], 1))[0, -1]
            torch.testing.assert_close(after[row, 0], expected, rtol=0, atol=1e-9)


def test_gradients_pass_through_ragged_rows():
    model = built("places without position_ids")
    tokens, batch, mask = rows("left", [3, 6], 6)
    weight = next(model.parameters())
    alone = sum(model(tokens[i : i + 1, :n]).square().sum() for i, n in enumerate([3, 6]))
    due = torch.autograd.grad(alone, weight)[0]
    for logits in (model(batch, mask), model.read(batch, mask=mask)[0]):
        torch.testing.assert_close(torch.autograd.grad(logits[mask].square().sum(), weight)[0], due)


@torch.no_grad()
def test_ragged_states_hold_what_their_rows_hold():
    model = built("places without position_ids")
    _, batch, mask = rows("right", [3, 6], 6)
    _, state = model.read(batch, mask=mask)
    assert state.nbytes == model.state_nbytes(3) + model.state_nbytes(6)
    moved = state.to(torch.float32)
    assert next(moved.tensors()).dtype == torch.float32
    with pytest.raises(InputError, match="row 0 has padding after tokens that were read before"):
        model.read(batch, state, mask)
    with pytest.raises(InputError, match="the state has 2 rows, the tokens have 3"):
        model.read(torch.zeros(3, 1, dtype=torch.int64), state)


def test_models_that_read_both_ways_are_refused():
    with pytest.raises(InputError, match="bert: the model reads both ways.*expected a configuration with is_decoder"):
        HuggingFaceModel(other("bert", {**ENCODER, "is_decoder": False, "pad_token_id": 0}))


@torch.no_grad()
def test_places_are_told_where_a_model_would_begin_again_at_zero():
    """Bamba counts from 0 in every piece: 5e-3 off unless it is told."""
    config = {
        **{"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "intermediate_size": 48, "attn_layer_indices": [1], "mamba_d_state": 8},
        **{"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8, **ENDS},
    }
    model = HuggingFaceModel(other("bamba", config))
    tokens = torch.randint(3, V, (2, 12), generator=torch.Generator().manual_seed(0))
    read, state = [], None
    for piece in tokens.split([5, 1, 4, 2], 1):
        logits, state = model.read(piece, state)
        read.append(logits)
    torch.testing.assert_close(torch.cat(read, 1), model(tokens), rtol=0, atol=2e-6)


@pytest.mark.parametrize("way", ["places from the ids", "a rotation stretched by the batch", "llama"])
@torch.no_grad()
def test_a_policy_keeps_of_each_row_what_it_keeps_of_it_alone(way):
    """In `forward`, `read` and after `apply`; parts of a ragged state are each compressed."""
    model, lengths, policy = built(way), [9, 12, 9], build_policy("key_norm", budget="6tok", sinks=1, window=2)
    tokens, batch, mask = rows("left", lengths, 12)
    each = list(zip(tokens, lengths, strict=True))
    following = torch.stack([row[n : n + 1] for row, n in each])
    plain = model.read(batch, mask=mask)[1]
    compressed, alone = policy.apply(plain, model), [policy.apply(model.read(r[None, :n])[1], model) for r, n in each]
    with policy.attach(model):
        whole = torch.cat([model(row[None, :n])[0] for row, n in each])
        torch.testing.assert_close(model(batch, mask)[mask], whole, rtol=0, atol=1e-6)
        after = [model.read(row[None, :n])[1] for row, n in each]
        for states, state in ((after, model.read(batch, mask=mask)[1]), (alone, compressed)):
            due = torch.cat([model.read(following[[i]], own)[0] for i, own in enumerate(states)])
            torch.testing.assert_close(model.read(following, state)[0], due, rtol=0, atol=1e-6)
