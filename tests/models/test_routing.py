"""Mixture-of-Depths: against loops over tokens written from the paper, and the laws of models."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from contextlab import build_model
from contextlab.errors import InputError
from contextlab.models import ModelSpec
from contextlab.models.routing import RoutedState
from contextlab.models.skip import SkipSpec
from contextlab.ops.documents import documents
from contextlab.policies import build_policy
from contextlab.testing import laws
from contextlab.testing.models import of_spec

SIZES = {"width": 16, "depth": 3, "heads": 2, "input_size": 11, "output_size": 11, "read_in": "token"}
TOKENS = torch.randint(11, (3, 24), generator=torch.Generator().manual_seed(0))
SPECS = {
    "attention": {"layers": [{"mixer": "attention", "skip": {"share": 0.5, "ahead": 0}}]},
    "window": {"layers": ["attention", {"mixer": "sliding_window", "options": {"window": 3}, "skip": 0.3}]},
    "delta": {"layers": [{"mixer": "gated_delta_net", "skip": {"share": 0.4, "ahead": 1}}], "position": "learned",
              "max_length": 24},
    "looped": {"layers": [{"mixer": "mamba2", "skip": 0.5, "share": "one"}], "loops": 2, "depth": 2},
    "mlp": {"layers": [{"mixer": "none", "skip": 0.5}, "rg_lru"], "block": "parallel", "residual": "laurel"},
}  # fmt: skip
LAWS = {law.name: law for law in laws("model")}


def noisy(**options):
    return of_spec("routed", ModelSpec.parse({**SIZES, **options})).build().eval()


@pytest.mark.parametrize("law", ["pieces", "padding", "description"])
@pytest.mark.parametrize("name", SPECS)
def test_a_model_that_tokens_may_skip_keeps_the_laws(name, law):
    LAWS[law](of_spec(name, ModelSpec.parse({**SIZES, **SPECS[name]})))


@torch.no_grad()
def test_training_takes_the_best_share_of_each_text_and_weighs_what_the_block_adds():
    model = noisy(**SPECS["attention"], depth=1)
    block, x = model.blocks[0].train(), torch.randn(3, 9, 16, dtype=torch.float64)
    mask = torch.arange(9) >= torch.tensor([[0], [4], [9]])
    y, state = block(x, None, mask, False, x, None)
    assert state is None
    for row, tokens in enumerate([9, 5, 0]):
        first = 9 - tokens
        scores = [float(v @ block.router.weight / v.square().mean().sqrt()) for v in x[row]]
        best = sorted(range(first, 9), key=lambda t: -scores[t])[: math.ceil(0.5 * tokens)]
        expected = x[row].clone()
        for n, t in enumerate(sorted(best)):
            through = block._through(x[row : row + 1, sorted(best)[: n + 1]], None, None, False, None)[0][0, n]
            expected[t] += (1 + scores[t]) * (through - x[row, t])
        torch.testing.assert_close(y[row, first:], expected[first:], rtol=0, atol=1e-9)


def test_the_second_router_learns_from_the_choice_alone_and_gives_the_stream_no_gradient():
    model = noisy(**SPECS["attention"], depth=1)
    block = model.blocks[0].train()
    x = torch.randn(2, 8, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 8, 16, dtype=torch.float64)
    router = block.router
    (block(x, None, None, False, x, None)[0] * weights).sum().backward()
    normed = F.rms_norm(x.detach(), (16,))
    score = normed @ router.weight.detach()
    target = (score >= score.topk(4).values[:, -1:]).double()
    choice, bias = router.choice.detach().requires_grad_(), router.bias.detach().requires_grad_()
    F.binary_cross_entropy_with_logits(normed @ choice + bias, target).backward()
    torch.testing.assert_close(router.choice.grad, choice.grad)
    torch.testing.assert_close(router.bias.grad, bias.grad)
    seen, weight = x.grad.clone(), router.weight.grad.clone()
    x.grad = router.weight.grad = None
    with torch.no_grad():
        router.choice.neg_()
    (block(x, None, None, False, x, None)[0] * weights).sum().backward()
    torch.testing.assert_close((x.grad, router.weight.grad), (seen, weight), rtol=0, atol=0)


def test_a_share_of_one_is_the_plain_model_exactly():
    plain = build_model(SIZES).double()
    routed = build_model({**SIZES, "layers": [{"mixer": "attention", "skip": 1}]}).double()
    routed.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        for block in routed.blocks:
            block.router.weight.zero_()
    for mode in (True, False):
        assert torch.equal(routed.train(mode)(TOKENS), plain(TOKENS))
    state = routed.read(TOKENS)[1]
    assert state.nbytes == routed.state_nbytes(24, 3, torch.float64) == plain.read(TOKENS)[1].nbytes + 3 * 3 * 8


@torch.no_grad()
def test_rows_part_and_are_picked_and_their_bytes_are_those_of_the_tokens_that_went_through():
    model = noisy(**SPECS["window"], depth=2)
    _, state = model.read(TOKENS[:, :20])
    routed = state.layers[1]
    assert isinstance(routed, RoutedState)
    counts = routed.through()
    assert len(set(counts)) > 1
    assert max(counts) <= SkipSpec(share=0.3).most(20)
    mixer = model.blocks[1].mixer
    each = sum(mixer.state_nbytes(n, 1, torch.float64) for n in counts if n)
    assert routed.nbytes == each + 8 * 3
    expected, after = model.read(TOKENS[:, 20:], state)
    rows = torch.tensor([2, 0, 2, 1])
    picked, _ = model.read(TOKENS[rows, 20:], state.select(rows))
    torch.testing.assert_close(picked, expected[rows], rtol=0, atol=1e-9)
    assert after.layers[1].seen.tolist() == [24] * 3
    copy = state.to(torch.float64).detach()
    torch.testing.assert_close(model.read(TOKENS[:, 20:], copy)[0], expected, rtol=0, atol=0)


@torch.no_grad()
def test_at_most_the_share_goes_through_and_the_first_that_would():
    model = noisy(layers=[{"mixer": "attention", "skip": {"share": 0.25, "ahead": 2}}], depth=1)
    block = model.blocks[0]
    block.router.bias.fill_(100.0)  # all would
    _, state = block(torch.randn(2, 16, 16, dtype=torch.float64), None, None, True, None, None)
    assert state.through() == [6, 6]
    assert state.nbytes == block.state_nbytes(16, 2, torch.float64)
    block.router.bias.fill_(-100.0)
    x = torch.randn(2, 16, 16, dtype=torch.float64)
    y, state = block(x, None, None, True, None, None)
    assert torch.equal(y, x)
    assert state.groups == [None]
    y, state = block(x, state, None, True, None, None)
    assert (state.length, state.nbytes) == (32, 16)


@pytest.mark.parametrize("mode", [True, False])
@torch.no_grad()
def test_packed_documents_are_answered_as_alone(mode):
    model = noisy(**SPECS["delta"]).train(mode)
    row, cuts = TOKENS[:1], torch.tensor([0, 5, 17, 24])
    assert len(documents(cuts, row)) == 3
    alone = torch.cat([model(row[:, a:b]) for a, b in pairwise(cuts)], 1)
    torch.testing.assert_close(model(row, cu_seqlens=cuts), alone, rtol=0, atol=1e-9)


def test_flops_are_of_the_share_and_the_routers():
    plain, routed = build_model(SIZES), build_model({**SIZES, "layers": [{"mixer": "attention", "skip": 0.1}]})
    assert routed.blocks[0].flops(30) == plain.blocks[0].flops(3) + 4 * 30 * 16
    assert ModelSpec.parse({**SIZES, "layers": [{"mixer": "attention", "skip": 0.1}]}).layers[0].skip.ahead == 8
    assert "skip" not in ModelSpec.parse(SIZES).model_dump()["layers"][0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": [{"mixer": "attention", "skip": 0}]}, "layers.0.skip.share: "),
        ({"layers": [{"mixer": "attention", "skip": 1.5}]}, "layers.0.skip.share: "),
        ({"layers": [{"mixer": "fnet", "skip": 0.5}]}, "skip: 'fnet' reads both ways"),
        ({"layers": [{"mixer": "attention", "skip": 0.5}], "residual": "none"}, "skip: tokens go past a layer by"),
        ({"layers": [{"mixer": "attention", "with_input": True, "skip": 0.5}]}, "skip: not for a layer that reads"),
        ({"layers": [{"mixer": "attention", "skip": 0.5}, {"mixer": "attention", "kv": "shared"}]},
         "layer 1 cannot read the keys of layer 0, which some tokens skip"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(InputError, match=words):
        ModelSpec.parse({**SIZES, **options})


def test_policies_and_other_states_are_refused():
    model = noisy(**SPECS["attention"])
    with pytest.raises(InputError, match="policy: a block that tokens may skip"), build_policy("h2o").attach(model):
        pass
    plain = noisy()
    with pytest.raises(InputError, match="expected the state of a block with a router, got a KVState"):
        model.read(TOKENS, plain.read(TOKENS)[1])
