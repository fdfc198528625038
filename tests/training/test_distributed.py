from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_script import FIXED
from safetensors.torch import load_file
from tiny_training import Some, Sums, Tiny
from torch import Tensor

from contextlab.errors import InputError
from contextlab.testing.objective import ROUNDING
from contextlab.training import TrainSpec, train
from contextlab.training.distributed import generator
from contextlab.training.step import loss_and_gradients

SCRIPT = Path(__file__).with_name("distributed_script.py")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What two processes under torchrun found."""
    folder = tmp_path_factory.mktemp("distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen([*command, str(SCRIPT), str(folder)], stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=150)
    finally:
        process.terminate()  # torchrun ends its workers on SIGTERM; killed at once it would leave them behind
        process.wait(timeout=60)
    assert process.returncode == 0, errors[-3000:]
    assert sorted(path.name for path in (folder / "whole").iterdir()) == ["step_00000030", "step_00000040"]
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)]


def test_processes_hold_the_same_parameters_and_learn(ranks: list[dict[str, Tensor]]) -> None:
    for name, tensor in ranks[0].items():
        assert torch.equal(tensor, ranks[1][name]), name
    losses = ranks[0]["losses"]
    assert losses[-1] < 0.5 * losses[0]


def test_resume_of_processes_is_exact(ranks: list[dict[str, Tensor]]) -> None:
    names = [name.removeprefix("whole.") for name in ranks[0] if name.startswith("whole.")]
    assert names
    for name in names:
        assert torch.equal(ranks[0][f"whole.{name}"], ranks[0][f"resumed.{name}"]), name


def test_two_processes_train_on_a_fixed_set_as_one_does(ranks: list[dict[str, Tensor]]) -> None:
    whole = Tiny().double()
    train(whole, Some(), FIXED)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(ranks[0][f"fixed.{name}"], tensor, rtol=1e-7, atol=1e-10)


def test_the_gradient_is_that_of_the_whole_batch(ranks: list[dict[str, Tensor]]) -> None:
    model, task = Tiny().double(), Sums()
    prompt = task.sample(16, torch.Generator().manual_seed(0)).to(torch.float64)
    _, expected = loss_and_gradients(model, task, TrainSpec(batch=16), dict(model.named_parameters()), prompt)
    for name, gradient in expected.items():
        torch.testing.assert_close(ranks[0][f"gradient.{name}"], gradient, rtol=1e-10, atol=1e-12)


def test_the_objective_of_every_task_is_that_of_the_whole_batch(ranks: list[dict[str, Tensor]]) -> None:
    found = {name.removeprefix("off."): far.tolist() for name, far in ranks[0].items() if name.startswith("off.")}
    assert len(found) > 60
    assert {name: far for name, far in found.items() if not max(far) < ROUNDING} == {}


def test_every_seed_and_rank_has_its_own_prompts() -> None:
    cpu = torch.device("cpu")
    draws = [torch.randn(4, generator=generator(s, r, cpu)).tolist() for s in range(3) for r in range(3)]
    assert len({tuple(draw) for draw in draws}) == 9


def test_a_batch_that_cannot_be_split_is_refused() -> None:
    spec = TrainSpec(steps=1, batch=6, accumulate=2).model_copy(update={"batch": 7})
    with pytest.raises(InputError, match="7 prompts cannot be split over 1 processes x 2 accumulated parts"):
        train(Tiny(), Sums(), spec)
