"""Early exits: against a loop over tokens and layers written from CALM, and the laws of models."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils import _pytree as pytree

from contextlab import build_model, registry
from contextlab.errors import InputError
from contextlab.models import LazyPrefill, ModelSpec
from contextlab.models.stack import Within
from contextlab.policies import build_policy
from contextlab.testing import laws
from contextlab.testing.mixers import cases
from contextlab.testing.models import of_spec

SIZES = {"width": 16, "depth": 4, "heads": 2, "input_size": 11, "output_size": 11, "read_in": "token"}
TOKENS = torch.randint(11, (3, 20), generator=torch.Generator().manual_seed(0))
SPECS = {
    "attention": {"exit": {"threshold": 0.3}},
    "falling": {"exit": {"threshold": 0.35, "decay": 4, "length": 20}, "layers": ["attention", "gated_delta_net"]},
    "saturated": {"exit": {"by": "saturation", "threshold": 0.9, "first": 2}, "layers": ["mamba2", "rg_lru"]},
    "looped": {"exit": {"threshold": 0.3}, "loops": 2, "depth": 2, "position": "learned", "max_length": 20},
    "shared": {"exit": {"threshold": 0.25}, "layers": [
        "attention", {"mixer": "attention", "kv": "shared"}, {"mixer": "gla", "with_input": True},
        {"mixer": "attention", "skip": 0.5}]},
}  # fmt: skip
LAWS = {law.name: law for law in laws("model")}


def noisy(**options):
    """With a read-out that is sure of some tokens."""
    model = of_spec("exits", ModelSpec.parse({**SIZES, **options})).build().eval()
    with torch.no_grad():
        model.read_out.weight.mul_(1.5)
    return model


@pytest.mark.parametrize("law", ["pieces", "padding"])
@pytest.mark.parametrize("name", SPECS)
def test_a_model_with_early_exits_keeps_the_laws(name, law):
    LAWS[law](of_spec(name, ModelSpec.parse({**SIZES, **SPECS[name]})))


def by_hand(model, row):
    """Token after token and layer after layer, in Python: predictions [T, k], layers of each token."""
    rule, layers = model.spec.exit, len(model.blocks)
    states: list = [None] * (layers * model.spec.loops)
    predictions, used = [], []
    for place, token in enumerate(row.tolist()):
        threshold = rule.threshold
        if rule.decay is not None:
            threshold = 0.9 * threshold + 0.1 * math.exp(-rule.decay * place / rule.length)
        embedded = x = model.read_in(torch.tensor([[token]]))
        if model.positions is not None:
            embedded = x = x + model.positions.weight[place]
        count, gone = 0, False
        for n in range(len(states)):
            if n % layers == 0 and n and not gone:
                x = x + embedded
            block = model.blocks[n % layers]
            y, states[n] = block(x, states[n], None, True, embedded, torch.tensor([[token]]))
            if gone:
                continue  # the layer has read the vector that the token left with
            before, x, count = x[0, 0], y, count + 1
            if rule.by == "softmax":
                first, second = model.read_out(model.read_out_norm(x))[0, 0].softmax(-1).sort().values.flip(0)[:2]
                sure = float(first - second)
            else:
                sure = float(before @ x[0, 0] / before.norm() / x[0, 0].norm())
            gone = count >= rule.first and sure > threshold
        predictions.append(model.read_out(model.read_out_norm(x))[0, 0])
        used.append(count)
    return torch.stack(predictions), used


@pytest.mark.parametrize("name", ["attention", "falling", "saturated", "looped"])
@torch.no_grad()
def test_each_token_leaves_where_the_paper_says(name):
    model, used = noisy(**SPECS[name]), []
    tokens = TOKENS[:2, :12]
    answered = model(tokens, within=Within(used=used))
    layers = len(model.blocks) * model.spec.loops
    expected, counts = by_hand(model, tokens[1])
    assert used[0][1].tolist() == counts
    torch.testing.assert_close(answered[1], expected, rtol=0, atol=1e-9)
    assert set(used[0].unique().tolist()) >= {model.spec.exit.first, layers}, "some leave early, some do not"
    stepped, state = [], None
    for token in tokens[:1].split(1, 1):  # alone, so that layers above are not run but for their states
        y, state = model.read(token, state)
        stepped.append(y)
    torch.testing.assert_close(torch.cat(stepped, 1), answered[:1], rtol=0, atol=1e-9)
    assert state.nbytes == model.state_nbytes(12, 1, torch.float64)


@torch.no_grad()
def test_a_threshold_of_one_and_training_are_the_whole_model():
    plain = noisy()
    for rule in ({"threshold": 1}, {"threshold": 1, "by": "saturation"}, {"threshold": 0}):
        model = build_model({**SIZES, "exit": rule}).double().eval()
        model.load_state_dict(plain.state_dict())
        same = torch.equal(model(TOKENS), plain(TOKENS))
        assert same == (rule["threshold"] == 1)
        assert torch.equal(model.train()(TOKENS), plain(TOKENS))
    assert "exit" not in ModelSpec.parse(SIZES).model_dump()


@torch.no_grad()
def test_padding_counts_neither_as_sure_nor_as_read():
    model, used = noisy(**SPECS["falling"]), []
    mask = torch.arange(20) >= torch.tensor([[0], [5], [20]])
    model(TOKENS, mask, within=Within(used=used))
    assert not used[0][~mask].any()
    alone = []
    model(TOKENS[1:2, 5:], within=Within(used=alone))
    assert torch.equal(used[0][1, 5:], alone[0][0])
    with pytest.raises(InputError, match=r"within\.used: not for packed documents"):
        model(TOKENS[:1], cu_seqlens=torch.tensor([0, 5, 20]), within=Within(used=[]))


@pytest.mark.parametrize("name", ["attention", "complex_attention", "gated_delta_net", "sliding_window"])
@torch.no_grad()
def test_what_a_mixer_remembers_is_the_state_that_it_leaves(name):
    for component in cases(registry.lookup("mixer", name)):
        mixer = component.build().double()
        x = torch.randn(2, 7, 24, dtype=torch.float64)
        mask = torch.arange(7) >= torch.tensor([[0], [2]])
        state = mixer(x[:, :4], None, mask[:, :4])[1]
        expected, found = (
            mixer(x[:, 4:], state)[1],
            mixer.remember(x[:, 4:], mixer.remember(x[:, :4], None, mask[:, :4])),
        )
        assert type(found) is type(expected)
        assert found.length == 7
        for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            assert torch.equal(one, other)


@torch.no_grad()
def test_policies_serve_layers_that_tokens_leave():
    model = noisy(**SPECS["attention"])
    expected, state = model(TOKENS[:1]), None
    with build_policy("streaming_llm").attach(model):  # without a budget it keeps everything
        for place, token in enumerate(TOKENS[:1].split(1, 1)):
            y, state = model.read(token, state)
            torch.testing.assert_close(y[:, 0], expected[:, place], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exit": {"threshold": 1.5}}, "exit.threshold: "),
        ({"exit": {"decay": 4}}, "decay and length belong together"),
        ({"exit": {"first": 9}}, "exit.first: at most the model's 4 layers, got 9"),
        ({"exit": {}, "layers": ["fnet"]}, "exit: tokens leave one by one, in models that read forward"),
        ({"exit": {}, "pool": "mean"}, "exit: tokens leave one by one, in models that read forward"),
        ({"exit": {}, "read_in": "vector"}, "exit.by: the predictions of a model that reads vectors are no logits"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        ModelSpec.parse({**SIZES, **options})
    with pytest.raises(InputError, match="not for a model whose tokens leave early"):
        LazyPrefill(build_model({**SIZES, "exit": {}}), {1: 0.5})
