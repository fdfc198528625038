"""Sparse dictionaries: planted features are found again, files are those of sae-lens, nothing is left in the model."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from contextlab import build_model, build_task, capture, patch
from contextlab.errors import InputError
from contextlab.inspect import Dictionary, Subject, parse_probe, train_dictionary
from contextlab.inspect.dictionaries import PutIn, dictionary_of
from contextlab.inspect.fitting import FitSpec, fit
from contextlab.inspect.probe import records
from contextlab.inspect.probes.dictionary import DEAD, L0, RECOVERED, TOLD

TASK = build_task("associative_recall", vocabulary=16, pairs=4, length=24)


def planted(count, active=3.0, seed=0):
    """Rows that are sums of a few of 36 known directions in 24 dimensions, and these. [count, 24], [36, 24]."""
    generator = torch.Generator().manual_seed(seed)
    true = F.normalize(torch.randn(36, 24, generator=torch.Generator().manual_seed(5)), dim=1)
    on = torch.rand(count, 36, generator=generator) < active / 36
    return (on * (0.5 + torch.rand(count, 36, generator=generator))) @ true + 0.5, true


def nearest(true, found):
    """Mean over true directions of the largest cosine to what was found."""
    return (true @ found.T).max(1).values.mean().item()


def fitted(x, y=None, **keys):
    spec = FitSpec(**{"units": 64, "k": 3, "steps": 400, "batch": 128, "learning_rate": 1e-2, **keys})
    return dictionary_of(fit(x, y, spec, torch.Generator().manual_seed(1)), spec, target="y" if y is not None else "")


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_planted_features_are_found_and_noise_has_none(kind):
    x, true = planted(6000, active=2.0)
    fresh, _ = planted(2000, active=2.0, seed=1)
    found, drawn = fitted(x, kind=kind, k=2 if kind == "jumprelu" else 3), fitted(x, kind=kind, steps=0)
    assert nearest(true, found.w_dec) > 0.9
    assert nearest(true, drawn.w_dec) < 0.6
    assert found.w_dec.norm(dim=1).tolist() == pytest.approx([1.0] * 64, abs=1e-4)

    def told(dictionary, rows):
        return 1 - ((dictionary(rows) - rows).square().sum() / (rows - rows.mean(0)).square().sum()).item()

    assert told(found, fresh) > 0.85
    active = (found.encode(fresh) > 0).sum(1).double()
    assert active.max() <= 3 if kind == "topk" else 1 < active.mean() < 3
    noise = torch.randn(6000, 24, generator=torch.Generator().manual_seed(2))  # as much of nothing sparse
    other = fitted(noise, kind=kind, steps=200)
    assert nearest(true, other.w_dec) < 0.6
    assert told(other, noise[:2000]) < told(found, fresh) - 0.1


def test_a_transcoder_tells_one_place_from_another():
    x, _ = planted(6000, active=2.0)
    turned = x @ torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(3)))[0][:, :18] * 2
    found = fitted(x, turned, kind="jumprelu", k=3)
    left = (found(x) - turned).square().sum() / (turned - turned.mean(0)).square().sum()
    assert left < 0.3
    assert found.w_dec.shape == (64, 18)


@pytest.fixture(scope="module")
def model():
    return build_model("gated_delta_net", width=16, depth=2, heads=2, read_in="token", input_size=16, output_size=16)


FEW = {"units": 24, "k": 3, "tokens": 600, "steps": 20, "batch": 64}


@pytest.mark.parametrize(("kind", "target"), [("topk", ""), ("jumprelu", ""), ("jumprelu", "blocks.1.mlp.output")])
def test_what_is_saved_is_what_is_loaded_here_and_by_sae_lens(model, tmp_path, kind, target):
    site = "blocks.1.mlp.input" if target else "blocks.1.output"
    found = train_dictionary(model, TASK, site, target=target, kind=kind, **FEW)
    again = Dictionary.load(found.save(tmp_path / "own"))
    x = 3 * torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(x), found(x))
    assert (again.site, again.target, again.kind, again.k) == (site, target, kind, 3)
    config = json.loads((tmp_path / "own" / "cfg.json").read_text())
    assert config["architecture"] == (f"{kind}_transcoder" if target else kind)
    theirs = pytest.importorskip("sae_lens")
    loaded = theirs.SAE.load_from_disk(str(tmp_path / "own"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), found(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(loaded.encode(x), found.encode(x), rtol=0, atol=1e-5)


def test_what_sae_lens_has_not_is_refused(model, tmp_path):
    found = train_dictionary(model, TASK, "blocks.1.mlp.input", target="blocks.1.mlp.output", **FEW)
    with pytest.raises(InputError, match="no TopK transcoder"):
        found.save(tmp_path)
    with pytest.raises(InputError, match="expected a folder"):
        Dictionary.load(tmp_path / "none")


def test_it_is_put_into_its_place(model):
    tokens = TASK.sample(3, torch.Generator().manual_seed(0)).inputs
    found = train_dictionary(model, TASK, "blocks.0.output", **FEW)
    with torch.no_grad():
        with capture(model, "blocks.0.output") as taken:
            model(tokens)
        with patch(model, {"blocks.0.output": found(taken["blocks.0.output"])}):
            expected = model(tokens)
        with patch(model, PutIn(found).edits):
            assert torch.equal(model(tokens), expected)
        across = train_dictionary(model, TASK, "blocks.0.mlp.input", target="blocks.0.mlp.output", **FEW)
        with capture(model, "blocks.0.mlp.input") as taken:
            model(tokens)
        with patch(model, {"blocks.0.mlp.output": across(taken["blocks.0.mlp.input"])}):
            expected = model(tokens)
        with patch(model, PutIn(across).edits):
            assert torch.equal(model(tokens), expected)


def test_a_dictionary_that_tells_all_recovers_all_of_the_loss():
    task = build_task("linear_regression", dimensions=3, examples=24)
    written = build_model("gd_construction", dimensions=3, learning_rate=0.3)
    probe = parse_probe("dictionary:site=embedded,units=64,k=64,tokens=4000,steps=600,batch=256,test=256")
    found = {row["measure"]: row for row in records(probe.measure(Subject(written, task)))}
    assert found[TOLD]["value"] > 0.97
    assert found[RECOVERED]["value"] > 0.8
    assert found[RECOVERED]["ci_low"] <= found[RECOVERED]["value"] <= found[RECOVERED]["ci_high"]
    assert 0 <= found[DEAD]["value"] < 1
    assert found[L0]["value"] <= 64
    assert found[TOLD]["control"] < found[TOLD]["value"]


def test_bad_input_is_told(model):
    for site, text in (("blocks.*.output", "one place"), ("blocks.0.mixer.state", "one place")):
        with pytest.raises(InputError, match=text):
            train_dictionary(model, TASK, site, **FEW)
    with pytest.raises(InputError, match="topk"):
        train_dictionary(model, TASK, "blocks.0.output", **{**FEW, "kind": "topks"})
    with pytest.raises(InputError, match="24 units"):
        train_dictionary(model, TASK, "blocks.0.output", **{**FEW, "k": 25})
