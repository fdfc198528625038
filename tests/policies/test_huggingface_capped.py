"""Policies where scores are capped, as in gemma2: what the model's own eager attention answers from what is kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab import registry
from contextlab.errors import InputError
from contextlab.models import HuggingFaceModel
from contextlab.ops.kv import KVLayer
from contextlab.policies import Policy, StreamingLLM, build_policy
from contextlab.policies.eviction import oracle
from contextlab.policies.eviction.kvzip import greatest_attention
from contextlab.policies.eviction.trained import greatest_logits
from contextlab.policies.eviction.two_pass import Read
from contextlab.policies.prompt.shorten import observed
from contextlab.policies.storage import clusters
from tests.models.checkpoints import V, exactly, reference

transformers = pytest.importorskip("transformers", minversion="5")

CAP = 0.3


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    with torch.no_grad():
        yield


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers' own arithmetic stays in float64, its softmax, too."""
    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    with exactly(monkeypatch):
        yield


def gemma2(layers: int = 2, **changes: Any) -> Any:
    given = {"layer_types": ["full_attention"] * layers, "num_hidden_layers": layers, "query_pre_attn_scalar": 1}
    return reference("gemma2", attn_implementation="eager", **{**given, "attn_logit_softcapping": CAP, **changes})


def tokens(length: int = 30, batch: int = 2) -> Tensor:
    return torch.randint(3, V, (batch, length), generator=torch.Generator().manual_seed(0))


def registered(**more: Any) -> list[Any]:
    """A policy of each kind that serves without having been shown a text or trained."""
    found = []
    for entry in registry.entries("policy"):
        if entry.cases and not entry.build().untrained:
            known = {p.name for p in entry.parameters}
            options = {"window": 4, **entry.cases[0], **more}
            policy = entry.build(**{name: value for name, value in options.items() if name in known})
            found.append(pytest.param(policy, id=entry.name))
    return found


def pieces(model: Any, x: Tensor, sizes: tuple[int, ...], mask: Tensor | None = None) -> tuple[Tensor, Any]:
    state, outputs, at = None, [], 0
    for size in (*sizes, *[1] * (x.shape[1] - sum(sizes))):
        part = slice(at, at + size)
        y, state = model.read(x[:, part], state, None if mask is None else mask[:, part])
        outputs.append(y)
        at += size
    return torch.cat(outputs, 1), state


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("policy", [each for each in registered() if each.values[0].lossless])
def test_a_full_budget_changes_nothing(policy: Any) -> None:
    model, x = HuggingFaceModel(gemma2()), tokens()
    expected = model(x)
    with policy.attach(model):
        torch.testing.assert_close(pieces(model, x, (20, 6))[0], expected, rtol=0, atol=1e-9)


def test_a_window_beside_it_and_padding_change_nothing_either() -> None:
    # float32: in float64 the masks of transformers' eager attention give NaN at padding
    model = HuggingFaceModel(gemma2(layer_types=["sliding_attention", "full_attention"], dtype=torch.float32))
    x = tokens()
    mask = torch.arange(30) >= torch.tensor([[0], [7]])
    plain = HuggingFaceModel(gemma2(attn_logit_softcapping=None, dtype=torch.float32))
    assert (model(x)[mask] - plain(x)[mask]).abs().max() > 1e-3  # the cap counts
    expected = model(x, mask)[mask]
    for name in ("h2o", "snapkv", "quest", "ada_kv", "chai"):
        with build_policy(name, **({"tokens": 30} if name == "chai" else {})).attach(model):
            torch.testing.assert_close(pieces(model, x, (20, 6), mask)[0][mask], expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("name", "options"), [("h2o", {}), ("tova", {}), ("snapkv", {"kernel": 1}), ("streaming_llm", {"sinks": 2})]
)
def test_a_small_budget_is_eager_attention_without_the_keys_that_it_drops(name: str, options: dict[str, Any]) -> None:
    theirs, x = gemma2(1), tokens()
    model, window = HuggingFaceModel(theirs), options.get("sinks", 0) or 4
    policy = build_policy(name, budget="14tok", window=window, **options)
    with policy.attach(model):
        _, before = model.read(x[:, :29])
        y, state = model.read(x[:, 29:], before)
        (_, kept), (_, after) = (policy.states(model, each)[0] for each in (before, state))
    chosen = [
        weights_chosen(model, x[:, :29], name, window) for model in (theirs, gemma2(1, attn_logit_softcapping=None))
    ]
    if name != "streaming_llm":
        assert torch.equal(kept.positions.long(), chosen[0])
        assert not torch.equal(*chosen)  # the cap decides
    held = torch.zeros(2, 2, 30).scatter(2, after.positions.long(), 1.0).bool().repeat_interleave(2, 1)
    causal = torch.ones(30, 30, dtype=torch.bool).tril().expand(2, 4, -1, -1).clone()
    causal[:, :, -1] = held
    seen = torch.zeros(2, 4, 30, 30, dtype=torch.float64).masked_fill(~causal, -torch.inf)
    expected = theirs(x, attention_mask=seen).logits[:, -1:]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)


def weights_chosen(theirs: Any, x: Tensor, name: str, window: int) -> Tensor:
    """The places [B, Hkv, 14] that a policy is to keep of a prompt, by the weights that transformers tells."""
    weights = theirs(x, output_attentions=True).attentions[0].unflatten(1, (2, 2)).sum(2)
    length = x.shape[1]
    if name == "h2o":
        votes = weights.sum(2)
    elif name == "snapkv":
        votes = weights[:, :, -window:].mean(2)
    else:
        votes = weights[:, :, -1].sum(1, keepdim=True).expand(-1, 2, -1)
    votes = votes.masked_fill(torch.arange(length) >= length - window, torch.inf)
    return votes.topk(14, -1).indices.sort(-1).values


LAYER = KVLayer(0, 1, 4, 2, 8, 32, 0.5, cap=1e-9)


def unmerged() -> Any:
    """DMC whose gates never merge."""
    policy = build_policy("dmc")
    gate = torch.nn.Linear(2 * 32, 2 * 2, dtype=torch.float64).requires_grad_(False)
    gate.weight.zero_()
    gate.bias.copy_(torch.tensor([-99.0, -99.0, 0.0, 0.0]))
    policy.gates = [gate]
    return policy


OTHERS = [
    pytest.param(build_policy("ada_kv", of="h2o", window=4, budget="16tok"), id="ada_kv:of=h2o"),
    pytest.param(unmerged(), id="dmc"),
]


@pytest.mark.parametrize("policy", [*registered(budget="16tok", value_rank=32, reposition=False), *OTHERS])
def test_where_nothing_but_the_cap_is_left_of_scores_all_that_is_read_counts_alike(policy: Any) -> None:
    """Value j is the j-th unit vector, so that an answer shows the weight of each token that was read."""
    generator = torch.Generator().manual_seed(0)
    q = 4 * torch.randn(2, 32, 4, 8, dtype=torch.float64, generator=generator)
    k = torch.randn(2, 32, 2, 8, dtype=torch.float64, generator=generator)
    q[1, :22], k[1, :22] = q[0, :22], k[0, :22]  # a prefix that rows share
    v = torch.eye(32, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1).contiguous()
    policy.check([LAYER])
    state, outputs = None, []
    for part in (slice(0, 20), slice(20, 26), *(slice(t, t + 1) for t in range(26, 32))):
        y, state = policy.attend(LAYER, q[:, part], k[:, part], v[:, part], state)
        outputs.append(y)
    weights = torch.cat(outputs, 1)
    if type(policy).__name__ in ("CaM", "D2O", "KVMerger", "WeightedKV"):  # a slot's value is a mean
        weights = weights[:, :20]
    read = (weights > 1e-3).sum(-1, keepdim=True)
    expected = (weights > 1e-3) / read
    torch.testing.assert_close(weights, expected.to(weights), rtol=0, atol=1e-6)


class Unaware(StreamingLLM):
    """As one that attends by itself and was written before there were caps."""

    serves_caps = False


def test_a_policy_that_knows_nothing_of_caps_is_refused() -> None:
    with pytest.raises(InputError, match="^Unaware does not serve layers whose scores are capped; h2o and snapkv do$"):
        Unaware().layers(HuggingFaceModel(gemma2()))


def test_what_the_model_hands_over_counts() -> None:
    """A cap that is changed after the policy was attached."""
    model, x = HuggingFaceModel(gemma2()), tokens()
    expected = HuggingFaceModel(gemma2(attn_logit_softcapping=0.1))(x)
    with build_policy("h2o").attach(model):
        for each in model.modules():
            if hasattr(each, "attn_logit_softcapping"):
                each.attn_logit_softcapping = 0.1
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-6)


class First(StreamingLLM):
    """Leaves all layers but the first alone."""

    def at(self, layer: KVLayer) -> Policy | None:
        return self if layer.index == 0 else None


@pytest.mark.usefixtures("exact")
def test_layers_that_are_left_alone_and_heads_that_are_observed_have_capped_scores() -> None:
    theirs, x = gemma2(), tokens()
    model = HuggingFaceModel(theirs)
    answer = theirs(x, output_attentions=True)
    with First("100%").attach(model):
        torch.testing.assert_close(model(x), answer.logits, rtol=0, atol=1e-9)
    rows = observed(model, x, [(0, 1), (1, 2)], 3)
    expected = torch.stack([answer.attentions[layer][:, head, -3:] for layer, head in ((0, 1), (1, 2))], 1)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-9)


def test_pages_are_wanted_by_capped_scores() -> None:
    """One head's second best page is far behind its best until both are capped; the other's never is."""
    keys = torch.tensor([[10, 0], [9, 0], [0, 0.9], [0, 0.6], [0, 0]], dtype=torch.float64)[None, :, None]
    q, values = torch.eye(2, dtype=torch.float64)[None, None], torch.eye(5, dtype=torch.float64)[None, :, None]
    policy, read = build_policy("topk", budget="4tok", window=1), {}
    for cap in (None, 1.0):
        layer = KVLayer(0, 1, 2, 1, 2, 5, 1.0, cap=cap)
        _, state = policy.attend(layer, q.expand(1, 4, -1, -1), keys[:, :4], values[:, :4], None)
        y, _ = policy.attend(layer, q, keys[:, 4:], values[:, 4:], state)
        read[cap] = y[0, 0, 0].nonzero().flatten().tolist()
    assert read == {None: [0, 2, 3, 4], 1.0: [0, 1, 2, 4]}


def test_what_policies_make_of_scores_is_of_capped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q = 4 * torch.randn(2, 32, 4, 8, dtype=torch.float64, generator=generator)
    k = torch.randn(2, 32, 2, 8, dtype=torch.float64, generator=generator)
    v = torch.eye(32, dtype=torch.float64)[None, :, None].expand(2, -1, 2, -1)
    best = greatest_attention(LAYER, q, k, torch.arange(32))
    torch.testing.assert_close(best, (1 / torch.arange(1.0, 33).double()).expand(2, 2, -1), rtol=0, atol=1e-6)
    logits = greatest_logits(LAYER, Read(q, k, v, torch.zeros(2, dtype=torch.int64)), 8)
    assert logits.shape == (2, 2, 24)
    torch.testing.assert_close(logits, torch.full_like(logits, 1e-9), rtol=1e-6, atol=0)
    policy: Any = build_policy("expected_attention", sinks=2)
    _, state = policy.attend(LAYER, q, k, v, None)
    expected = torch.tensor([0.0] * 2 + [1 / 30] * 30).expand(2, 2, -1)
    torch.testing.assert_close(policy.score(policy.seen(LAYER, state)), expected, rtol=0, atol=1e-3)
    told = []
    rows, worth = clusters.attention_rows, oracle.leave_one_out
    monkeypatch.setattr(clusters, "attention_rows", lambda *x, **y: told.append(y["cap"]) or rows(*x, **y))
    monkeypatch.setattr(oracle, "leave_one_out", lambda *x, **y: told.append(y["cap"]) or worth(*x, **y))
    build_policy("chai", clusters=1, tokens=4).attend(LAYER, q, k, v, None)
    assert told == [LAYER.cap]
    model, x = HuggingFaceModel(gemma2(1)), tokens()
    ceiling: Any = build_policy("oracle", budget="14tok", window=4)
    ceiling.watch(model, x)
    with ceiling.attach(model):
        model.read(x[:, :20])
    assert told == [LAYER.cap, CAP]
