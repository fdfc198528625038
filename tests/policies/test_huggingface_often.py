"""Policies at modules of transformers that attend or run several times in a forward, or call torch's attention."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.evaluation.compress import compress
from contextlab.models import HuggingFaceModel
from contextlab.policies import build_policy
from contextlab.policies.huggingface_parts import answers, beside_zeros, in_a_row
from contextlab.testing.policy_readings import read
from tests.policies.test_huggingface import compressed_afterwards, other, padding, tokens

transformers = pytest.importorskip("transformers", minversion="5")

MODELS: dict[str, dict[str, Any]] = {
    "diffllama": {"num_key_value_heads": 2},
    "diffllama of many heads": {"num_key_value_heads": 4},
    "hrm_text": {"num_layers_per_stack": 2, "H_cycles": 2, "L_cycles": 2, "num_hidden_layers": 12, "head_dim": 8},
    "dory": {
        "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1,
        "n_recurrent_layers": 2, "n_recurrent_loops": 3, "recurrent_kv_cache_mode": "per_loop", "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16,
        "attention_hidden_size": 64, "mamba_d_state": 8, "mamba_dt_rank": 4, "n_mamba_heads": 2,
        "num_key_value_heads": 4,
    },
    "falcon": {"multi_query": True},
    "falcon with groups": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
}  # fmt: skip
TOKEN = {"diffllama": 2 * 2 * 2 * 8 * 8, "falcon": 2 * 2 * 8 * 8, "hrm_text": 12 * 4 * 2 * 8 * 8}
"""Bytes that the model itself holds of a token."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    with torch.no_grad():
        yield


@functools.cache
def model(kind: str) -> HuggingFaceModel:
    """float64."""
    name = kind.split()[0]
    if name not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return HuggingFaceModel(other(name, **MODELS[kind]))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", ["h2o", "ada_kv", "quest", "streaming_llm", "chai"])
def test_a_policy_with_room_for_all_changes_nothing(kind: str, name: str) -> None:
    if name == "chai" and kind in ("diffllama", "falcon"):
        pytest.skip("one key head for a policy, so none to drop")
    reader, x = model(kind), tokens(36)
    mask = padding(x)
    expected, plain, _ = read(reader, x, [20, 12], mask)
    for told in (None, mask):
        without = reader(x, told)
        with build_policy(name, **({"tokens": 36} if name == "chai" else {})).attach(reader):
            without_state = reader(x, told)
            got, state, _ = read(reader, x, [20, 12], told)
        real = torch.ones_like(x).bool() if told is None else told
        torch.testing.assert_close(without_state[real], without[real], rtol=0, atol=1e-6)
        if told is not None:
            torch.testing.assert_close(got[mask], expected[mask], rtol=0, atol=1e-6)
    assert state.length == plain.length == 36
    names = {"visits", "notes", "call", "kept", "forward"}
    assert not any(names & set(vars(each)) or getattr(each, "served", None) for each in reader.modules())
    torch.testing.assert_close(read(reader, x, [20, 12], mask)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", TOKEN)
def test_a_budget_is_of_what_the_model_holds(kind: str) -> None:
    reader, x = model(kind), tokens(100, batch=1)
    _, full = reader.read(x)
    assert full.nbytes == 100 * TOKEN[kind] + 8  # and the row's padding
    for name in ("h2o", "keydiff", "pyramid_kv"):
        for budget, asked in (("50%", 50 * TOKEN[kind]), (f"{40 * TOKEN[kind]}B", 40 * TOKEN[kind])):
            with build_policy(name, budget=budget, window=4).attach(reader):
                _, state = reader.read(x)
            layers = 12 if kind == "hrm_text" else 2
            assert asked - max(0.01 * asked, TOKEN[kind] + 12 * layers) <= state.nbytes - 8 <= asked, (name, budget)
    with build_policy("quantize", bits=8, group=8, window=0).attach(reader):
        _, state = reader.read(x[:, :96])
    assert state.nbytes < 0.5 * full.nbytes


@pytest.mark.parametrize("kind", MODELS)
def test_a_state_that_was_read_without_it_is_compressed(kind: str) -> None:
    reader = model(kind)
    policy, kept, state = compressed_afterwards(reader, tokens())
    held = [[left.positions for _, left in policy.states(reader, each)] for each in (kept, state)]
    assert all(torch.equal(one, two) for one, two in zip(*held, strict=True))


@pytest.mark.parametrize("name", ["h2o", "streaming_llm"])
def test_the_two_answers_are_of_the_keys_that_are_left(name: str) -> None:
    """Of one layer, by diffllama's own attention under a mask that says for each head which tokens are kept."""
    reader = HuggingFaceModel(other("diffllama", num_key_value_heads=2, num_hidden_layers=1))
    x = tokens()
    policy = build_policy(name, budget="24tok", window=4, **({"sinks": 4} if name == "streaming_llm" else {}))
    with policy.attach(reader):
        _, before = reader.read(x[:, :39])
        got, state = reader.read(x[:, 39:], before)
    (_, left), *rest = policy.states(reader, state)
    assert not rest
    assert left.positions.shape[1] == 1
    held = torch.zeros(2, 1, 40).scatter(2, left.positions.long(), 1.0).bool()
    seen = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    seen[:, :, -1] = held
    expected = reader.model(x, attention_mask=seen).logits[:, -1:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "parts"), [(4, 2, 2), (12, 6, 3), (4, 4, 2), (8, 4, 4)])
def test_heads_that_share_their_values_are_one(heads: int, kv_heads: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int, size: int) -> Tensor:
        return torch.randn(2, count, 5, size, dtype=torch.float64, generator=generator)

    query, key, values = drawn(heads, 4), drawn(kv_heads, 4), drawn(kv_heads, 3)

    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
        future = torch.ones(5, 5, dtype=torch.bool).triu(1)
        return ((q @ k.mT).masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2)

    fewer = kv_heads // parts
    y = attended(beside_zeros(query, fewer, parts), in_a_row(key, parts), in_a_row(values, parts))
    for got, own in zip(answers(y, fewer, parts), values.chunk(parts, 1), strict=True):
        torch.testing.assert_close(got, attended(query, key, own.repeat(1, parts, 1, 1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["diffllama", "hrm_text"])
def test_positions_are_changed_as_the_model_turns_them(kind: str) -> None:
    """With all kept, tokens that take the positions that they have among those kept keep their own."""
    reader, x = model(kind), tokens()
    assert all(layer.turn is not None for layer in build_policy("h2o").layers(reader))
    with build_policy("streaming_llm", budget="20tok", every=1, reposition=True).attach(reader):
        whole, _ = reader.read(x)
        pieces, _, _ = read(reader, x, [20])
    torch.testing.assert_close(whole[:, :20], reader(x[:, :20]), rtol=0, atol=1e-6)
    assert bool(pieces.isfinite().all())


def test_compress_measures_it() -> None:
    found = compress(model("diffllama"), ["h2o:window=4"], ["50%"], ["mqar"], [96], prompts=2)
    size = found[found["metric"] == "state_bytes"].groupby("split")["value"].first()
    assert size.drop("full").iloc[0] <= 0.5 * size["full"] + 16


def test_a_second_policy_is_refused_where_layers_run_several_times() -> None:
    reader = model("hrm_text")
    with build_policy("h2o").attach(reader), pytest.raises(InputError, match="attached to this model already"):
        build_policy("snapkv").attach(reader).__enter__()


def test_torchs_own_attention_is_that_of_plain_causal_modules() -> None:
    reader, x = model("falcon"), tokens()
    layer = build_policy("h2o").layers(reader)[0]
    assert (layer.heads, layer.kv_heads, layer.key_dim, layer.turn is not None) == (4, 1, 8, True)
    with pytest.raises(InputError, match="FalconAttention adds ALiBi to its scores by itself"):
        build_policy("h2o").layers(HuggingFaceModel(other("falcon", alibi=True)))
    with build_policy("h2o").attach(reader), pytest.raises(InputError, match="plain causal attention; packed"):
        mask = torch.ones(40, 40, dtype=torch.bool).tril().triu(-5).expand(2, 1, -1, -1)
        reader.model(x, attention_mask=mask)
    eager = HuggingFaceModel(other("falcon", attn_implementation="eager"))
    with pytest.raises(InputError, match="set attn_implementation='sdpa'"):
        build_policy("h2o").layers(eager)


@pytest.mark.parametrize("change", ["queries", "values"])
def test_calls_that_differ_in_more_are_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.diffllama import modeling_diffllama as theirs

    reader, x = HuggingFaceModel(other("diffllama", num_key_value_heads=2)), tokens()
    chunk = torch.chunk
    if change == "values":  # both calls get the first half
        monkeypatch.setattr(theirs.torch, "chunk", lambda y, n, dim: [chunk(y, n, dim)[0]] * n)
    else:
        interface = theirs.ALL_ATTENTION_FUNCTIONS.get_interface

        def get(*given: Any) -> Any:
            calls: list[int] = []

            def attend(module: Any, query: Tensor, *rest: Any, **options: Any) -> Any:
                calls.append(1)
                return interface(*given)(module, query * len(calls), *rest, **options)

            return attend

        monkeypatch.setattr(theirs.ALL_ATTENTION_FUNCTIONS, "get_interface", get, raising=False)
    refused = pytest.raises(InputError, match="calls attention more than once in a forward")
    with refused, build_policy("h2o").attach(reader):
        reader.read(x)
