from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Some, Sums, Tiny
from torch import Tensor

from contextlab.errors import InputError
from contextlab.models import Model, build_model, load_model, preset
from contextlab.prompt import Prompt, Task
from contextlab.tasks import build_task
from contextlab.training import TrainResult, TrainSpec, train
from contextlab.training.checkpoint import newest
from contextlab.training.ensemble import Member, train_together

SHORT = TrainSpec(steps=8, batch=8, warmup=3, log_every=3, checkpoint_every=4, learning_rate=0.01)
WITHIN = 1e-9


def tiny(seed: int, scale: float = 1.0) -> Tiny:
    model = Tiny(seed).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def real(name: str, task: Task, seed: int) -> Model:
    return build_model(preset(name, width=16, depth=2, heads=2).for_task(task), seed=seed).double()


def both(*members: Member, folder: Path | None = None) -> list[tuple[TrainResult, TrainResult, Any]]:
    """Each trained alone and all together, from the same start: (together, alone, the model of alone)."""
    alone = []
    for member in members:
        model = type(member.model)(spec=member.model.spec) if isinstance(member.model, Model) else Tiny()
        model = model.to(next(member.model.parameters()).dtype)
        model.load_state_dict(member.model.state_dict())
        alone.append((train(model, member.task, member.spec, seed=member.seed), model))
    return [(one, *other) for one, other in zip(train_together(members), alone, strict=True)]


def assert_equal(members: Any, found: Any, within: float = WITHIN) -> None:
    for member, (together, alone, model) in zip(members, found, strict=True):
        assert (together.status, together.step) == (alone.status, alone.step)
        ours, theirs = together.history.drop(columns="seconds"), alone.history.drop(columns="seconds")
        assert ours["step"].tolist() == theirs["step"].tolist()
        assert abs(ours - theirs).to_numpy().max() < within * 100
        assert_same(member.model, model, within)


def assert_same(first: torch.nn.Module, second: torch.nn.Module, within: float = WITHIN) -> None:
    other = second.state_dict()
    for name, tensor in first.state_dict().items():
        assert float((tensor - other[name]).abs().max()) < within, name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_members_train_as_each_does_alone(optimizer: str) -> None:
    specs = [
        SHORT.model_copy(update={"optimizer": optimizer, **changes})
        for changes in (
            {},
            {"learning_rate": 0.03, "matrix_learning_rate": 0.05, "weight_decay": 0.3, "warmup": 1},
            {"clip": None, "betas": (0.8, 0.95), "final_fraction": 0.5},
            {"clip": 0.01, "steps": 5, "log_every": 2, "batch": 4},
        )
    ]
    tasks = [Sums(), Sums(scale=0.5), Some(), Sums(length=9)]
    members = [Member(tiny(i, 1 + i), task, spec, i) for i, (task, spec) in enumerate(zip(tasks, specs, strict=True))]
    start = [{n: p.clone() for n, p in each.model.named_parameters()} for each in members]
    found = both(*members)
    assert_equal(members, found)
    for member, before in zip(members, start, strict=True):
        for name, parameter in member.model.named_parameters():
            assert not torch.equal(parameter, before[name])
            assert parameter.untyped_storage().nbytes() == parameter.nbytes  # no view of the stack's any more


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("transformer", build_task("linear_regression", dimensions=3, examples=5)),
        ("gated_delta_net", build_task("associative_recall", vocabulary=16, pairs=3)),
        ("mamba", build_task("linear_regression", dimensions=3, examples=5)),
    ],
)
def test_seeds_of_a_model_train_as_each_does_alone(name: str, task: Task) -> None:
    spec = SHORT.model_copy(update={"steps": 3, "weight_decay": 0.1, "accumulate": 2})
    members = [Member(real(name, task, seed), task, spec, seed) for seed in range(2)]
    assert_equal(members, both(*members))


def test_in_float32_and_bfloat16_they_are_close() -> None:
    task = build_task("linear_regression", dimensions=3, examples=5)
    for precision, within in (("float32", 1e-5), ("bfloat16", 0.02)):
        spec = SHORT.model_copy(update={"steps": 4, "precision": precision, "optimizer": "adamw"})
        members = [Member(real("transformer", task, seed).float(), task, spec, seed) for seed in range(2)]
        assert_equal(members, both(*members), within)


def test_sets_curricula_and_tasks_in_turn() -> None:
    """What is drawn at a step, and by whom, is each member's own affair."""
    sets = SHORT.model_copy(update={"examples": 12, "optimizer": "adamw"})
    grown = TrainSpec.parse({**SHORT.model_dump(), "curriculum": {"used": {"start": 1, "end": 3, "every": 2}}})
    members = [
        Member(tiny(0), Sums(), sets, 0),
        Member(tiny(1), Sums(), sets, 1),
        Member(tiny(2), Sums(), grown.model_copy(update={"optimizer": "adamw"}), 2),
        Member(tiny(3), [Sums(length=4), Some(length=7)], SHORT.model_copy(update={"optimizer": "adamw"}), 3),
    ]
    assert_equal(members, both(*members))


def test_one_that_diverges_is_frozen_and_the_others_go_on() -> None:
    wild = {"learning_rate": 1e200, "weight_decay": 0.1, "warmup": 0, "optimizer": "adamw"}
    calm = SHORT.model_copy(update={"optimizer": "adamw"})
    members = [Member(tiny(0), Sums(), calm), Member(tiny(1), Sums(), SHORT.model_copy(update=wild))]
    (first, _, model), (second, alone_too, model_too) = both(*members)
    assert (first.status, second.status) == ("finished", "diverged")
    assert second.step == alone_too.step < 8
    assert "not finite at step" in second.message
    assert_same(members[0].model, model)
    for name, parameter in members[1].model.named_parameters():
        theirs = dict(model_too.named_parameters())[name]
        assert torch.isfinite(parameter).all()
        torch.testing.assert_close(parameter, theirs, rtol=1e-9, atol=0)


def test_a_failed_member_is_left_alone_until_its_numbers_are_read() -> None:
    """On a GPU a step is read late: the stack itself must not touch what has failed."""
    from contextlab.training.stack import Stack
    from contextlab.training.step import TrainState

    for optimizer in ("adamw", "muon"):
        spec = SHORT.model_copy(update={"optimizer": optimizer, "weight_decay": 0.1})
        models = [tiny(0), tiny(1)]
        states = [TrainState.start(model, spec, seed) for seed, model in enumerate(models)]
        stack, pairs = Stack(models, states, [spec, spec]), list(zip(states, models, strict=True))
        prompts = [Sums().sample(4, state.generator).to(torch.float64) for state in states]
        stack.step([Sums(), Sums()], prompts)
        before = [{k: v.clone() for k, v in {**s.optimizer, **m.state_dict()}.items()} for s, m in pairs]
        broken = prompts[0].with_tensors({**prompts[0].tensors(), "inputs": prompts[0].inputs * torch.nan})
        for given in (broken, prompts[0]):
            stack.step([Sums(), Sums()], [given, prompts[1]])
        assert stack.failed.tolist() == [1, 0]
        after = [{**s.optimizer, **m.state_dict()} for s, m in pairs]
        assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
        assert not any(torch.equal(tensor, after[1][name]) for name, tensor in before[1].items())
        assert all(tensor.isfinite().all() for tensor in after[1].values())


class TestCheckpoints:
    task = build_task("linear_regression", dimensions=3, examples=5)
    spec = SHORT.model_copy(update={"optimizer": "muon"})

    def members(self, *folders: Path | None) -> list[Member]:
        return [Member(real("transformer", self.task, s), self.task, self.spec, s, f) for s, f in enumerate(folders)]

    def test_they_are_those_of_train(self, tmp_path: Path) -> None:
        """Stopped together after a step, each goes on alone, or in other company, to the same end."""
        whole = self.members(None, None, None)
        train_together(whole)
        folders = [tmp_path / str(i) for i in range(3)]
        stopped = self.members(*folders)

        def stop(member: int, step: int, steps: int, loss: float) -> None:
            if (member, step) == (1, 3):
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            train_together(stopped, progress=stop)
        saved = [newest(folder) for folder in folders]
        assert [path.name for path in saved if path] == ["step_00000004"] * 3
        # one alone
        model = real("transformer", self.task, 0)
        result = train(model, self.task, self.spec, seed=0, folder=folders[0], resume=True)
        assert result.history["step"].tolist() == [3, 6, 8]
        assert_same(model, whole[0].model)
        # the one that has ended, one that is half way, and one that begins
        members = self.members(folders[0], folders[1], tmp_path / "new")
        found = train_together(members, resume=True)
        assert [each.step for each in found] == [8, 8, 8]
        for member, other in zip(members, whole, strict=True):
            assert_same(member.model, other.model)
        last = newest(folders[1])
        assert last is not None
        torch.testing.assert_close(
            load_model(last).state_dict()["read_in.weight"], members[1].model.state_dict()["read_in.weight"]
        )

    def test_a_folder_of_another_training_is_refused(self, tmp_path: Path) -> None:
        train_together(self.members(tmp_path / "a", tmp_path / "b"))
        with pytest.raises(InputError, match="seed was 1, now 0"):
            train_together(self.members(tmp_path / "b", tmp_path / "a"), resume=True)
        with pytest.raises(InputError, match="holds step_00000008 already"):
            train_together(self.members(tmp_path / "a"))


def test_what_cannot_go_together_says_so() -> None:
    regression = build_task("linear_regression", dimensions=3, examples=5)
    model = tiny(0)
    lstm = build_model({"width": 8, "depth": 1, "layers": [{"mixer": "lstm"}], "position": "none"} | _sizes(regression))
    for members, words in (
        ([], "expected a member or several, got none"),
        ([Member(model, Sums()), Member(model, Sums())], "two members have the same model"),
        ([Member(tiny(0), Sums()), Member(Tiny(width=4).double(), Sums())], "member 1's model has another spec"),
        ([Member(tiny(0), Sums()), Member(tiny(1).float(), Sums())], "parameters of one dtype, got float32 and float6"),
        ([Member(tiny(0), Sums(), {"optimizer": "adamw"}), Member(tiny(1), Sums())], "optimizer is adamw and muon"),
        ([Member(tiny(0), Sums(), {"compile": "on"})], "compile is 'on'"),
        ([Member(tiny(i), Sums(), folder="same") for i in range(2)], "two members have the same folder"),
        ([Member(lstm, regression)], "Lstm: PyTorch's LSTM and GRU take one set of weights; train each alone"),
    ):
        with pytest.raises(InputError, match=words):
            train_together(members)  # type: ignore[arg-type]


def _sizes(task: Task) -> dict[str, Any]:
    return {"read_in": task.read_in, "input_size": task.input_size, "output_size": task.output_size}


def test_a_module_that_pytorch_cannot_map_is_named() -> None:
    class Peeks(Tiny):
        def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(inputs) * (1 if inputs.sum().item() > 0 else 2)

    with pytest.raises(InputError, match="Peeks: several cannot be computed as one: vmap: It looks like"):
        train_together([Member(Peeks(seed).double(), Sums(), SHORT) for seed in range(2)])


def test_members_share_the_time_of_their_program() -> None:
    began = time.perf_counter()
    found = train_together([Member(tiny(seed), Sums(), SHORT, seed) for seed in range(3)])
    spent = time.perf_counter() - began
    shares = [result.history["seconds"].iloc[-1] for result in found]
    assert 0.2 * spent < sum(shares) <= spent
    assert all(result.seconds <= spent for result in found)


def test_a_loss_that_pytorch_cannot_map_is_taken_one_by_one() -> None:
    class Picks(Sums):
        def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
            return (prediction - prompt.targets)[prompt.scored].square().mean()

    members = [Member(tiny(seed), Picks(), SHORT, seed) for seed in range(2)]
    assert_equal(members, both(*members))


def test_members_pause_where_each_is_told_to(tmp_path: Path) -> None:
    def members(*pauses: int | None) -> list[Member]:
        return [Member(tiny(m), Sums(), SHORT, m, tmp_path / str(m), pause) for m, pause in enumerate(pauses)]

    with pytest.raises(InputError, match="pause: expected a step from 1 on"):
        train_together(members(3, 0, None), resume=True)
    first = train_together(members(3, 5, None), resume=True)
    assert [(each.status, each.step) for each in first] == [("paused", 3), ("paused", 5), ("finished", 8)]
    group = members(None, 5, None)
    second = train_together(group, resume=True)
    assert [(each.status, each.step) for each in second] == [("finished", 8), ("paused", 5), ("finished", 8)]
    alone = tiny(0)
    expected = train(alone, Sums(), SHORT, seed=0)
    assert second[0].history["step"].tolist() == expected.history["step"].tolist()
    assert_same(group[0].model, alone, WITHIN)
