"""Merging against the published formulas, number by number."""

from __future__ import annotations

import math

import pytest
import torch

from contextlab import build_model, load_model, registry, save_model
from contextlab.convert import build_conversion, merge
from contextlab.convert.merging.methods import Ties, slerp, trimmed
from contextlab.errors import InputError
from contextlab.files import read_record
from contextlab.models import ModelSpec
from contextlab.testing.conversions import calibration, small_model, tokens
from tests.cli.conftest import call  # noqa: F401

FORMS = [(name, options) for name in registry.names("linear") for options in registry.lookup("linear", name).cases]
A, B, C = (small_model(seed=seed) for seed in (0, 1, 2))


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_an_average_is_the_mean():
    torch.testing.assert_close(flat(merge([A, B, C], "average").model), (flat(A) + flat(B) + flat(C)) / 3)
    torch.testing.assert_close(flat(merge([A, B], "average:weights=[3, 1]").model), 0.75 * flat(A) + 0.25 * flat(B))
    assert torch.equal(merge([A, B], "average", weights=(1.0, 0.0)).model(tokens()), A(tokens()))


def test_task_vectors_are_added():
    made = merge([A, B], "task_arithmetic:scale=0.3", base=C)
    torch.testing.assert_close(flat(made.model), flat(C) + 0.3 * (flat(A) - flat(C) + flat(B) - flat(C)))
    assert torch.equal(merge([A, B], "task_arithmetic:scale=0", base=C).model(tokens()), C(tokens()))


def test_ties_trims_elects_and_averages():
    made = flat(merge([A, B], "ties:density=0.3,scale=0.8", base=C).model).tolist()
    base = flat(C).tolist()
    vectors = [(flat(each) - flat(C)).tolist() for each in (A, B)]
    for vector in vectors:
        largest = sorted(vector, key=abs, reverse=True)[: round(0.3 * len(vector))]
        least = abs(largest[-1])
        vector[:] = [each if abs(each) >= least else 0.0 for each in vector]
    for i in range(0, len(base), 7):
        values = [vector[i] for vector in vectors]
        elected = math.copysign(1, sum(values))
        agree = [each for each in values if each * elected > 0]
        expected = base[i] + 0.8 * (sum(agree) / len(agree) if agree else 0.0)
        assert made[i] == pytest.approx(expected, abs=1e-12)


def test_trimming_keeps_the_largest():
    vector = torch.tensor([0.5, -3.0, 1.0, 0.0, 2.0])
    assert trimmed(vector, 0.4).tolist() == [0.0, -3.0, 0.0, 0.0, 2.0]
    assert torch.equal(trimmed(vector, 1.0), vector)


def test_slerp_is_on_the_great_circle():
    first, second = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    for t in (0.0, 0.25, 0.5, 1.0):
        angle = t * math.pi / 2
        expected = torch.tensor([2 * math.cos(angle), 2 * math.sin(angle)])
        torch.testing.assert_close(slerp(t, first, second), expected)
    assert slerp(0.25, first, 3 * first).tolist() == [3.0, 0.0]
    assert slerp(0.25, 0 * first, second).tolist() == [0.0, 0.5]
    made = merge([A, B], "slerp:t=0.3").model
    u, v = A.blocks[1].mlp.up.weight, B.blocks[1].mlp.up.weight
    angle = torch.acos((u * v).sum() / u.norm() / v.norm())
    expected = torch.sin(0.7 * angle) / torch.sin(angle) * u + torch.sin(0.3 * angle) / torch.sin(angle) * v
    torch.testing.assert_close(made.blocks[1].mlp.up.weight, expected)


def test_mergekits_own_spherical_interpolation_is_this_one():
    theirs = pytest.importorskip("mergekit.merge_methods.slerp").slerp
    u, v = A.blocks[1].mlp.up.weight.detach(), B.blocks[1].mlp.up.weight.detach()
    expected = theirs(torch.tensor([0.3]), u[None], v[None])[0]  # of mergekit 0.1.5 on: with a leading axis of models
    torch.testing.assert_close(slerp(0.3, u, v), expected)


def test_of_one_tensor_ties_is_mergekits():
    """It trims each tensor alone; of models with one tensor that is the whole task vector."""
    theirs = pytest.importorskip("mergekit.sparsify")
    mask = pytest.importorskip("mergekit.merge_methods.generalized_task_arithmetic").get_mask
    base, *models = (flat(each) for each in (C, A, B))
    kept = [theirs.sparsify(m - base, 0.3, theirs.SparsificationMethod.magnitude) for m in models]
    deltas = torch.stack(kept)
    agree = mask(deltas, method="sum")
    expected = base + 0.8 * (deltas * agree).sum(0) / agree.sum(0).clamp_min(1)
    ours = Ties(density=0.3, scale=0.8).merged([{"w": m} for m in models], {"w": base})["w"]
    differ = (ours - expected).abs() > 1e-9  # theirs keeps one number less, or more, where the share is no whole one
    assert differ.sum() <= 4


def test_what_does_not_fit_together_is_refused_in_one_line():
    other = build_conversion("drop_blocks")(B, calibration()).model
    for call_, message in (
        (lambda: merge([], "average"), "merge: expected models, got none"),
        (lambda: merge([A], "average"), "average: merges at least 2 models, got 1"),
        (lambda: merge([A, B, C], "slerp"), "slerp: merges 2 models, got 3"),
        (lambda: merge([A, B], "ties"), r"ties: needs the model that all were trained on from \(--base MODEL\)"),
        (lambda: merge([A, B], "average", base=C), "average: takes no base"),
        (lambda: merge([A, other], "average"), "of one spec; depth is 3, in model 2 it is 2"),
        (lambda: merge([A, B], "ties", base=other), "depth is 3, in the base it is 2"),
        (lambda: merge([A, B], "average:weights=[1]"), r"weights: expected 2, one for each model, not all 0, got \[1"),
        (lambda: merge([A, B], "magnitude"), "magnitude makes one model smaller; use `contextlab shrink`"),
        (lambda: merge([A, B], "stack"), "stack takes one model and no base; got 2 models"),
        (lambda: merge([A, torch.nn.Linear(2, 2)], "average"), "merge: expected a model of contextlab"),
    ):
        with pytest.raises(InputError, match=message) as found:
            call_()
        assert "\n" not in str(found.value)


@pytest.mark.parametrize("method", ["average", "slerp"])
@pytest.mark.parametrize(("name", "options"), FORMS, ids=lambda each: each if isinstance(each, str) else "")
def test_models_whose_layers_have_a_form_are_merged_by_their_weights_or_refused(name, options, method):
    spec = A.spec.model_dump() | {"linear": [{"layers": "*.mlp.up", "form": name, "options": options}]}
    first, second = (build_model(ModelSpec.parse(spec), seed=seed) for seed in (0, 1))
    form = first.blocks[0].mlp.up
    if set(dict(form.named_parameters())) <= {"weight", "bias"} and "weight" in dict(form.named_parameters()):
        made = merge([first, second], method).model.blocks[0].mlp.up.weight
        other = merge([second, first], method).model.blocks[0].mlp.up.weight
        torch.testing.assert_close(made, other)
        if method == "average":
            torch.testing.assert_close(made, (form.weight + second.blocks[0].mlp.up.weight) / 2)
        return
    with pytest.raises(InputError, match=rf"{method}: blocks.0.mlp.up is stored as {name}, in which weights cannot be"):
        merge([first, second], method)


def test_what_is_told_of_two_specs_is_short():
    spec = A.spec.model_dump() | {"linear": [{"layers": f"blocks.{i}.mlp.*", "form": "int"} for i in range(3)]}
    with pytest.raises(InputError, match="of one spec; linear") as found:
        merge([A, build_model(ModelSpec.parse(spec))], "average")
    assert len(str(found.value)) < 250


def test_the_command_merges_saved_models(call, tmp_path):  # noqa: F811
    for name, model in (("a", A), ("b", B), ("c", C)):
        save_model(model, tmp_path / name)
    code, out, err = call("merge", "a", "b", "--base", "c", "--method", "ties:density=0.5", "--out", "made")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    made = load_model(tmp_path / "made")
    assert torch.equal(flat(made), flat(merge([A, B], "ties", base=C, density=0.5).model))
    record = read_record(tmp_path / "made" / "shrink.json")
    assert (record["source"], record["base"]) == (["a", "b"], "c")
    assert record["steps"][0]["options"] == {"density": 0.5}
    code, out, err = call("merge", "a", "--method", "stack", "--out", "deeper")
    assert code == 0, err
    assert load_model(tmp_path / "deeper").spec.depth == 6
    assert call("merge", "a", "b", "--out", "made")[0] == 2
