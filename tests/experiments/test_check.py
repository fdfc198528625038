"""What a spec names is tried before the first step: each fault is one line, and nothing is written."""

from __future__ import annotations

import threading

import pytest
import torch

from contextlab import run
from contextlab.errors import InputError, ResourceError
from contextlab.experiments import ExperimentSpec
from contextlab.experiments import check as checking
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


def test_what_other_threads_draw_meanwhile_is_theirs(monkeypatch):
    """The shared stream is neither read nor put back, even where what is tried draws without a generator."""
    theirs: list[float] = []

    def draw(*arguments):
        torch.rand(3)  # as a plugin's task may
        other = threading.Thread(target=lambda: theirs.append(float(torch.rand(()))))
        other.start()
        other.join()

    monkeypatch.setattr("contextlab.experiments.check._try_room", draw)
    torch.manual_seed(3)
    check(ExperimentSpec.parse(tiny()), CPU)
    found = [*theirs, float(torch.rand(()))]
    torch.manual_seed(3)
    assert len(theirs) > 1
    assert found == [float(torch.rand(())) for _ in found]


def test_a_step_that_cannot_fit_is_refused_by_arithmetic(monkeypatch):
    spec = ExperimentSpec.parse(one(train={"steps": 1, "batch": 32, "accumulate": 2}))
    training = spec.trainings()[0]
    model, length = training.model, training.tasks["recall"].length
    least = 16 * length * 4 * (model.width * model.depth + model.output_size)
    monkeypatch.setattr("contextlab.memory.available_bytes", lambda: least)
    check(spec, CPU)
    monkeypatch.setattr("contextlab.memory.available_bytes", lambda: least - 1)
    told = rf"models.softmax \(for task recall\): not enough memory: a step on 16 x {length} tokens: .*train.batch"
    with pytest.raises(ResourceError, match=told):
        check(spec, CPU)


def test_a_large_model_is_read_by_one_layer_of_each_kind_and_made_whole(monkeypatch):
    sizes = []
    monkeypatch.setattr(checking, "LARGE_FLOPS", 1.0)

    def read(model, prompt):
        sizes.append(model.spec.depth)
        return model(prompt.inputs)

    monkeypatch.setattr(checking, "predict", read)
    deep = {"preset": "transformer", "options": {**MODEL["options"], "depth": 7}}
    check(ExperimentSpec.parse(one(models={"deep": deep})), CPU)
    assert sizes == [1]
    short = {"preset": "transformer", "options": {**deep["options"], "position": "learned", "max_length": 4}}
    with pytest.raises(InputError, match=r"models.short \(for task recall\): reading a prompt"):
        check(ExperimentSpec.parse(one(models={"short": short})), CPU)


def test_token_ids_that_no_model_knows_are_told(monkeypatch):
    sample = AssociativeRecall.sample

    def wrong(self, *arguments):
        prompt = sample(self, *arguments)
        prompt.inputs[0, 0] = self.input_size
        return prompt

    monkeypatch.setattr(AssociativeRecall, "sample", wrong)
    with pytest.raises(InputError, match=r"tasks.recall: drawing a prompt: expected token ids from 0 to \d+, got \d+"):
        check(ExperimentSpec.parse(one()), CPU)
