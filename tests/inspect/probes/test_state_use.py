"""How much of a state is used: ranks that are known, and every mixer's state taken honestly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from contextlab import ModelSpec, build_model, build_task, capture, registry
from contextlab.inspect import Subject, parse_probe
from contextlab.inspect.held import mean_of, parts, state_sites, states_over
from contextlab.inspect.looking import look
from contextlab.inspect.probe import by, records
from contextlab.inspect.probes.state_use import RANK, SHARE, SPREAD, TOP, effective_rank, participation
from contextlab.tasks import AssociativeRecall
from contextlab.testing.readings import noisy

SIZES = {"width": 24, "heads": 2, "mlp_ratio": 2, "read_in": "token", "input_size": 16, "output_size": 16}


def model_of(mixer, options=None, **keys):
    layers = [{"mixer": mixer, "options": options or {}}]
    return noisy(build_model(ModelSpec.parse({"depth": 1, **SIZES, "layers": layers, **keys}), seed=0)).eval()


@dataclass(frozen=True)
class Few(AssociativeRecall):
    """Recall of which the model reads `symbols` symbols alone."""

    symbols: int = 3

    def sample(self, batch, generator, device="cpu"):
        prompt = super().sample(batch, generator, device)
        prompt.inputs.remainder_(self.symbols)
        return prompt


FEW = Few(vocabulary=16, pairs=4, length=24)


def test_effective_rank_by_its_definition():
    assert effective_rank(torch.tensor([2.0, 2, 2, 0, 0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([[1.0, 0], [3, 1]])).tolist() == pytest.approx(
        [1, math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))]
    )
    assert effective_rank(torch.zeros(4)).isnan()


def test_participation_is_that_of_the_covariance_also_where_prompts_are_few():
    generator = torch.Generator().manual_seed(0)
    spread = torch.cat([torch.full((8,), 2.0), torch.full((24,), 0.5)]).double()
    true = (spread.square().sum().square() / spread.pow(4).sum()).item()
    rows = spread * torch.randn(400, 24, 32, generator=generator, dtype=torch.float64)  # 24 rows of 32 numbers
    assert participation(rows).mean().item() == pytest.approx(true, rel=0.05)
    plain = torch.linalg.eigvalsh(rows[0].T.cov())
    assert (plain.sum().square() / plain.square().sum()).item() < 0.8 * true  # as it is without the correction


@pytest.mark.parametrize("mixer", ["attention", "linear_attention", "gated_delta_net", "mamba2", "rwkv7", "mamba"])
def test_a_text_of_three_symbols_fills_three_directions(mixer):
    options = {} if mixer in ("mamba", "rwkv7") else {"short_conv": 0}  # which look back: their writes differ more
    model = model_of(mixer, options, position="none", width=48).double()
    narrow, wide = (
        parse_probe("state_use:prompts=8").measure(Subject(model, task)).set_index(["measure", "what"])["value"]
        for task in (FEW, AssociativeRecall(vocabulary=16, pairs=4, length=24))
    )
    assert narrow[RANK].max() < wide[RANK].max()
    if options:
        assert narrow[RANK].max() <= 3 + 1e-6


def test_what_is_taken_is_the_state_of_a_written_model():
    task = build_task("linear_regression", dimensions=3, examples=12)
    model = build_model("gd_construction", dimensions=3, learning_rate=0.05).double()
    subject = Subject(model, task)
    found = parse_probe("state_use:prompts=5,places=1,top=2").measure(subject)
    value = found[found["head"].isna()].set_index("measure")["value"]
    with capture(model, ["blocks.0.mixer.k", "blocks.0.mixer.v"]) as taken, torch.no_grad():
        model(subject.prompts(5).inputs)
    written = np.einsum("bthk,bthv->bkv", taken["blocks.0.mixer.k"].numpy(), taken["blocks.0.mixer.v"].numpy())
    singular = np.linalg.svd(written, compute_uv=False)
    share = singular / singular.sum(-1, keepdims=True)
    rank = np.exp(-(share * np.log(share)).sum(-1)).mean()
    energy = (np.square(singular[:, :2]).sum(-1) / np.square(singular).sum(-1)).mean()
    assert [value[RANK], value[SHARE], value[TOP]] == pytest.approx([rank, rank / 3, energy])
    assert found["what"].iloc[0] == "matrix 3 x 8"


@torch.no_grad()
@pytest.mark.parametrize("entry", registry.entries("mixer"), ids=lambda entry: entry.name)
def test_every_state_has_parts_or_is_refused(entry):
    model = model_of(entry.name, dict(entry.cases[-1]))
    if not model.blocks[0].mixer.causal:
        task = AssociativeRecall(vocabulary=16, pairs=4, length=24)
        assert "keeps a state" in parse_probe("state_use").refusal(Subject(model, task))
        return
    (name,), (mixer,) = state_sites(model).keys(), state_sites(model).values()
    tokens = torch.randint(0, 16, (3, 30), generator=torch.Generator().manual_seed(0))
    for state in states_over(model, tokens, [0, 11, 29], [name])[name]:
        held = parts(state, mixer)
        assert held
        assert len({part.name for part in held}) == len(held)
        assert all(len(part.value) == 3 and part.value.ndim in (2, 4) for part in held)
    assert any(bool((part.value != 0).any()) for part in held)


@pytest.mark.parametrize(
    "entry", {each.family: each for each in registry.entries("mixer")}.values(), ids=lambda each: each.name
)
def test_every_family_is_measured(entry):
    model = model_of(entry.name, dict(entry.cases[-1]))
    if not model.blocks[0].mixer.causal:
        return
    found = look(model, AssociativeRecall(vocabulary=16, pairs=4, length=24), "state_use:prompts=4,places=2")
    told = by(records(found.table), "measure")
    assert RANK in told or SPREAD in told
    assert all(row["value"] >= 1 - 1e-6 for row in (*told.get(RANK, []), *told.get(SPREAD, [])))
    assert all(0 <= row["value"] <= 1 + 1e-9 for row in (*told.get(SHARE, []), *told.get(TOP, [])))


def test_means_have_intervals_within_bounds():
    row = mean_of(torch.tensor([1.0, 1, float("nan"), 1]), (0.0, 1.0))
    assert row["value"] == 1
    assert row["n"] == 3
    assert 0 < row["ci_low"] < 1 == row["ci_high"]
    assert "ci_low" not in mean_of(torch.ones(1))
