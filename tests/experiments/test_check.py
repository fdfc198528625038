"""What a spec names is tried before the first step: each fault is one line, and nothing is written."""

from __future__ import annotations

import pytest
import torch

from contextlab import run
from contextlab.errors import InputError, ResourceError
from contextlab.experiments import ExperimentSpec
from contextlab.experiments.check import check
from contextlab.learners.recall import Lookup
from contextlab.tasks.recall import AssociativeRecall
from tests.experiments.test_run import COMPRESS, MODEL, one, tiny

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"evaluate": {"splits": ["trian"]}},
            r"evaluate.splits \(for task recall\): unknown split 'trian'; did",
        ),
        ({"evaluate": {"learners": ["lokup"]}}, r"evaluate.learners \(for task recall\): unknown learner .*'lookup'"),
        ({"evaluate": {"splits": []}}, "evaluate.splits: .*at least 1"),
        ({"evaluate": {"learners": []}}, "evaluate.learners: .*at least 1"),
        ({"seeds": []}, "seeds: expected one or more"),
        ({"models": {}}, "models: expected at least one"),
        ({"tasks": {}}, "tasks: expected at least one"),
        (
            {"tasks": {"recall": {**tiny()["tasks"]["recall"], "evaluate": {"splits": ["x"]}}}},
            "tasks.recall.evaluate.splits: unknown split 'x'",
        ),
    ],
)
def test_faults_are_told_before_anything_is_trained(changes, message, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        run(one(**changes), out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_policies_are_tried_on_tasks_that_the_model_reads(tmp_path):
    spec = {**COMPRESS, "compress": {**COMPRESS["compress"], "tasks": ["linear_regression"]}}
    with pytest.raises(InputError, match="compress.tasks: softmax.all reads linear_regression at 192 tokens: "):
        run(spec, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (ZeroDivisionError("by zero"), InputError, "failed with ZeroDivisionError: by zero"),
        (InputError("it cannot"), InputError, "it cannot"),
        (MemoryError(), ResourceError, "not enough memory"),
    ],
)
def test_a_task_that_cannot_draw_and_a_learner_that_cannot_answer(monkeypatch, raised, kind, said):
    def fail(*arguments, **options):
        raise raised

    spec = ExperimentSpec.parse(one())
    with monkeypatch.context() as patch:
        patch.setattr(AssociativeRecall, "sample", fail)
        with pytest.raises(kind, match=f"tasks.recall: drawing a prompt: .*{said}"):
            check(spec, CPU)
    monkeypatch.setattr(Lookup, "__call__", fail)
    with pytest.raises(kind, match=f"tasks.recall: its learner lookup answers a prompt: .*{said}"):
        check(spec, CPU)


def test_a_model_that_cannot_read_the_prompts():
    short = {"preset": "transformer", "options": {**MODEL["options"], "position": "learned", "max_length": 4}}
    with pytest.raises(InputError, match=r"models.short \(for task recall\): reading a prompt"):
        check(ExperimentSpec.parse(one(models={"short": short})), CPU)


def test_no_random_stream_is_disturbed():
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    check(ExperimentSpec.parse(tiny()), CPU)
    assert torch.equal(torch.rand(4), wanted)
    assert torch.is_grad_enabled()
