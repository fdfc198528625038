"""Which token looks at which: heads whose work is known, and matrices of layers of every family."""

from __future__ import annotations

import pytest
import torch

from contextlab import ModelSpec, build_model, capture
from contextlab.errors import InputError
from contextlab.inspect import head_scores, mixing
from contextlab.inspect.maps import SCORES


def repeated(vocabulary=8, half=12, batch=4):
    """Random tokens, and the same again."""
    first = torch.randint(0, vocabulary, (batch, half), generator=torch.Generator().manual_seed(0))
    return torch.cat((first, first), 1)


def scores_of(model, tokens):
    return head_scores(model, tokens).set_index(["score", "layer", "head"])["value"]


def test_written_heads_are_named_and_untrained_ones_are_not():
    written = build_model("induction_construction", vocabulary=8, length=24).double()
    found = scores_of(written, repeated())
    assert found["previous", 0, 0] > 0.999
    assert found["induction", 1, 0] > 0.999
    assert max(found[each, 0, 0] for each in SCORES if each != "previous") < 0.3
    assert max(found[each, 1, 0] for each in ("same", "previous", "duplicate", "bigram")) < 0.4
    twice = build_model("induction_construction", vocabulary=4, size=2, length=24).double()
    found = scores_of(twice, repeated(4))
    assert found["bigram", 1, 0] > 0.999 > 0.9 > found["induction", 1, 0]
    assert found["previous", 0, 0] > 0.999 > 0.5 > found["previous", 0, 1]
    untrained = build_model("transformer", width=16, depth=2, heads=2, input_size=8, output_size=8, read_in="token")
    assert scores_of(untrained, repeated()).max() < 0.6


def test_scores_are_means_of_the_matrix_by_their_definition():
    spec = ModelSpec(
        width=12, depth=1, heads=2, layers=["gated_delta_net"], read_in="token", input_size=5, output_size=5
    )
    model = build_model(spec).double()
    tokens = torch.tensor([[0, 1, 0, 2, 0, 1], [3, 3, 4, 1, 3, 4], [0, 1, 2, 1, 0, 1]])
    matrix = mixing(model, tokens)["blocks.0.mixer"].abs()
    found = scores_of(model, tokens)
    for head in range(2):
        shares = matrix[:, head] / matrix[:, head].sum(-1, keepdim=True)
        wanted = {score: [] for score in SCORES}
        for b, row in enumerate(tokens.tolist()):
            for t in range(6):
                earlier = [s for s in range(t) if row[s] == row[t]]
                twice = [s + 1 for s in earlier if s and row[s - 1] == row[t - 1]]
                places = {
                    "previous": [t - 1] if t else [],
                    "same": [t],
                    "duplicate": earlier,
                    "induction": [s + 1 for s in earlier],
                    "bigram": twice if len(twice) < len(earlier) else [],
                    "first": [0] if t else [],
                }
                for score, at in places.items():
                    if at:
                        wanted[score].append(shares[b, t, at].sum().item())
        for score, values in wanted.items():
            assert found[score, 0, head] == pytest.approx(sum(values) / len(values))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mambaformer", "gated_delta_net", "based", "retnet"])
def test_matrices_of_every_layer_give_its_heads(name):
    model = build_model(name, width=16, heads=2, depth=2, input_size=6, output_size=6, read_in="token").double().eval()
    tokens = repeated(6, 5, 2)
    found = mixing(model, tokens)
    with capture(model, ["blocks.*.mixer.v", "blocks.*.mixer.heads"]) as taken:
        model(tokens)
    assert list(found) == [f"blocks.{i}.mixer" for i in range(len(model.blocks))][-len(found) :]
    for layer, matrix in found.items():
        v = taken[f"{layer}.v"]
        v = v.repeat_interleave(matrix.shape[1] // v.shape[2], 2)
        torch.testing.assert_close(
            torch.einsum("bhts,bshd->bthd", matrix, v), taken[f"{layer}.heads"], rtol=1e-9, atol=1e-9
        )


def test_who_tells_nothing_is_named():
    model = build_model(
        ModelSpec(width=8, depth=2, heads=2, layers=["attention", "lstm"], read_in="token", input_size=5, output_size=5)
    )
    tokens = repeated(5, 4, 1)
    assert list(mixing(model, tokens)) == ["blocks.0.mixer"]
    with pytest.raises(InputError, match="mixing: blocks.1 tells no matrices; those that do are blocks.0"):
        mixing(model, tokens, [1])
    lstm = build_model("lstm", width=8, input_size=5, output_size=5, read_in="token")
    with pytest.raises(InputError, match="no layer of this model tells"):
        head_scores(lstm, tokens)
    with pytest.raises(InputError, match="expected token ids"):
        head_scores(model, tokens.float())


def test_vectors_have_the_scores_that_need_no_tokens():
    model = build_model("gated_delta_net", width=8, depth=1, heads=2, input_size=3, output_size=1).double()
    found = head_scores(model, torch.randn(3, 7, 3, dtype=torch.float64))
    assert set(found["score"]) == {"previous", "same", "first"}
    assert ((found["ci_low"] <= found["value"]) & (found["value"] <= found["ci_high"])).all()


def test_a_score_without_a_place_is_left_out():
    model = build_model("transformer", width=8, depth=1, heads=2, read_in="token", input_size=9, output_size=9)
    found = head_scores(model, torch.arange(9)[None])
    assert set(found["score"]) == {"previous", "same", "first"}
    assert found["ci_low"].isna().all()  # of one prompt
