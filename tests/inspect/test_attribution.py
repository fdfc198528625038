"""AtP and AtP* against exhaustive patching: where they are exact, where gradients fail, and that the fixes help."""

from __future__ import annotations

import pytest
import torch

from contextlab import ModelSpec, build_model, build_task
from contextlab.inspect import Subject, attribution_effects, look
from contextlab.inspect.attribution import estimates, node_sites
from contextlab.inspect.causal import patch_scores
from contextlab.inspect.pairs import pairs_of
from contextlab.models import preset

V, T = 8, 9


def attention(depth=1, **options):
    layer = {"mixer": "attention", "options": options}
    return (
        build_model(
            ModelSpec(
                width=16,
                depth=depth,
                heads=4,
                mlp="none",
                norm="none",
                layers=[layer],
                read_in="token",
                input_size=V,
                output_size=V,
            )
        )
        .double()
        .eval()
    )


def texts(rows=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, V, (rows, T), generator=generator) for _ in range(2)]


def score(prediction):
    return prediction[:, -1, 2] - prediction[:, -2, 3]


def exhaustive(model, clean, corrupted, names, places):
    by = (("places",) if places else ()) + ("heads",)
    found = patch_scores(model, clean, corrupted, score, dict.fromkeys(names, by), controls=False)
    return {name: found.scores[name] - found.corrupted_score for name in names}


@pytest.mark.parametrize("places", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_of_one_layer_of_attention_the_fix_is_exact(kv_heads, places):
    model = attention(kv_heads=kv_heads)
    with torch.no_grad():
        model.blocks[0].mixer.qkv_proj.weight.mul_(6)  # sharp weights
    clean, corrupted = texts()
    names = node_sites(model)
    assert [name.rpartition(".")[2] for name in names] == ["q", "k", "v", "heads"]
    guess = estimates(model, clean, corrupted, score, names, places)
    assert guess.attended == [0]
    for name, exact in exhaustive(model, clean, corrupted, names, places).items():
        torch.testing.assert_close(guess.fixed[name].flatten(1).T, exact.abs())
        far = (guess.plain[name].flatten(1).T - exact).abs().max() > 1e-3 * exact.abs().max()
        assert far == name.endswith((".q", ".k"))  # without it, only what is linear is right


def test_a_key_that_would_turn_a_sure_softmax_over_is_found_by_the_fix_alone():
    task = build_task("induction_head", vocabulary=V, length=12, trigger="any")
    model = build_model("induction_construction", vocabulary=V, length=12).double().eval()
    pairs = pairs_of(Subject(model, task), 6)
    names = node_sites(model)
    keys = "blocks.1.mixer.k"
    for places in (True, False):
        guess = estimates(model, pairs.clean.inputs, pairs.corrupted.inputs, pairs.score, names, places)
        asked = {keys: ("places", "heads") if places else ("heads",)}
        found = patch_scores(model, pairs.clean.inputs, pairs.corrupted.inputs, pairs.score, asked, controls=False)
        exact = (found.scores[keys] - found.corrupted_score).abs()
        assert exact.max() > 1
        assert guess.plain[keys].abs().max() < 1e-9
        torch.testing.assert_close(guess.fixed[keys].flatten(1).T, exact)
    said = look(model, task, "attribution_patching:prompts=6").words
    assert "AtP all but misses" in said[-1]
    assert "the keys of head 1.0 (patching 100%, AtP 0%, AtP* 100%)" in said[-1]


def test_effects_that_cancel_to_first_order_are_found_by_dropping_gradients():
    """The MLP takes away what the mixer adds, up to a bound: near 0 nothing changes, far from it nearly all does."""
    model = build_model(
        ModelSpec(
            width=16, depth=2, heads=2, norm="none", layers=["attention"], read_in="token", input_size=V, output_size=V
        )
    ).double().eval()  # fmt: skip
    clean, corrupted = texts()
    with torch.no_grad():
        for parameter in (*model.blocks[0].mlp.parameters(), *model.blocks[1].mixer.parameters()):
            parameter.zero_()
        model.blocks[0].mixer.out_proj.weight.mul_(1000)
        model.read_in.weight[0] = 0  # of this token, values are 0: in the corrupted text nothing is beyond the bound
    model.blocks[1].mlp.forward = lambda x: -x.clamp(-1, 1)
    names = ["blocks.0.mixer.heads"]
    clean, near = clean.clamp_min(1), torch.zeros_like(corrupted)
    exact = exhaustive(model, clean, near, names, False)[names[0]].abs().mean(1)
    guess = estimates(model, clean, near, score, names, False)
    assert exact.min() > 1
    assert guess.plain[names[0]].abs().max() < 1e-9
    fixed = guess.fixed[names[0]].mean((0, 1))
    assert (fixed > exact / 2).all()


@pytest.mark.parametrize("mixer", ["attention", "gated_delta_net", "mamba2"])
def test_plain_estimates_are_those_of_attribution_effects(mixer):
    spec = ModelSpec(
        width=16, depth=2, heads=2, mlp_ratio=2, layers=[mixer], read_in="token", input_size=V, output_size=V
    )
    model = build_model(spec).double().eval()
    clean, corrupted = texts()
    site = "blocks.0.mixer.heads"
    found = estimates(model, clean, corrupted, score, node_sites(model)).plain[site].mean(0)
    table = attribution_effects(model, clean, corrupted, score, site)
    low = score(model(corrupted)).mean().item()
    assert found.flatten().tolist() == pytest.approx((table["score"] - low).tolist(), abs=1e-12)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_the_fix_is_only_for_a_softmax_over_all_tokens_so_far():
    clean, corrupted = texts()
    for position, fits in (("rope", [0]), ("none", [0]), ("alibi", [])):
        model = attention(position=position)
        assert estimates(model, clean, corrupted, score, node_sites(model)).attended == fits


def test_a_model_without_heads_is_taken_as_a_whole():
    task = build_task("associative_recall", vocabulary=16, pairs=3, length=12)
    model = build_model(preset("lstm", width=16, depth=2).for_task(task)).eval()
    assert node_sites(model) == ["blocks.0.mixer.output", "blocks.1.mixer.output"]
    said = look(model, task, "attribution_patching:prompts=4").words
    assert said[0].startswith("AtP finds ")
