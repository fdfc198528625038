"""Trainings of a run that go together; a GPU is played by a CPU that is asked for it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from contextlab import run
from contextlab.errors import InputError
from contextlab.experiments import ExperimentSpec, together
from contextlab.experiments.folder import RunFolder
from contextlab.experiments.jobs import first_jobs
from contextlab.models import build_model, load_model
from contextlab.training import train
from contextlab.training.checkpoint import newest

RUN = sys.modules["contextlab.experiments.run"]  # `experiments.run` is the function
MODEL = {"preset": "transformer", "options": {"width": 8, "depth": 1, "heads": 2}}
SPEC = {
    "name": "tiny",
    "tasks": {"regression": {"task": "linear_regression", "options": {"dimensions": 2, "examples": 4}}},
    "models": {"softmax": MODEL, "lstm": {**MODEL, "preset": "lstm"}},
    "train": {"steps": 4, "batch": 4, "log_every": 2},
    "evaluate": {"prompts": 16, "batch": 16},
    "seeds": [0, 1, 2],
}
SWEEP = {"over": {"train.learning_rate": [0.001, 0.003]}}


class Tape:
    """A Progress that remembers who made what steps."""

    def __init__(self) -> None:
        self.updates: list[tuple[str, int]] = []
        self.ended: dict[str, str] = {}

    def update(self, key: str, step: int, steps: int, loss: float) -> None:
        self.updates.append((key, step))

    def phase(self, key: str, text: str) -> None: ...

    def done(self, key: str, status: str, message: str) -> None:
        self.ended[key] = status


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of members of each program."""
    counts: list[int] = []
    real = together.train_together

    def counting(members: Any, **options: Any) -> Any:
        counts.append(len(members))
        return real(members, **options)

    monkeypatch.setattr(RUN, "wanted", lambda ensemble, device: ensemble == "auto")
    monkeypatch.setattr(together, "train_together", counting)
    return counts


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_run_trains_together_what_its_jobs_then_measure(played: list[int], tmp_path: Path) -> None:
    tape, given = Tape(), {**SPEC, "models": {"softmax": MODEL}, "seeds": [0, 1]}
    done = run(given, out=tmp_path / "run", progress=tape)
    assert (played, done.record["status"]) == ([2], "finished")
    assert set(tape.ended.values()) == {"finished"}
    keys = [f"regression.softmax.seed{seed}" for seed in range(2)]
    assert tape.updates == [(key, step) for step in (2, 4) for key in keys]  # and their jobs did not train again
    for training in ExperimentSpec.parse(given).trainings():
        alone = build_model(training.model, seed=training.seed)
        train(alone, list(training.tasks.values()), training.train, seed=training.seed)
        last = newest(tmp_path / "run" / "trainings" / training.key)
        assert last is not None
        for name, tensor in load_model(last).state_dict().items():
            assert float((tensor - alone.state_dict()[name]).abs().max()) < 1e-5


def test_what_trains_alone_is_left_to_its_job(
    played: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wide in (False, True):
        spec = ExperimentSpec.parse({**SPEC, "models": {"m": MODEL if wide else SPEC["models"]["lstm"]}})  # type: ignore[index]
        monkeypatch.setattr(together, "MOST_PARAMETERS", 10 if wide else 10**9)
        together.train_groups(RunFolder(tmp_path), spec, first_jobs(spec), torch.device("cpu"), Tape())
    assert played == []


def test_seeds_and_numbers_go_together_models_and_tasks_do_not() -> None:
    spec = ExperimentSpec.parse({**SPEC, "sweep": SWEEP})
    found = together.groups(spec, first_jobs(spec))
    assert [{(t.model_name, t.task_name) for t in group} for group in found] == [
        {("softmax", "regression")},
        {("lstm", "regression")},
    ]
    assert [len(group) for group in found] == [6, 6]
    assert len({(t.seed, t.train.learning_rate) for t in found[0]}) == 6
    alone = ExperimentSpec.parse({**SPEC, "seeds": [0]})
    assert together.groups(alone, first_jobs(alone)) == []
    compiled = ExperimentSpec.parse({**SPEC, "train": {**SPEC["train"], "compile": "on"}})  # type: ignore[dict-item]
    assert together.groups(compiled, first_jobs(compiled)) == []


def test_a_group_that_fails_is_left_to_its_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(members: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")

    monkeypatch.setattr(together, "train_together", full)
    spec = ExperimentSpec.parse({**SPEC, "models": {"softmax": MODEL}})
    with pytest.warns(UserWarning, match=r"softmax: 3 trainings go one by one: not enough memory: asked for 2.50 GiB"):
        together.train_groups(RunFolder(tmp_path), spec, first_jobs(spec), torch.device("cpu"), Tape())


def test_a_cpu_trains_each_alone_and_other_words_are_refused() -> None:
    assert together.wanted("auto", torch.device("cuda"))
    assert not together.wanted("auto", torch.device("cpu"))
    assert not together.wanted("off", torch.device("cuda"))
    with pytest.raises(InputError, match="unknown ensemble 'on'"):
        together.wanted("on", torch.device("cpu"))
