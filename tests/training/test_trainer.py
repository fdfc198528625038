from __future__ import annotations

import copy
import math
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_training import Some, Sums, Tiny
from torch import Tensor

from contextlab.errors import InputError, ResourceError
from contextlab.prompt import Prompt
from contextlab.training import CurriculumSpec, TrainSpec, TrainState, train, train_step
from contextlab.training.distributed import generator
from contextlab.training.step import loss_and_gradients

SHORT = TrainSpec(steps=30, batch=16, warmup=5, log_every=4, checkpoint_every=10)


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_lowers_the_loss(optimizer: str) -> None:
    calls: list[tuple[int, int, float]] = []
    spec = {
        "steps": 150,
        "batch": 32,
        "warmup": 5,
        "optimizer": optimizer,
        "learning_rate": 0.01,
        "log_every": 20,
    }
    result = train(Tiny(), Sums(), spec, progress=lambda *call: calls.append(call))
    assert result.status == "finished"
    assert result.step == 150
    assert list(result.history.columns) == [
        "step",
        "loss",
        "learning_rate",
        "gradient_norm",
        "tokens",
        "seconds",
    ]
    assert result.history["step"].tolist() == [20, 40, 60, 80, 100, 120, 140, 150]
    assert result.history["loss"].iloc[-1] < 0.1 * result.history["loss"].iloc[0]
    assert result.history["tokens"].iloc[-1] == 150 * 32 * 6
    assert result.steps_per_second == pytest.approx(150 / result.seconds)
    assert [(step, steps) for step, steps, _ in calls] == [(s, 150) for s in result.history["step"]]


def test_a_seed_decides_everything_and_the_global_generator_nothing() -> None:
    found = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        model = Tiny()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        result = train(model, Sums(), SHORT, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        found.append((result.history["loss"].tolist(), weights(model)))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])
    assert found[0][0] != found[2][0]


def test_the_step_is_a_function_of_its_arguments() -> None:
    model = Tiny()
    state = TrainState.start(model, SHORT, seed=3)
    for _ in range(3):
        train_step(model, Sums(), SHORT, state)
    twin = copy.deepcopy(model)
    twin_state = TrainState(
        dict(twin.named_parameters()),
        {name: tensor.clone() for name, tensor in state.optimizer.items()},
        state.generator.clone_state(),
        state.step,
        state.failed.clone(),
    )
    first, second = (train_step(m, Sums(), SHORT, s) for m, s in ((model, state), (twin, twin_state)))
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.gradient_norm, second.gradient_norm)
    assert_same(weights(model), weights(twin))
    assert_same(state.optimizer, twin_state.optimizer)


@pytest.mark.parametrize("task", [Sums(), Some()], ids=["all_scored", "some_scored"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts: int, task: Sums) -> None:
    model = Tiny().double()
    prompt = task.sample(8, torch.Generator().manual_seed(0)).to(torch.float64)
    params: dict[str, Tensor] = dict(model.named_parameters())
    whole, expected = loss_and_gradients(model, task, TrainSpec(batch=8), params, prompt)
    loss, found = loss_and_gradients(model, task, TrainSpec(batch=8, accumulate=parts), params, prompt)
    torch.testing.assert_close(loss, whole.detach())
    for name in params:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-12, atol=1e-14)


def test_a_training_is_the_same_however_its_batches_are_cut() -> None:
    found = []
    for parts in (1, 2, 4):
        model = Tiny().double()
        result = train(model, Some(), SHORT.model_copy(update={"accumulate": parts}))
        found.append((torch.tensor(result.history[["loss", "gradient_norm"]].to_numpy()), weights(model)))
    for other in found[1:]:
        torch.testing.assert_close(other[0], found[0][0], rtol=1e-6, atol=0)
        for name, tensor in found[0][1].items():
            torch.testing.assert_close(other[1][name], tensor, rtol=1e-6, atol=1e-9)


def test_a_double_precision_model_trains() -> None:
    model = Tiny().double()
    assert train(model, Sums(), SHORT).status == "finished"
    assert model.read_in.weight.dtype == torch.float64


def test_a_curriculum_changes_the_prompts() -> None:
    spec = SHORT.model_copy(update={"curriculum": {"length": CurriculumSpec(start=2, end=6, every=1)}})
    result = train(Tiny(), Sums(), spec)
    assert result.history["tokens"].tolist()[0] == 16 * (2 + 3 + 4 + 5)


@dataclass(frozen=True)
class Poisoned(Sums):
    """The loss is not a number for a few of the batches."""

    limit: float = 0.25

    def poisons(self, prompt: Prompt) -> Tensor:
        return prompt.inputs.mean() > self.limit

    def loss(self, prediction: Tensor, prompt: Prompt) -> Tensor:
        return super().loss(prediction, prompt) * torch.where(self.poisons(prompt), math.nan, 1.0)


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path: Path) -> None:
    task = Poisoned(limit=0.1)
    stream = generator(0, 0, torch.device("cpu"))
    bad = next(step for step in range(1, 1000) if task.poisons(task.sample(16, stream)))
    assert bad > 1
    spec = SHORT.model_copy(update={"steps": 1000, "warmup": 0})
    model = Tiny()
    result = train(model, task, spec, folder=tmp_path)
    assert result.status == "diverged"
    assert result.step == bad
    assert f"at step {bad}" in result.message
    assert math.isnan(result.history["loss"].iloc[-1])
    # The parameters are those after the last good step.
    other = Tiny()
    state = TrainState.start(other, spec)
    for _ in range(bad - 1):
        train_step(other, task, spec, state)
    assert_same(weights(model), weights(other))
    again = train(Tiny(), task, spec, folder=tmp_path, resume=True)
    assert (again.status, again.step) == ("diverged", bad)


def test_after_a_bad_gradient_no_later_step_changes_anything() -> None:
    """Where losses are not read at each step (CUDA), steps go on until the next look, and must do nothing."""
    task, model = Poisoned(limit=-10.0), Tiny()
    state = TrainState.start(model, SHORT)
    before, moments = weights(model), {n: t.clone() for n, t in state.optimizer.items()}
    train_step(model, task, SHORT, state)
    train_step(model, Sums(), SHORT, state)
    assert_same(weights(model), before)
    assert_same(state.optimizer, moments)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_goes_on_exactly(tmp_path: Path, number: int) -> None:
    whole = Tiny()
    expected = train(whole, Sums(), SHORT)

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 12:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(Tiny(), Sums(), SHORT, folder=tmp_path, progress=stop)
    assert signal.getsignal(number) is before
    stopped = sorted(path.name for path in tmp_path.iterdir())
    assert stopped[:-1] == ["step_00000010"]  # the last one before stays, in case the newest is damaged
    assert stopped[-1] in ("step_00000012", "step_00000013")
    resumed = Tiny(seed=9)
    result = train(resumed, Sums(), SHORT, folder=tmp_path, resume=True)
    assert_same(weights(resumed), weights(whole))
    for column in ("step", "loss", "learning_rate", "gradient_norm", "tokens"):
        assert result.history[column].tolist() == expected.history[column].tolist()


def test_a_training_that_pauses_goes_on_exactly(tmp_path: Path) -> None:
    spec = TrainSpec(steps=9, batch=8, log_every=4, checkpoint_every=0, warmup=2)
    whole = Tiny()
    expected = train(whole, Sums(), spec)
    for seed, pause in ((0, 3), (5, 3), (6, 7)):  # where it is already, nothing is done
        model = Tiny(seed)  # goes on from the checkpoint, whatever it held
        found = train(model, Sums(), spec, folder=tmp_path, resume=True, pause=pause)
        assert (found.status, found.step) == ("paused", pause)
        assert (tmp_path / f"step_{pause:08d}").exists()
        assert found.history["step"].tolist() == [4][: pause // 4]
    for step in (0, -3):
        with pytest.raises(InputError, match=f"pause: expected a step from 1 on, or None, got {step}"):
            train(Tiny(), Sums(), spec, pause=step)
    last = train(model, Sums(), spec, folder=tmp_path, resume=True, pause=20)
    assert (last.status, last.step) == ("finished", 9)
    columns = ["step", "loss", "gradient_norm", "learning_rate", "tokens"]
    assert last.history[columns].equals(expected.history[columns])
    assert_same(weights(model), weights(whole))


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As in a shell's background job; SIGTERM ends it all the same."""

    def tell(step: int, steps: int, loss: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM if step >= 20 else signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(Tiny(), Sums(), SHORT, progress=tell)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_resume_with_another_number_of_threads_says_so(tmp_path: Path) -> None:
    def stop(step: int, steps: int, loss: float) -> None:
        if step == 12:
            os.kill(os.getpid(), signal.SIGINT)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(KeyboardInterrupt):
            train(Tiny(), Sums(), SHORT, folder=tmp_path, progress=stop)
        torch.set_num_threads(1)
        with pytest.warns(UserWarning, match=r"step_000000\d\d: trained with 2, then with 1 threads: last digits"):
            result = train(Tiny(), Sums(), SHORT, folder=tmp_path, resume=True)
        assert result.threads == 1
        torch.set_num_threads(2)
        again = train(Tiny(), Sums(), SHORT, folder=tmp_path, resume=True)  # it has ended, and is only read
    finally:
        torch.set_num_threads(before)
    assert again.threads == 1
    assert again.message == result.message != ""


@pytest.mark.parametrize("order", ["sequential", "mixed", "random"])
def test_a_training_on_several_tasks_goes_on_exactly(tmp_path: Path, order: str) -> None:
    tasks = [Sums(), Sums(scale=-1.0), Sums(length=4)]
    spec = SHORT.model_copy(update={"order": order})
    whole = Tiny()
    expected = train(whole, tasks, spec)

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 12:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(Tiny(), tasks, spec, folder=tmp_path, progress=stop)
    with pytest.raises(InputError, match=r"another training: task\.1\.scale was -1\.0, now 1\.0"):
        train(Tiny(), [tasks[0], tasks[0], tasks[2]], spec, folder=tmp_path, resume=True)
    resumed = Tiny(seed=9)
    result = train(resumed, tasks, spec, folder=tmp_path, resume=True)
    assert_same(weights(resumed), weights(whole))
    for column in ("step", "loss", "gradient_norm", "tokens"):
        assert result.history[column].tolist() == expected.history[column].tolist()
    if order == "sequential":
        assert result.history["tokens"].iloc[-1] == 16 * 10 * (6 + 6 + 4)


def test_tasks_in_turns_are_learned_together_and_one_after_the_other_forgotten() -> None:
    """The last coordinate tells the two tasks apart; a model that saw one of them only fails on the other."""

    @dataclass(frozen=True)
    class Told(Sums):
        def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
            prompt = super().sample(batch, generator, device)
            prompt.inputs[..., -1] = self.scale
            prompt.targets = self.scale * prompt.inputs[..., :2].sum(-1, keepdim=True)
            return prompt

    tasks = [Told(length=1, scale=1.0), Told(length=1, scale=-1.0)]
    spec = {"steps": 400, "batch": 64, "learning_rate": 0.01, "warmup": 10}
    found = {}
    for order in ("random", "sequential"):
        model = Tiny()
        train(model, tasks, {**spec, "order": order})
        prompts = [task.sample(256, torch.Generator().manual_seed(5)) for task in tasks]
        with torch.no_grad():
            found[order] = [t.loss(model(p.inputs), p).item() for t, p in zip(tasks, prompts, strict=True)]
    assert max(found["random"]) < 0.2  # of about 2, the targets' mean square
    assert found["sequential"][1] < 0.2
    assert found["sequential"][0] > 1.0  # forgotten


def test_training_outside_the_main_thread() -> None:
    found: list[str] = []
    worker = threading.Thread(target=lambda: found.append(train(Tiny(), Sums(), SHORT).status))
    worker.start()
    worker.join()
    assert found == ["finished"]


def test_a_second_interrupt_does_not_wait() -> None:
    def insist(step: int, steps: int, loss: float) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second signal was ignored")

    with pytest.raises(KeyboardInterrupt):
        train(Tiny(), Sums(), SHORT, progress=insist)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ResourceError, match="PyTorch finds no CUDA GPU"):
        train(Tiny(), Sums(), SHORT, device="cuda")


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.stpes: unknown key; did you mean 'steps'\?"):
        train(Tiny(), Sums(), {"stpes": 3})
    with pytest.raises(InputError, match="the model's input_size is 3, the task needs 4"):
        train(Tiny(), Sums(size=4), SHORT)
    with pytest.raises(InputError, match="give folder"):
        train(Tiny(), Sums(), SHORT, resume=True)
    with pytest.raises(InputError, match="expected 'auto', 'cpu' or 'cuda'"):
        train(Tiny(), Sums(), SHORT, device="gpuu")
    train(Tiny(), Sums(), SHORT, folder=tmp_path)
    with pytest.raises(InputError, match="holds step_00000030 already; resume it or choose another folder"):
        train(Tiny(), Sums(), SHORT, folder=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot write"):
        train(Tiny(), Sums(), SHORT, folder=tmp_path / "file" / "deeper")
