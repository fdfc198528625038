"""Taking and replacing what flows through named places, in models of every mixer, whole and in pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from contextlab import ModelSpec, build_model, capture, patch, registry
from contextlab.errors import InputError
from contextlab.inspect import only, ranks, run_with_cache, sites, states_after
from contextlab.models.within import Within
from contextlab.testing.readings import noisy

T = 12
CUTS = (0, 5, 6, T)


def model_of(mixer, options=None, **keys):
    spec = {"width": 24, "depth": 2, "heads": 2, "mlp_ratio": 2, "read_in": "token", "input_size": 9, "output_size": 5}
    made = build_model(
        ModelSpec.parse({**spec, "layers": [{"mixer": mixer, "options": options or {}}], **keys}), seed=0
    )
    return noisy(made).eval()


def tokens(batch=2, length=T):
    return torch.randint(0, 9, (batch, length), generator=torch.Generator().manual_seed(1))


def in_pieces(model, x):
    state, found = None, []
    for begin, end in pairwise(CUTS):
        y, state = model.read(x[:, begin:end], state)
        found.append(y)
    return torch.cat(found, 1), state


# One of each family: the laws of mixers hold all of them to it, without a model.
MIXERS = {entry.family: (entry.name, dict(entry.cases[-1])) for entry in registry.entries("mixer")}.values()


@torch.no_grad()
@pytest.mark.parametrize(("name", "options"), MIXERS, ids=[name for name, _ in MIXERS])
def test_capturing_and_patching_with_the_own_value_change_nothing(name, options):
    model, x = model_of(name, options, depth=1), tokens()
    readings = {"whole": lambda: model(x)}
    if model.blocks[0].mixer.causal:
        readings["in pieces"] = lambda: in_pieces(model, x)[0]
    for how, reading in readings.items():
        expected = reading()
        with capture(model, "*") as taken:
            assert torch.equal(reading(), expected), how
        whole = {site: taken[site] for site in taken if not site.endswith(".state")}
        assert torch.equal(whole["logits"], expected)
        assert all(value.shape[:2] == (2, T) for site, value in whole.items() if "mixer." not in site)
        with patch(model, {site: value for site, value in whole.items() if value.shape[1] == T}):
            assert torch.equal(reading(), expected), how
        with patch(model, {"*": lambda value: value}):
            assert torch.equal(reading(), expected), how
        for site in whole:  # nothing overwrites what was taken
            assert torch.equal(taken[site], whole[site])
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("mixer", ["attention", "gated_delta_net", "mamba2", "gla", "lstm"])
def test_what_is_taken_is_the_stream_and_pieces_give_the_whole(mixer):
    model, x = model_of(mixer).double(), tokens()
    within = Within(hidden=[])
    model(x, within=within)
    with capture(model, "blocks.**") as whole:
        model(x)
    for number, value in enumerate((whole["blocks.0.input"], whole["blocks.1.input"])):
        assert torch.equal(value, within.hidden[number])
    with capture(model, "blocks.**") as pieces:
        _, state = in_pieces(model, x)
    for site in whole:
        if not site.endswith(".state"):
            torch.testing.assert_close(pieces[site], whole[site])
    assert pieces["blocks.1.mixer.state"] is state.layers[1]
    assert [len(value[0]) for value in pieces.calls("blocks.0.output")] == [5, 1, 6]


@torch.no_grad()
def test_layers_that_share_weights_are_told_apart_by_their_use():
    looped = model_of("attention", loops=3)
    shared = model_of(
        "attention",
        depth=3,
        layers=[{"mixer": "attention", "share": "a"}, "lstm", {"mixer": "attention", "share": "a"}],
    )
    for model, uses in ((looped, 6), (shared, 3)):
        x, within = tokens(), Within(given=[])
        expected = model(x, within=within)
        with capture(model, "blocks.*.input") as taken:
            model(x)
        assert len(taken) == uses
        for number, value in enumerate(within.given[:-1]):
            assert torch.equal(taken[f"blocks.{number}.input"], value)
        with capture(model, "blocks.*.mixer.q") as queries:
            model(x)
        assert not torch.equal(queries["blocks.0.mixer.q"], queries["blocks.2.mixer.q"])
        with patch(model, {"blocks.2.mixer.output": torch.zeros_like}), capture(model, "blocks.*.input") as changed:
            assert not torch.equal(model(x), expected)
        for number in range(uses):
            assert torch.equal(changed[f"blocks.{number}.input"], taken[f"blocks.{number}.input"]) == (number <= 2)


@torch.no_grad()
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "in pieces"])
def test_edits_are_of_the_part_that_is_asked_for(cut):
    model, x = model_of("gated_delta_net"), tokens()
    reading = (lambda: in_pieces(model, x)[0]) if cut else (lambda: model(x))
    expected = reading()
    with capture(model, "blocks.0.mixer.heads") as plain:
        reading()
    before = plain["blocks.0.mixer.heads"]
    edit = only(lambda value: value + 1, rows=[1], places=[7, 9], heads=[0], channels=[2])
    with patch(model, {"blocks.0.mixer.heads": edit}), capture(model, "blocks.0.mixer.heads") as taken:
        found = reading()
    moved = taken["blocks.0.mixer.heads"] - before
    wanted = torch.zeros_like(moved)
    wanted[1, [7, 9], 0, 2] = 1
    torch.testing.assert_close(moved, wanted)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1, :7], expected[1, :7])
    assert not torch.equal(found[1, 7:], expected[1, 7:])
    value = torch.randn(2, T, 24)
    with patch(model, {"blocks.1.output": only(value, places=[6, 11])}), capture(model, "blocks.1.output") as taken:
        reading()
    assert torch.equal(taken["blocks.1.output"][:, [6, 11]], value[:, [6, 11]])


def test_gradients_flow_through_what_is_taken_and_what_is_put_in():
    model, x = model_of("gla"), tokens()
    with capture(model, ["blocks.0.output", "logits"]) as taken:
        model(x)
    gradient = torch.autograd.grad(taken["logits"].square().sum(), taken["blocks.0.output"])[0]
    value = taken["blocks.0.output"].detach().requires_grad_()
    with patch(model, {"blocks.0.output": value}):
        model(x).square().sum().backward()
    torch.testing.assert_close(value.grad, gradient)
    assert gradient.abs().sum() > 0


@torch.no_grad()
def test_states_are_taken_after_any_token_and_put_into_other_texts():
    model, x = model_of("gated_delta_net"), tokens()
    first, last = states_after(model, x, [3, T - 1])
    _, whole = model.read(x)
    torch.testing.assert_close(last.layers[1]["matrix"], whole.layers[1]["matrix"])
    _, begun = model.read(x[:, :4])
    assert torch.equal(first.layers[0]["matrix"], begun.layers[0]["matrix"])
    with patch(model, {"blocks.*.mixer.state": ranks(1)}):
        _, thin = model.read(x)
    assert (torch.linalg.matrix_rank(thin.layers[0]["matrix"], atol=1e-5) <= 1).all()
    other = begun.layers[0]
    with patch(model, {"blocks.0.mixer.state": other}):
        _, moved = model.read(tokens().flip(1))
    assert moved.layers[0] is other
    with patch(model, {"blocks.*.mixer.state": ranks(64)}):
        torch.testing.assert_close(model.read(x)[1].layers[0]["matrix"], whole.layers[0]["matrix"])


@torch.no_grad()
def test_each_text_begins_anew_within_one_block():
    model, x = model_of("attention"), tokens()
    with capture(model, "logits") as taken:
        model(x)
        one = taken["logits"]
        other = model(x.flip(1))
    assert torch.equal(taken["logits"], other)
    assert torch.equal(taken.calls("logits")[0], one)
    value = torch.randn(2, T, 24)
    with patch(model, {"blocks.0.output": value}):
        assert torch.equal(model(x), model(x))


@torch.no_grad()
def test_models_of_transformers_have_the_same_names():
    transformers = pytest.importorskip("transformers", minversion="5")
    from contextlab.models import HuggingFaceModel

    config = transformers.LlamaConfig(
        vocab_size=9, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    model, x = HuggingFaceModel(theirs), tokens()
    hidden = theirs(x, output_hidden_states=True).hidden_states
    with capture(model, "*") as taken:
        expected = model(x)
    assert torch.equal(taken["logits"], expected)
    assert torch.equal(taken["embedded"], hidden[0])
    assert torch.equal(taken["blocks.0.output"], hidden[1])
    assert torch.equal(taken["final"], hidden[2])
    assert taken["blocks.1.mixer.output"].shape == taken["blocks.1.mlp.input"].shape == (2, T, 16)
    with capture(model, "blocks.0.output") as pieces:
        in_pieces(model, x)
    torch.testing.assert_close(pieces["blocks.0.output"], hidden[1])
    with patch(model, {"blocks.1.mixer.output": torch.zeros_like, "blocks.1.mlp.output": torch.zeros_like}):
        bare = model(x)
    torch.testing.assert_close(bare, theirs.lm_head(theirs.model.norm(hidden[1])))


def test_a_call_gives_predictions_and_all_that_flowed():
    model, x = model_of("linear_attention"), tokens()
    found, cache = run_with_cache(model, x)
    assert torch.equal(found, cache["logits"])
    assert set(cache) == {site for site in sites(model) if not site.endswith(".state")}
    mixing = model.blocks[0].mixer.mixing(cache["blocks.0.mixer.input"])
    heads = torch.einsum("bhts,bshd->bthd", mixing, cache["blocks.0.mixer.v"])
    torch.testing.assert_close(heads, cache["blocks.0.mixer.heads"])


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ({"blocks.0.mixer.qq": torch.zeros_like}, "unknown site 'blocks.0.mixer.qq'; did you mean 'blocks.0.mixer.q'"),
        ({"blocks.7.**": torch.zeros_like}, "no site matches 'blocks.7.**'"),
        ({"blocks.0.output": torch.zeros(2, T, 23)}, "blocks.0.output: expected a value [2, 12, 24], got [2, 12, 23]"),
        ({"blocks.0.output": torch.zeros(2, T + 1, 24)}, "blocks.0.output: the value has 13 tokens, and 12 were read"),
        ({"blocks.0.output": lambda value: value[:, 1:]}, "expected a value [2, 12, 24], got [2, 11, 24]"),
        ({"blocks.0.output": lambda value: None}, "expected a value [2, 12, 24], got NoneType"),
        ({"blocks.0.output": only(torch.zeros_like, places=[12])}, "place 12 was never read; the text had 12 tokens"),
        ({"blocks.0.output": only(torch.zeros_like, heads=[0])}, "has no heads, but is [2, 12, 24]"),
        ({"blocks.0.mixer.q": only(torch.zeros_like, heads=[2])}, "heads go from 0 to 1, got 2"),
        ({"blocks.0.output": 3}, "patch: expected a tensor, a State or a function, got int"),
    ],
)
def test_what_cannot_be_put_in_is_told_in_one_line(edits, said):
    model = model_of("attention")
    with pytest.raises(InputError) as caught, patch(model, edits):
        model(tokens())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert model.heard is None
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_what_was_not_taken_is_told():
    model, x = model_of("attention"), tokens()
    with capture(model, "blocks.0.mixer.state") as taken:
        model(x)
    with pytest.raises(
        InputError, match="blocks.0.mixer.state: nothing was taken there yet; a plain call keeps no state"
    ):
        taken["blocks.0.mixer.state"]
    with pytest.raises(InputError, match="a KVState has no matrices"), patch(model, {"blocks.0.mixer.state": ranks(1)}):
        model.read(x)
    with pytest.raises(InputError, match="expected a Model or a HuggingFaceModel"):
        sites(torch.nn.Linear(2, 2))
    assert isinstance(
        run_with_cache(model, x, "blocks.0.mixer.qkv_proj.output")[1]["blocks.0.mixer.qkv_proj.output"], Tensor
    )
