"""The templates that CONTRIBUTING hands to newcomers work, are short, and keep the laws."""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from contextlab import build_mixer, build_model, build_policy, registry, run
from contextlab.evaluation import Measured
from contextlab.experiments import load_recipe
from contextlab.plugins import load_plugins
from contextlab.report.sections import TaskData
from contextlab.testing import check

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module", autouse=True)
def _forgotten_afterwards():
    """What the templates register, which other tests would count."""
    before = {kind: dict(entries) for kind, entries in registry._entries.items()}
    yield
    registry._entries.update(before)
    for name in [name for name in sys.modules if name.startswith("contextlab_plugin_")]:
        del sys.modules[name]


def test_the_example_mixer_keeps_the_split_law_and_joins_the_demo(tmp_path):
    load_plugins([str(ROOT / "examples" / "my_mixer.py")])
    mixer = build_mixer("forgetful_attention", width=16).double()
    x = torch.randn(2, 70, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(70)[None] >= torch.tensor([[0], [5]])
    with torch.no_grad():
        whole, state = mixer(x)
        first, before = mixer(x[:, :33])
        second, after = mixer(x[:, 33:], before)
        padded, _ = mixer(x, mask=mask)
        alone, _ = mixer(x[1:, 5:])
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=0, atol=1e-9)
    torch.testing.assert_close(padded[1:, 5:], alone, rtol=0, atol=1e-9)
    assert state.nbytes == after.nbytes == mixer.state_nbytes(70, batch=2, dtype=torch.float64)

    changes = [
        "models={transformer: {preset: transformer}, mine: {spec: {layers: [forgetful_attention]}}}",
        "tasks.regression.train.steps=2",
        "tasks.recall.train.steps=2",
        "evaluate.prompts=8",
    ]
    done = run(load_recipe("demo", changes), out=tmp_path / "run")
    assert {r["status"] for r in done.records} == {"finished"}
    assert "mine" in set(done.results["model"])


LINES = {
    "my_mixer.py": 60,
    "my_task.py": 60,
    "my_policy.py": 25,
    "my_conversion.py": 25,
    "my_probe.py": 45,
    "my_recipe.yaml": 10,
    "my_figure.py": 15,
}


def test_the_templates_are_short_and_each_has_its_page():
    files = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("my_*.*")}
    assert set(files) == set(LINES)
    for name, lines in files.items():
        assert lines <= LINES[name], name
        assert name in (ROOT / "CONTRIBUTING.md").read_text()
        assert any(name in page.read_text() for page in (ROOT / "docs" / "extend").glob("*.md"))


@pytest.mark.parametrize(
    ("kind", "name", "file"),
    [
        ("mixer", "forgetful_attention", "my_mixer.py"),
        ("task", "hidden_shift", "my_task.py"),
        ("learner", "shift_reader", "my_task.py"),
        ("policy", "longest_values", "my_policy.py"),
        ("conversion", "relative_size", "my_conversion.py"),
        ("probe", "stream_size", "my_probe.py"),
    ],
)
def test_the_templates_keep_the_laws(kind, name, file):
    load_plugins([str(EXAMPLES / file)])
    held = list(check(kind, name, examples=3))
    assert held
    assert not [each.broken for each in held if each.broken]


def test_the_template_of_a_policy_keeps_the_longest_values():
    load_plugins([str(EXAMPLES / "my_policy.py")])
    policy = build_policy("longest_values", budget="8tok", sinks=0, window=1)
    model = build_model(
        "transformer", width=16, depth=1, heads=1, read_in="token", input_size=32, output_size=32
    ).eval()
    tokens = torch.randperm(32)[None]  # no two have the same value
    with torch.no_grad():
        _, full = model.read(tokens)
        with policy.attach(model):
            _, state = model.read(tokens)
    norms = full.layers[0].values[0, 0].norm(dim=-1)[:-1]  # the window is kept in any case
    kept = set(state.layers[0].positions[0, 0].tolist()) - {31}
    assert kept == set(norms.topk(7).indices.tolist())


def test_the_template_of_a_recipe_is_an_experiment():
    spec = load_recipe(str(EXAMPLES / "my_recipe.yaml"), [])
    assert len(spec.trainings()) == 4


def test_the_template_of_a_figure_draws_quality_by_parameters():
    load_plugins([str(EXAMPLES / "my_figure.py")])
    rows = [
        {
            "run": "r",
            "model": model,
            "kind": "model",
            "seed": 0,
            "task": "t",
            "split": split,
            "metric": metric,
            "value": v,
        }
        for model, accuracy, parameters in (("a", 0.5, 100.0), ("b", 0.75, 200.0))
        for split, metric, v in (("train", "accuracy", accuracy), ("cost", "parameters", parameters))
    ]
    results = pd.DataFrame(rows).assign(shot=None, length=8, ci_low=0.0, ci_high=1.0, n=4)
    figure = registry.lookup("figure", "what_parameters_buy").factory(TaskData("t", Measured(results), []))
    assert list(figure.data[0].x) == [100.0, 200.0]
    assert list(figure.data[0].y) == [0.5, 0.75]
    assert list(figure.data[0].text) == ["a", "b"]
