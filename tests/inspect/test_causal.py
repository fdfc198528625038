"""Activation and attribution patching: mechanisms that are known, and one place after the other."""

from __future__ import annotations

import pytest
import torch

from contextlab import ModelSpec, build_model, patch
from contextlab.errors import InputError
from contextlab.inspect import attribution_effects, only, patch_effects

V, T = 8, 10


def induction_texts():
    """A text in which a token comes again, at the end, and the same with another in its first place."""
    clean = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 7, 2], [7, 6, 5, 4, 3, 2, 1, 0, 0, 5]])
    corrupted = clean.clone()
    corrupted[:, 2] = torch.tensor([6, 0])
    return clean, corrupted, clean[:, 3]


def answered(answer):
    """The logit of the answer at the last place, less the mean of all."""
    return lambda y: y[:, -1].gather(1, answer[:, None])[:, 0] - y[:, -1].mean(1)


def test_the_written_mechanism_is_found_and_nothing_else():
    model = build_model("induction_construction", vocabulary=V, length=T).double()
    clean, corrupted, answer = induction_texts()
    found = patch_effects(model, clean, corrupted, answered(answer))
    large = {(r.site, r.place, r.head) for r in found.itertuples() if abs(r.effect) > 0.01}
    # Layer 0 tells place 3 what stood before it, by which layer 1 finds it from the last place.
    assert large == {("blocks.0.mixer.heads", 3, 0), ("blocks.1.mixer.heads", T - 1, 0)}
    assert all(found.loc[found["effect"].abs() > 0.01, "effect"].between(0.999, 1.001))
    streams = patch_effects(model, clean, corrupted, answered(answer), "blocks.*.input", by=["places"])
    first = streams[streams["effect"] > 0.5].set_index("site")["place"]
    assert first.to_dict() == {"blocks.0.input": 2, "blocks.1.input": 3}  # the carrier moves on by one place


def random_texts(width):
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(0, V, (3, T), generator=generator) for _ in range(2))


@torch.no_grad()
@pytest.mark.parametrize("by", [("places", "heads"), ("places",), ("heads",), ()])
@pytest.mark.parametrize("mixer", ["attention", "gated_delta_net", "mamba2"])
def test_many_at_once_are_as_one_after_the_other(mixer, by, monkeypatch):
    monkeypatch.setattr("contextlab.inspect.causal.AT_ONCE", 3 * T * 7)  # seven copies of the rows
    spec = ModelSpec(
        width=16, depth=2, heads=2, mlp_ratio=2, layers=[mixer], read_in="token", input_size=V, output_size=V
    )
    model = build_model(spec).double().eval()
    clean, corrupted = random_texts(16)
    score = answered(torch.tensor([1, 2, 3]))
    site = "blocks.1.mixer.heads"
    found = patch_effects(model, clean, corrupted, score, site, by)
    heads = model.blocks[1].mixer.heads
    assert len(found) == (T if "places" in by else 1) * (heads if "heads" in by else 1)
    from contextlab import capture

    with capture(model, site) as taken:
        high = score(model(clean)).mean()
    low = score(model(corrupted)).mean()
    for row in found.itertuples():
        part = (
            {"places": None if row.place is None or row.place != row.place else [row.place]} if "places" in by else {}
        )
        part |= {"heads": [row.head]} if "heads" in by else {}
        with patch(model, {site: only(taken[site], **part)}):
            one = score(model(corrupted)).mean()
        assert row.score == pytest.approx(one.item(), rel=1e-9)
        assert row.effect == pytest.approx(((one - low) / (high - low)).item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("by", [("places", "heads"), ("places",), ("heads",)])
def test_where_the_answer_is_linear_the_gradient_tells_all(by):
    """A layer without norms and MLP: logits are linear in the heads' answers."""
    spec = ModelSpec(
        width=16,
        depth=1,
        heads=2,
        mlp="none",
        norm="none",
        layers=["attention"],
        read_in="token",
        input_size=V,
        output_size=V,
    )
    model = build_model(spec).double()
    clean, corrupted = random_texts(16)
    score = answered(torch.tensor([1, 2, 3]))
    exact, estimate = (
        each(model, clean, corrupted, score, ["blocks.0.mixer.heads"], by)
        for each in (patch_effects, attribution_effects)
    )
    assert estimate[["site", "place", "head"]].equals(exact[["site", "place", "head"]])
    torch.testing.assert_close(torch.tensor(estimate["effect"].to_numpy()), torch.tensor(exact["effect"].to_numpy()))
    assert exact["effect"].abs().max() > 0.01
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_estimates_are_of_embeddings_and_streams_too():
    model = build_model(
        "gated_delta_net", width=16, depth=2, heads=2, input_size=V, output_size=V, read_in="token"
    ).double()
    clean, _ = random_texts(16)
    corrupted = clean.clone()
    corrupted[:, 4] = (corrupted[:, 4] + 1) % V
    found = attribution_effects(
        model, clean, corrupted, answered(torch.tensor([1, 2, 3])), ["embedded", "blocks.1.input"], ["places"]
    )
    embedded = found[found["site"] == "embedded"].set_index("place")["effect"]
    assert embedded[4] != 0
    assert (embedded.drop(4) == 0).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"corrupted": torch.zeros(2, T - 1, dtype=torch.int64)},
            "expected two texts of one shape, got [2, 10] and [2, 9]",
        ),
        ({"corrupted": torch.zeros(2, T, dtype=torch.int64)}, "the clean and the corrupted text score alike"),
        ({"sites": "blocks.0.input"}, "blocks.0.input: has no heads, but is [2, 10, 16]; leave heads out of by"),
        ({"by": ("place",)}, "by: unknown part 'place'; did you mean 'places'?"),
        ({"score": lambda y: y.sum()}, "score: expected a value for each of the 2 rows, [2], got []"),
        ({"sites": "blocks.0.mixer.hads"}, "unknown site 'blocks.0.mixer.hads'; did you mean 'blocks.0.mixer.heads'"),
    ],
)
@pytest.mark.parametrize("effects", [patch_effects, attribution_effects])
def test_what_cannot_be_asked_is_told_in_one_line(effects, change, said):
    model = build_model("transformer", width=16, depth=1, heads=2, input_size=V, output_size=V, read_in="token")
    given = {
        "clean": torch.zeros(2, T, dtype=torch.int64),
        "corrupted": torch.ones(2, T, dtype=torch.int64),
        "score": lambda y: y[:, -1, 0],
        **change,
    }
    with pytest.raises(InputError) as caught:
        effects(model, **given)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
