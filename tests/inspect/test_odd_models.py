"""Models that read in odd ways, and what nobody should have asked for: true values, or one line that says why not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from contextlab import ModelSpec, build_model, build_task, capture, patch
from contextlab.errors import InputError
from contextlab.inspect import (
    attribution_effects,
    linear_probe,
    listing,
    mixing,
    only,
    patch_effects,
    ranks,
    run_with_cache,
    sites,
    states_after,
)

T = 7
SKIPPING = {"mixer": "attention", "skip": 0.5}
TASK = build_task("linear_regression", dimensions=3, examples=6)


def model_of(*layers, **keys):
    spec = {"width": 16, "depth": max(2, len(layers)), "heads": 2, "mlp_ratio": 2, "read_in": "token"}
    spec |= {"input_size": 9, "output_size": 9, "layers": list(layers) or ["attention"]}
    return build_model(ModelSpec.parse({**spec, **keys}), seed=0).eval()


def tokens():
    return torch.randint(0, 9, (2, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("loops", [1, 2])
def test_drafted_tokens_that_were_taken_back_are_not_in_what_was_taken(loops):
    model, x = model_of(loops=loops), tokens()[:, :3]
    with capture(model, "blocks.*.output") as taken:
        added = model.generate(x, 4, draft={"layers": 1})
    with capture(model, "blocks.*.output") as whole:
        model(torch.cat((x, added[:, :-1]), 1))
    for name, value in whole.items():
        torch.testing.assert_close(taken[name][:, : value.shape[1]], value)


@torch.no_grad()
def test_a_piece_that_is_read_again_takes_the_place_of_what_followed():
    model, x = model_of(), tokens()
    with capture(model, "blocks.0.output") as taken:
        _, state = model.read(x[:, :4])
        model.read(x[:, 4:].flip(1), state)
        model.read(x[:, 4:], state)
    with capture(model, "blocks.0.output") as whole:
        model(x)
    torch.testing.assert_close(taken["blocks.0.output"], whole["blocks.0.output"])
    assert len(taken.calls("blocks.0.output")) == 3


def test_names_of_what_was_taken_are_those_through_which_something_flowed():
    _, cache = run_with_cache(model_of(), tokens())
    assert {name: value.shape for name, value in cache.items()}["logits"] == (2, T, 9)
    assert "blocks.0.mixer.state" not in cache
    assert len(cache) == len(list(cache))


@torch.no_grad()
def test_tokens_that_skip_a_layer_are_not_mistaken():
    model, x = model_of(SKIPPING, "gla"), tokens()
    assert set(mixing(model, x)) == {"blocks.1.mixer"}
    with capture(model, ["blocks.0.mixer.q", "blocks.0.mixer.state", "blocks.0.output"]) as taken:
        _, state = model.read(x)
    assert taken["blocks.0.mixer.state"] is state.layers[0]
    assert len(taken.calls("blocks.0.mixer.q")) == 2  # rows of which other numbers went through
    with pytest.raises(InputError, match="tokens that skip the layer are not in it"):
        taken["blocks.0.mixer.q"]
    first = {"blocks.0.mixer.output": only(torch.zeros_like, places=[1])}
    with pytest.raises(InputError, match="rows and places cannot be told"), patch(model, first):
        pass
    with patch(model, {"blocks.0.mixer.output": torch.zeros_like}):
        model(x)
    with pytest.raises(InputError, match="tokens that skip the layer are not there"):
        patch_effects(model, x, x.flip(1), lambda y: y[:, -1, 0], "blocks.0.mixer.heads")
    with pytest.raises(InputError, match="no call of these can be told apart"):
        sites(model_of({**SKIPPING, "share": "a"}, {**SKIPPING, "share": "a"}))


@torch.no_grad()
def test_packed_documents_are_refused_within_a_block():
    model, x, cu_seqlens = model_of(), tokens()[:1], torch.tensor([0, 3, T])
    for reading in (model, model.read):
        with pytest.raises(InputError, match="not for packed documents"), capture(model, "logits"):
            reading(x, cu_seqlens=cu_seqlens)
    model(x, cu_seqlens=cu_seqlens)


@torch.no_grad()
def test_places_are_told_of_models_that_read_little_answer_once_or_share_keys():
    pooled = listing(model_of(pool="mean"))
    assert not [row for row in pooled if "state" in row.pattern or row.shape == "not reached"]
    short = {row.pattern: row.shape for row in listing(model_of(position="learned", max_length=3))}
    assert short["embedded"] == "[B, T, 16]"
    sharing = model_of("attention", {"mixer": "attention", "kv": "shared"})
    assert "blocks.1.mixer.state" not in sites(sharing)
    assert set(mixing(sharing, tokens())) == {"blocks.0.mixer"}


@torch.no_grad()
def test_matrices_are_told_unnoticed():
    model = model_of()
    with capture(model, "blocks.*.mixer.input") as taken:
        mixing(model, tokens())
    assert [len(taken.calls(name)) for name in taken] == [1, 1]


def test_an_edit_that_no_reading_came_to_is_told():
    model, gone = model_of(), model_of(exit={"threshold": 0.0}, depth=3)
    for each, site in ((model, "blocks.*.mixer.state"), (gone, "blocks.2.output")):
        with pytest.raises(InputError, match="no reading came there"), patch(each, {site: lambda value: value}):
            each(tokens())
    with patch(model, {"**": lambda value: value}):
        model(tokens())


def test_effects_are_told_wherever_gradients_are_off():
    model, x = model_of(), tokens()
    y = x.clone()
    y[:, 2] = (y[:, 2] + 1) % 9
    expected = attribution_effects(model, x, y, lambda p: p[:, -1, 0])
    with torch.no_grad():
        assert attribution_effects(model, x, y, lambda p: p[:, -1, 0]).equals(expected)
    with torch.inference_mode(), pytest.raises(InputError, match=r"no gradients within torch\.inference_mode"):
        attribution_effects(model, x, y, lambda p: p[:, -1, 0])


def test_gradients_of_a_patched_model_are_those_without_recomputing():
    model, x, found = model_of(loops=2).train(), tokens(), []
    for recompute in (None, partial(checkpoint, use_reentrant=False)):
        model.recompute = recompute
        with patch(model, {"blocks.3.mixer.output": torch.zeros_like}):
            answer = model(x).sum()
        found.append(torch.autograd.grad(answer, model.read_in.weight)[0])
    assert torch.equal(*found)


def take(model, names):
    with capture(model, names):
        pass


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (lambda m, x: take(m, 3), "sites: expected names such as 'blocks.0.output', got int 3"),
        (lambda m, x: take(m, ["logits", None]), "sites: expected names such as 'blocks.0.output', got NoneType"),
        (lambda m, x: take(m, "blocks.0.mixer.qkv_prj.output"), "did you mean 'blocks.0.mixer.qkv_proj.output'"),
        (lambda m, x: patch(m, ["logits"]).__enter__(), "patch: expected a mapping of sites to what goes there"),
        (lambda m, x: only(torch.zeros_like, places=3), "places: expected whole numbers in a list, got int 3"),
        (lambda m, x: only(torch.zeros_like, rows=[0.5]), "rows: expected whole numbers in a list, got list [0.5]"),
        (lambda m, x: only(only(torch.zeros_like, places=[1]), places=[2]), "this edit is of places [1] already"),
        (lambda m, x: ranks(1.5), "ranks: expected a whole number from 0 on, got float 1.5"),
        (lambda m, x: states_after(m, x, ["a"]), "places: expected whole numbers in a list"),
        (lambda m, x: states_after(m, [1], [0]), "states_after: expected inputs [B, T] or [B, T, d], got list [1]"),
        (lambda m, x: mixing(m, x, 0), "layers: expected whole numbers in a list, got int 0"),
        (lambda m, x: patch_effects(m, x, x.flip(1), None), "score: expected a function of the predictions"),
        (lambda m, x: attribution_effects(m, x, x.flip(1), len, []), "sites: expected one or more"),
        (lambda m, x: attribution_effects(m, x, x, lambda y: y[:, -1, 0]), "score alike"),
        (lambda m, x: patch_effects(m, x, x.flip(1), lambda y: y[:, -1, 0], by=None), "by: unknown part 'None'"),
        (lambda m, x: linear_probe(m, "regression"), "linear_probe: expected a task (contextlab.build_task makes one)"),
    ],
)
def test_what_nobody_can_answer_is_told_in_one_line(asked, said):
    with pytest.raises(InputError) as caught:
        asked(model_of(), tokens())
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_probe_tells_what_it_cannot_read():
    model = model_of({"mixer": "gla", "skip": 0.5}, read_in="vector", input_size=TASK.input_size, output_size=1)
    with pytest.raises(InputError, match=r"place: expected a whole number, got float 1\.5"):
        linear_probe(model, TASK, place=1.5)
    with pytest.raises(InputError, match="grows with the text"):
        linear_probe(model, TASK, sites="blocks.0.mixer.state", prompts=10, test=2)


@torch.no_grad()
def test_edits_of_edits_and_states_of_other_shapes():
    model, x = model_of("gated_delta_net"), tokens()
    both = only(torch.zeros_like, places=range(3, 4), heads=[0])
    assert only(only(torch.zeros_like, places=[3]), heads=torch.tensor([0])) == both
    other = model.read(x[:1])[1].layers[0]
    with pytest.raises(InputError, match="expected a state of"), patch(model, {"blocks.0.mixer.state": other}):
        model.read(x)
