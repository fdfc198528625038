"""Policies at transformers models: what they keep, that is what they keep of our own import of the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab import registry
from contextlab.errors import InputError
from contextlab.models import HuggingFaceModel, build_model, load
from contextlab.ops.kv import KVLayer
from contextlab.policies import Locret, Policy, StreamingLLM, build_policy, parse_policy, takes_budget
from contextlab.testing.policy_readings import read
from tests.models.checkpoints import BASE, CONFIGS, ENDS, V, cache_of, checkpoint, reference, with_cache
from tests.policies.core.test_base import Constant

transformers = pytest.importorskip("transformers", minversion="5")

SERVED = ("gpt2", "llama", "qwen2", "qwen3", "gemma", "qwen3_next", "jamba")
POLICIES = ("streaming_llm", "h2o", "snapkv")
PADS = (0, 7)
CHANNELS = ("hash_evict",)  # random directions know the order of a key's channels, which our import changes


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.no_grad():
        yield


def tokens(length: int = 40, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(3, V, (batch, length), generator=torch.Generator().manual_seed(seed))


def compressed_afterwards(reader: HuggingFaceModel, x: Tensor) -> tuple[Policy, Any, Any]:
    """A policy, a state of 36 tokens compressed after it was read, and that read under it: they answer alike."""
    policy = build_policy("keydiff", budget="50%", window=4)
    _, plain = reader.read(x[:, :36])
    kept = policy.apply(plain, reader)
    with policy.attach(reader):
        _, state = reader.read(x[:, :36])
        expected, _ = reader.read(x[:, 36:], state)
        got, _ = reader.read(x[:, 36:], kept)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    return policy, kept, state


def other(kind: str, **changes: Any) -> Any:
    """`reference` of a type that the checkpoints of other tests do not have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CONFIGS, kind, CONFIGS.get(kind, {**BASE, **ENDS}))
        return reference(kind, **changes)


def padding(x: Tensor, pads: tuple[int, ...] = PADS) -> Tensor:
    return torch.arange(x.shape[1]) >= torch.tensor(pads)[:, None]


def written(model: Any, x: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    mask = torch.ones_like(x) if mask is None else mask.long()
    given = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True, **options}
    return model.generate(x, attention_mask=mask, **given)


@pytest.mark.parametrize(
    ("kind", "name"), [*((kind, "h2o") for kind in SERVED), ("llama", "streaming_llm"), ("llama", "snapkv")]
)
def test_a_full_budget_changes_nothing(kind: str, name: str) -> None:
    model, x = reference(kind), tokens()
    for mask in (None, padding(x)):
        expected = model(x, attention_mask=None if mask is None else mask.long()).logits
        plain = written(model, x, mask)
        with build_policy(name).attach(model):
            got = model(x, attention_mask=None if mask is None else mask.long()).logits
            kept = written(model, x, mask)
        real = torch.ones_like(x).bool() if mask is None else mask
        torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-7)
        assert torch.equal(kept.sequences, plain.sequences)
        held = [layer.state for layer in cache_of(kept).layers if hasattr(layer, "state")]
        assert held
        assert all(state.slots.used == state.length == 48 for state in held)


@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "streaming_llm"), ("llama", "h2o"), ("llama", "snapkv"), ("qwen3", "h2o")]
)
@pytest.mark.parametrize("reposition", [False, True])
def test_it_keeps_what_it_keeps_of_our_import_of_the_weights(
    kind: str, name: str, reposition: bool, tmp_path: Any
) -> None:
    checkpoint(kind, tmp_path)
    theirs, ours = load(tmp_path), load(tmp_path, native=True)
    x = tokens(50)
    for budget in ("20tok", "50%", "40kB"):
        policy = build_policy(name, budget=budget, window=4, reposition=reposition)
        with policy.attach(theirs), policy.attach(ours):
            y, state, sizes = read(theirs, x, [25, 10], padding(x))
            expected, native, _ = read(ours, x, [25, 10], padding(x))
        assert state.nbytes == native.nbytes == sizes[-1]
        assert state.length == 50
        for mine, other in zip(state.leaves, native.layers, strict=True):
            assert torch.equal(mine.positions, other.positions)
        torch.testing.assert_close(y[padding(x)], expected[padding(x)], rtol=0, atol=1e-5)


def registered() -> list[Any]:
    """Those that serve without having been shown a text or trained."""
    return [pytest.param(entry, id=entry.name) for entry in registry.entries("policy") if entry.cases]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A Llama run by transformers, and our import of its weights."""
    transformers.logging.disable_progress_bar()
    folder = tmp_path_factory.mktemp("llama")
    checkpoint("llama", folder)
    return load(folder), load(folder, native=True)


@pytest.mark.parametrize("entry", registered())
def test_every_policy_does_what_it_does_to_our_import(entry: registry.Entry, both: tuple[Any, Any]) -> None:
    known = {p.name for p in entry.parameters}
    options = {"window": 4, **entry.cases[0], "budget": "16tok"}
    policy = entry.build(**{name: value for name, value in options.items() if name in known})
    theirs, ours = both
    x = tokens(30)
    with policy.attach(theirs), policy.attach(ours):
        y, state, _ = read(theirs, x, [20])
        expected, native, _ = read(ours, x, [20])
    assert state.length == 30
    # Ours holds no padding of the whole beside those of the layers, unless layers share one.
    assert abs(state.nbytes - native.nbytes) <= 16
    if entry.name not in CHANNELS:
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("name", POLICIES)
def test_the_budget_is_never_exceeded(kind: str, name: str) -> None:
    x, heads = tokens(60), 4 if kind == "gpt2" else 2
    model = HuggingFaceModel(reference(kind))
    full = 2 * 2 * heads * (8 + 8) * 8  # rows, layers, heads, key and value, bytes: of each token
    lengths = [30, 40, *range(41, 61)]
    for budget, allowed in (("50%", [full * n // 2 for n in lengths]), ("50kB", [50_000] * 22)):
        with build_policy(name, budget=budget, window=4).attach(model):
            _, state, sizes = read(model, x, [30, 10], padding(x))
        assert all(size <= most for size, most in zip(sizes, allowed, strict=True)), (sizes, allowed)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state.tensors()}
        assert state.nbytes == sum(storages.values())
        assert state.nbytes > 0.5 * allowed[-1]


def test_an_older_state_stays_valid() -> None:
    model, x = HuggingFaceModel(reference("llama")), tokens(54)
    with build_policy("h2o", budget="24tok", window=4).attach(model):
        _, before, _ = read(model, x[:, :33], [30])
        kept = before.map(Tensor.clone)
        first = _on(model, x[:, 33:44], before)
        other = _on(model, x[:, 44:54], before)
        torch.testing.assert_close(_on(model, x[:, 33:44], before), first, rtol=0, atol=0)
        torch.testing.assert_close(_on(model, x[:, 44:54], kept), other, rtol=0, atol=1e-12)
        chosen = _on(model, x[:, 33:44].flip(0), before.select(torch.tensor([1, 0]))).flip(0)
    torch.testing.assert_close(chosen, first, rtol=0, atol=1e-12)


def _on(model: Any, x: Tensor, state: Any) -> Tensor:
    outputs = []
    for t in range(x.shape[1]):
        y, state = model.read(x[:, t : t + 1], state)
        outputs.append(y)
    return torch.cat(outputs, 1)


def test_pieces_give_what_the_policy_says() -> None:
    model, x = reference("llama"), tokens()
    with build_policy("streaming_llm", budget="24tok", every=1).attach(model):
        whole = written(model, x)
        pieces = written(model, x, prefill_chunk_size=7)
    assert torch.equal(whole.sequences, pieces.sequences)
    for one, other in zip(cache_of(whole).layers, cache_of(pieces).layers, strict=True):
        torch.testing.assert_close(one.state.slots["keys"], other.state.slots["keys"], rtol=0, atol=1e-12)


def test_a_batch_gives_what_each_row_gives_alone() -> None:
    model, x = reference("qwen2"), tokens(40, batch=3)
    pads = (0, 5, 19)
    with build_policy("h2o", budget="24tok", window=4).attach(model):
        together = written(model, x, padding(x, pads), output_logits=True)
        for row, pad in enumerate(pads):
            alone = written(model, x[row : row + 1, pad:], output_logits=True)
            for a, b in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(a[row], b[0], rtol=0, atol=1e-5)


def test_beams_carry_their_states_along() -> None:
    """Every beam is what reading its own tokens gives, though beams change rows of the cache while decoding."""
    model, x = reference("llama"), tokens()
    policy = build_policy("streaming_llm", budget="24tok", every=1)
    plain = written(model, x, num_beams=4, num_return_sequences=4)
    with build_policy("h2o").attach(model):
        assert torch.equal(written(model, x, num_beams=4, num_return_sequences=4).sequences, plain.sequences)
    with policy.attach(model):
        found = written(model, x, num_beams=4, num_return_sequences=4, output_scores=True)
        logits = model(found.sequences).logits[:, 39:-1].log_softmax(-1)
        scores = logits.gather(2, found.sequences[:, 40:, None]).sum((1, 2)) / 9
    torch.testing.assert_close(found.sequences_scores, scores.to(found.sequences_scores), rtol=0, atol=1e-5)


def test_a_cache_is_copied_repeated_and_selected() -> None:
    model, x = reference("llama"), tokens()
    with build_policy("h2o", budget="24tok", window=4).attach(model):
        cache = cache_of(model(x, use_cache=True))
        more = copy.deepcopy(cache)
        more.batch_repeat_interleave(2)
        assert (more.get_seq_length(), more.layers[0].state.slots.used) == (40, 24)
        next_one = model(x[:, :1].repeat_interleave(2, 0), **with_cache(model, more)).logits
        more.batch_select_indices(torch.tensor([3, 0]))
        after = model(x[:, 1:2].flip(0), **with_cache(model, more)).logits
        expected = model(x[:, :1], **with_cache(model, cache)).logits
        torch.testing.assert_close(next_one[::2], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            after, model(x[:, 1:2], **with_cache(model, cache)).logits.flip(0), rtol=0, atol=1e-12
        )
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(x, **with_cache(model, cache)).logits
    torch.testing.assert_close(again, model(x).logits, rtol=0, atol=1e-7)


SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen2", {**SLIDING, "use_sliding_window": True}),
        ("gemma3_text", {**SLIDING, "head_dim": 8}),
        ("gemma2", {**SLIDING, "attn_logit_softcapping": None}),
    ],
)
def test_layers_with_a_window_are_left_to_their_own_cache(kind: str, changes: dict[str, Any]) -> None:
    # float32: in float64 the masks of transformers' eager attention give NaN at padding
    model, x = other(kind, dtype=torch.float32, num_key_value_heads=2, **changes), tokens()
    mask = padding(x)
    plain = written(model, x, mask)
    expected = model(x, attention_mask=mask.long()).logits[mask]
    with build_policy("h2o").attach(model):
        torch.testing.assert_close(model(x, attention_mask=mask.long()).logits[mask], expected, rtol=0, atol=1e-5)
        assert torch.equal(written(model, x, mask).sequences, plain.sequences)
    with build_policy("h2o", budget="24tok", window=4, reposition=True).attach(model):
        layers = cache_of(written(model, x, mask)).layers
    assert layers[0].keys.shape[2] == 5
    assert layers[1].state.slots.used <= 24
    assert layers[1].state.slots["position"].max() == 47


class First(StreamingLLM):
    """Leaves all layers but the first alone."""

    def at(self, layer: KVLayer) -> Policy | None:
        return self if layer.index == 0 else None


def test_layers_that_a_policy_leaves_alone_keep_everything() -> None:
    model, x = reference("llama"), tokens()
    mask = padding(x)
    with First("100%").attach(model):
        full = written(model, x, mask)
    assert torch.equal(full.sequences, written(model, x, mask).sequences)
    with First("24tok").attach(model):
        one, other = cache_of(written(model, x, mask)).layers
    assert (one.state.slots.used, other.state.keys.shape[2] >= 48) == (24, True)


def test_our_own_models_under_transformers_are_served_within() -> None:
    from contextlab.models.pretrained import ContextlabForCausalLM

    spec = {"width": 32, "depth": 2, "heads": 4, "input_size": V, "output_size": V, "read_in": "token"}
    model = ContextlabForCausalLM.of(build_model({"position": "rope", **spec}, seed=0).eval())
    x = tokens()
    with build_policy("h2o").attach(model):
        full = written(model, x).sequences
    assert torch.equal(full, written(model, x).sequences)
    with build_policy("h2o", budget="24tok", window=4).attach(model):
        cache = cache_of(written(model, x))
    assert [layer.slots.used <= 24 for layer in cache.state.layers] == [True, True]
    assert cache.get_seq_length() == 48


def test_a_state_is_compressed_after_reading(tmp_path: Any) -> None:
    checkpoint("llama", tmp_path)
    model, ours, x = load(tmp_path), load(tmp_path, native=True), tokens()
    policy, mask = build_policy("streaming_llm", budget="24tok", every=1), padding(x)
    state, native = model.read(x, mask=mask)[1], ours.read(x, mask=mask)[1]
    before = model.read(x[:, :1], state)[0]
    kept, expected = policy.apply(state, model), policy.apply(native, ours)
    assert kept.nbytes == expected.nbytes - 16 < state.nbytes  # one padding of 2 rows for both layers
    with policy.attach(model), policy.attach(ours):
        torch.testing.assert_close(model.read(x[:, :1], kept)[0], ours.read(x[:, :1], expected)[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.read(x[:, :1], state)[0], before, rtol=0, atol=0)
    for given, message in ((kept, "read without"), (object(), "expected the state of a Hugging Face model")):
        with pytest.raises(InputError, match=message):
            policy.apply(given, model)
    with pytest.raises(InputError, match="HuggingFaceModel"):
        policy.apply(cache_of(model.model(x, use_cache=True)), model.model)


def test_it_leaves_no_trace() -> None:
    model, x = reference("llama"), tokens()
    expected = model(x).logits
    with build_policy("h2o", budget="24tok", window=4).attach(model):
        assert model.config._attn_implementation == "contextlab_sdpa"
        cache = cache_of(model(x, use_cache=True))
        with pytest.raises(InputError, match="attached to this model already"), build_policy("h2o").attach(model):
            pass
    assert model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=0)
    with pytest.raises(InputError, match="a KeptState was left by a policy; attach that policy"):
        model(x[:, :1], **with_cache(model, cache))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_any_attention_of_the_model_is_put_back(implementation: str) -> None:
    model, x = reference("qwen2", **SLIDING, use_sliding_window=True), tokens()
    model.set_attn_implementation(implementation)
    expected = model(x).logits
    with build_policy("snapkv").attach(model):
        torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-6)
    assert model.config._attn_implementation == implementation


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("mamba", "needs a model with a KV state.*MambaMixer"),
        ("mistral", "all of its attention layers have windows"),
        ("rwkv", "needs a model with a KV state.*RwkvForCausalLM"),
        ("bloom", "BloomAttention computes attention by itself"),
        ("gpt_neo", "GPTNeoSelfAttention computes attention by itself"),
    ],
)
def test_models_that_cannot_be_served_are_refused(kind: str, message: str) -> None:
    changes = {"attention_types": [[["global"], 2]]} if kind == "gpt_neo" else {}
    with pytest.raises(InputError, match=message), build_policy("h2o").attach(other(kind, **changes)):
        pass


SERVED_IN_PART = ("gpt_oss", "granite_swa", "falcon_h1", "minimax", "jetmoe")
"""Types with learned sinks, with recurrences beside attention or in other layers, and with repeated key heads."""


@pytest.mark.parametrize("kind", SERVED_IN_PART)
def test_layers_that_keep_all_are_served_and_others_left_alone(kind: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    from tests.soak.causal import model_of

    if kind not in known:
        pytest.skip(f"this release of transformers has no {kind}")
    model, x = model_of(kind), tokens() % 40 + 3
    plain = HuggingFaceModel(model)
    cut = [30]
    expected, before, _ = read(plain, x, cut)
    for text in ("h2o:window=4", "snapkv:window=4", "streaming_llm:window=4"):
        with parse_policy(text).attach(model):
            torch.testing.assert_close(read(plain, x, cut)[0], expected, rtol=0, atol=2e-6)
        policy = parse_policy(text, "24tok")
        with policy.attach(model):
            _, state, _ = read(plain, x, cut)
        kept = policy.states(plain, state)
        assert kept
        assert all(each.slots.used <= 24 and each.length == x.shape[1] for _, each in kept)
        assert state.nbytes < before.nbytes
    with build_policy("h2o").attach(model):
        found = written(model, x[:, :12], num_beams=2).sequences
    assert torch.equal(found, written(model, x[:, :12], num_beams=2).sequences)


def test_policies_that_attend_by_themselves_refuse_learned_sinks() -> None:
    from tests.soak.causal import model_of

    model = model_of("gpt_oss")
    for text in ("ada_kv:of=h2o", "quest:page=4,window=4"):
        with pytest.raises(InputError, match="learned sinks; h2o and snapkv do"), parse_policy(text).attach(model):
            pass
    x, reader = tokens() % 40 + 3, HuggingFaceModel(model)
    expected = reader(x)
    with parse_policy("quantize:bits=8,group=4,window=64").attach(model):  # all of it is in the window
        torch.testing.assert_close(reader.read(x)[0], expected, rtol=0, atol=1e-6)


def _right_padded(model: Any, x: Tensor) -> Any:
    return model(x, attention_mask=padding(x).flip(1).long())


def _packed(model: Any, x: Tensor) -> Any:
    return model(x, position_ids=torch.arange(20).repeat(2, 2), use_cache=False)


def _filled_before(model: Any, x: Tensor) -> Any:
    cache = transformers.DynamicCache(config=model.config)
    for layer in cache.layers:
        layer.update(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8))
    return model(x, **with_cache(model, cache))


def _offloaded(model: Any, x: Tensor) -> Any:
    cache = transformers.DynamicCache(config=model.config)
    cache.offloading = True  # set by hand, as a build of PyTorch for a GPU makes no such cache where there is none
    return model(x, **with_cache(model, cache))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda model, x: written(model, x, cache_implementation="static"), "serve a DynamicCache.*StaticLayer"),
        (_offloaded, "not offloaded"),
        (lambda model, x: written(model, x[:1], prompt_lookup_num_tokens=3), "be cropped"),
        (lambda model, x: model(x, attention_mask=torch.zeros(2, 1, 40, 40)), "expected \\[batch, tokens\\]"),
        (lambda model, x: model(x, attention_mask=torch.tensor([[0, 1]] * 2)), "expected all 40 tokens"),
        (_right_padded, "padding_side = 'left'"),
        (_packed, "packed sequences"),
        (_filled_before, "filled without this policy"),
        (lambda model, x: HuggingFaceModel(model).state_nbytes(10), "take state.nbytes"),
    ],
)
def test_what_a_policy_cannot_serve_is_refused_in_one_line(use: Callable[..., Any], message: str) -> None:
    model = reference("llama")
    refusal = ValueError if message == "be cropped" else InputError  # transformers 5.24 asks, and refuses it itself
    with build_policy("h2o", budget="24tok", window=4).attach(model), pytest.raises(refusal, match=message) as error:
        use(model, tokens())
    assert "\n" not in str(error.value)


def test_dropout_is_refused() -> None:
    model = reference("llama", attention_dropout=0.1).train()
    with build_policy("h2o").attach(model), pytest.raises(InputError, match=r"dropout; call model.eval\(\)"):
        model(tokens())


def test_attention_that_asks_no_interface_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that mentions the interface, but answers without it."""
    from transformers.models.llama import modeling_llama

    def forward(self: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        assert modeling_llama.ALL_ATTENTION_FUNCTIONS
        return hidden_states, None

    forward.__code__ = forward.__code__.replace(co_names=("ALL_ATTENTION_FUNCTIONS", *forward.__code__.co_names[1:]))
    model = reference("llama")
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    with build_policy("h2o").attach(model), pytest.raises(InputError, match="did not call the attention"):
        model(tokens())


YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0}}
LATENT = {
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8, "kv_lora_rank": 8, "q_lora_rank": None,
    "head_dim": 4, "first_k_dense_replace": 9, "n_routed_experts": 2, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 1, "num_key_value_heads": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        pytest.param("llama", {}, id="llama"),
        pytest.param("llama", {"max_position_embeddings": 128, **YARN}, id="yarn"),
        pytest.param("gemma3_text", {"layer_types": ["full_attention"]}, id="gemma3"),
        pytest.param("phi", {}, id="part-of-the-head"),
        pytest.param("glm", {"num_key_value_heads": 2, "head_dim": 8}, id="neighbours-in-pairs"),
        pytest.param("deepseek_v3", LATENT, id="last-of-the-head"),
    ],
)
def test_repositioned_keys_stand_where_they_would_without_the_dropped_tokens(
    kind: str, changes: dict[str, Any]
) -> None:
    """What is read next is answered as if the dropped tokens had never been (one layer: its keys know no others)."""
    model, x, pads = other(kind, num_hidden_layers=1, **changes), tokens(31), PADS
    mask = padding(x)
    importance = torch.zeros(2, 4, 60)
    importance[:, :, 11:17] = 1
    reader = HuggingFaceModel(model)
    policy = Constant(importance, budget="13tok", sinks=2, window=4, every=1, reposition=True)
    importance = policy.importance = importance[:, : policy.layers(reader)[0].kv_heads]
    with policy.attach(reader):
        _, state, _ = read(reader, x[:, :30], [26], mask[:, :30])
        got, _ = reader.read(x[:, 30:], state)
    for row, pad in enumerate(pads):
        kept = [0, 1, *range(11, 17), *range(30 - pad - 4, 30 - pad)]
        short = torch.cat((x[row, pad:30][kept], x[row, 30:]))[None]
        torch.testing.assert_close(got[row, -1], model(short).logits[0, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["cohere2", "smollm3", "hunyuan_v1_dense"])
def test_layers_that_rotate_no_keys_or_change_them_afterwards_have_no_turn(kind: str) -> None:
    from contextlab.policies.huggingface import attention_layers

    model = other(kind, num_hidden_layers=4, num_key_value_heads=2, head_dim=8)
    assert [layer.turn is None for _, layer in attention_layers(model)].count(True) >= 1
    with (
        pytest.raises(InputError, match="no rotary positions to change"),
        build_policy("h2o", reposition=True).attach(model),
    ):
        pass


@pytest.mark.parametrize("kind", ["opt", "gpt_neox"])
def test_queries_that_are_scaled_before_are_not_scaled_twice(kind: str) -> None:
    model, x = other(kind, ffn_dim=48, word_embed_proj_dim=32), tokens()
    expected = model(x).logits
    with build_policy("h2o").attach(model):
        torch.testing.assert_close(model(x).logits, expected, rtol=0, atol=1e-6)


def test_positions_without_a_turn_refuse_to_be_changed() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    for model in (reference("gpt2"), reference("llama", rope_parameters=dynamic, max_position_embeddings=64)):
        with (
            pytest.raises(InputError, match="no rotary positions to change"),
            build_policy("h2o", reposition=True).attach(model),
        ):
            pass


@pytest.mark.parametrize(
    "text",
    [
        "quantize:bits=2,group=4,window=4",
        "quantize:bits=2,keys=token,group=4,window=4",
        "fp8",
        "h2o:window=8|quantize:bits=2,group=4,window=4",
        "hash_evict:window=4",
        "locret:window=8",
        "quest:page=4,window=4",
        "specache:bits=2,group=4,window=4",
    ],
)
def test_what_is_kept_of_a_row_does_not_depend_on_its_padding(text: str) -> None:
    """Rotary positions of transformers count from a row's first token, so nothing is turned back by its padding."""
    model = HuggingFaceModel(reference("llama"))
    x = tokens()[:1]
    pad = torch.nn.functional.pad(x, (7, 0))
    mask = torch.arange(pad.shape[1])[None] >= 7
    policy = parse_policy(text, "30tok" if takes_budget(text) else None)
    if isinstance(policy, Locret):
        policy.fit(model, tokens(), 8, steps=2, batch=2)
    found = []
    with torch.no_grad(), policy.attach(model):
        for inputs, hidden in ((x, None), (pad, mask)):
            cut = inputs.shape[1] - 6
            y, state = model.read(inputs[:, :cut], None, None if hidden is None else hidden[:, :cut])
            parts = [y]
            for t in range(cut, inputs.shape[1]):
                y, state = model.read(inputs[:, t : t + 1], state)
                parts.append(y)
            found.append(torch.cat(parts, 1)[:, -x.shape[1] :])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)
