from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_training import Sums, Tiny

from contextlab.errors import InputError
from contextlab.training import TrainSpec, checkpoint, train
from contextlab.training.trainer import TrainResult

SPEC = TrainSpec(steps=60, batch=8, warmup=5, log_every=7, checkpoint_every=20)

KILLED = """
import sys, time
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from tiny_training import Sums, Tiny
from contextlab.training import train
train(Tiny(), Sums(), {spec!r}, folder={folder!r}, resume=True, progress=lambda *_: time.sleep(0.004))
"""


def columns(result: TrainResult) -> list[list[float]]:
    return [result.history[name].tolist() for name in ("step", "loss", "learning_rate", "gradient_norm", "tokens")]


def test_resume_after_kill_9_is_bit_identical(tmp_path: Path) -> None:
    spec = {"steps": 600, "batch": 8, "warmup": 5, "log_every": 1, "checkpoint_every": 7}
    whole = Tiny()
    expected = train(whole, Sums(), spec)
    code = KILLED.format(here=str(Path(__file__).parent), spec=spec, folder=str(tmp_path))
    for _ in range(2):
        before = checkpoint.newest(tmp_path)
        process = subprocess.Popen([sys.executable, "-c", code])
        while checkpoint.newest(tmp_path) == before:
            assert process.poll() is None
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    resumed = Tiny(seed=5)
    result = train(resumed, Sums(), spec, folder=tmp_path, resume=True)
    assert columns(result) == columns(expected)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000600"]  # nothing half-written stays


def test_only_the_newest_is_kept(tmp_path: Path) -> None:
    result = train(Tiny(), Sums(), SPEC, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000060"]
    assert result.checkpoint == tmp_path / "step_00000060"
    files = {path.name for path in result.checkpoint.iterdir()}
    assert files == {"model.safetensors", "model.json", "training.safetensors", "training.json"}
    record = json.loads((result.checkpoint / "training.json").read_text())
    assert record["is"]["seed"] == 0
    assert record["is"]["task"]["kind"] == "Sums"


def test_an_interruption_while_writing_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = checkpoint.write_json

    def interrupted(path: Path, data: dict[str, object]) -> None:
        if data["step"] == 40:
            raise KeyboardInterrupt
        written(path, data)

    monkeypatch.setattr(checkpoint, "write_json", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(Tiny(), Sums(), SPEC, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000020"]
    monkeypatch.undo()
    resumed, whole = Tiny(), Tiny()
    assert columns(train(resumed, Sums(), SPEC, folder=tmp_path, resume=True)) == columns(train(whole, Sums(), SPEC))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("file", ["model.safetensors", "training.safetensors", "training.json", "model.json"])
@pytest.mark.parametrize("damage", ["half", "empty", "missing", "noise"])
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, file: str, damage: str) -> None:
    path = train(Tiny(), Sums(), SPEC, folder=tmp_path).checkpoint
    assert path is not None
    content = (path / file).read_bytes()
    if damage == "missing":
        (path / file).unlink()
    else:
        new = {"half": content[: len(content) // 2], "empty": b"", "noise": random.Random(0).randbytes(200)}[damage]
        (path / file).write_bytes(new)
    model = Tiny()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(InputError) as caught:
        train(model, Sums(), SPEC, folder=tmp_path, resume=True)
    assert str(path / file) in str(caught.value)
    assert "delete the folder" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": Tiny(width=4)}, "model.width was int 8, now int 4"),
        ({"task": Sums(length=5)}, "task.length was int 6, now int 5"),
        (
            {"spec": SPEC.model_copy(update={"learning_rate": 0.5})},
            "train.learning_rate was float 0.001, now float 0.5",
        ),
        ({"seed": 4}, "seed was int 0, now int 4"),
    ],
)
def test_another_training_is_not_resumed(tmp_path: Path, changed: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"model": Tiny(), "task": Sums(), "spec": SPEC, "seed": 0}
    train(**given, folder=tmp_path)  # type: ignore[arg-type]
    with pytest.raises(InputError) as caught:
        train(**{**given, **changed}, folder=tmp_path, resume=True)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_resume_of_an_ended_or_unstarted_training(tmp_path: Path) -> None:
    first = train(Tiny(), Sums(), SPEC, folder=tmp_path, resume=True)  # killed before its first checkpoint
    again = train(Tiny(seed=8), Sums(), SPEC, folder=tmp_path, resume=True)
    assert again.status == "finished"
    assert again.history.equals(first.history)
    assert again.step == 60
