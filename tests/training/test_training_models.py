"""Training of the library's own models on its own tasks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from contextlab.errors import InputError
from contextlab.models import build_model, load_model, preset
from contextlab.prompt import Task
from contextlab.tasks import build_task
from contextlab.training import CurriculumSpec, TrainSpec, optim, train
from contextlab.training.step import TrainState

TASKS = {
    "linear_regression": {"dimensions": 3, "examples": 6, "noise": 0.1},
    "associative_recall": {"vocabulary": 16, "pairs": 2, "length": 12},
}
SPEC = TrainSpec(steps=12, batch=8, warmup=3, log_every=3, checkpoint_every=5)


def small(task: Task) -> torch.nn.Module:
    return build_model(preset("transformer", width=16, depth=2, heads=2).for_task(task))


@pytest.mark.parametrize("name", list(TASKS))
def test_a_checkpoint_is_a_model_that_loads(name: str, tmp_path: Path) -> None:
    task = build_task(name, **TASKS[name])
    model = small(task)
    result = train(model, task, SPEC, folder=tmp_path)
    assert result.checkpoint is not None
    prompt = task.sample(4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(load_model(result.checkpoint)(prompt.inputs), model(prompt.inputs))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_each_parameter_is_updated_by_the_optimizer_that_is_asked_for(optimizer: str) -> None:
    """Momentum alone is Muon's memory; the squares are AdamW's."""
    model = build_model("transformer", width=16, depth=1, heads=2, input_size=3, output_size=1)
    state = TrainState.start(model, TrainSpec(optimizer=optimizer)).optimizer
    muon = set(optim.matrices(model)) if optimizer == "muon" else set()
    assert {name.removeprefix("momentum.") for name in state if name.startswith("momentum.")} == muon
    squares = {name.removeprefix("exp_avg_sq.") for name in state if name.startswith("exp_avg_sq.")}
    assert squares == {name for name, _ in model.named_parameters()} - muon


def test_muon_takes_the_projections_of_a_transformer() -> None:
    task = build_task("linear_regression", **TASKS["linear_regression"])
    taken = optim.matrices(small(task))
    assert "blocks.0.mlp.up.weight" in taken
    assert not {name for name in taken if "norm" in name or name.startswith("read_")}


def test_the_curriculum_of_garg_et_al() -> None:
    task = build_task("linear_regression", **TASKS["linear_regression"])
    dimensions, examples = (CurriculumSpec(start=a, end=b, every=2) for a, b in ((1, 3), (2, 6)))
    grows = {"active_dimensions": dimensions, "examples": examples}
    spec = SPEC.model_copy(update={"curriculum": grows})
    result = train(small(task), task, spec)
    assert result.history["tokens"].tolist() == [8 * 7, 8 * 18, 8 * 34, 8 * 52]
    with pytest.raises(InputError, match="did you mean 'dimensions'"):
        train(small(task), task, spec.model_copy(update={"curriculum": {"dimension": examples}}))
    with pytest.raises(InputError, match="built for 7"):
        train(small(task), task, spec.model_copy(update={"curriculum": {"dimensions": dimensions}}))


def test_loss_falls_on_regression() -> None:
    task = build_task("linear_regression", **TASKS["linear_regression"])
    result = train(small(task), task, {"steps": 400, "batch": 32, "learning_rate": 3e-3, "log_every": 50})
    assert result.history["loss"].iloc[-1] < 0.7 * result.history["loss"].iloc[0]
