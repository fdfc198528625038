from __future__ import annotations

import json
import random
import shutil
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
from contextlab.training.run import TrainResult

SPEC = TrainSpec(steps=60, batch=8, warmup=5, log_every=7, checkpoint_every=20)

KILLED = """
import sys, time
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads(1)
from tiny_training import Sums, Tiny
from contextlab.training import train
train(Tiny(), Sums(), {spec!r}, folder={folder!r}, resume=True, progress=lambda *_: time.sleep(0.008))
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
    steps = sorted(path.name for path in tmp_path.iterdir())  # nothing half-written stays
    assert steps == ["step_00000595", "step_00000600"]


def test_the_newest_and_the_one_before_are_kept(tmp_path: Path) -> None:
    result = train(Tiny(), Sums(), SPEC, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000040", "step_00000060"]
    assert result.checkpoint == tmp_path / "step_00000060"
    files = {path.name for path in result.checkpoint.iterdir()}
    assert files == {"model.safetensors", "model.json", "training.safetensors", "training.json"}
    record = json.loads((result.checkpoint / "training.json").read_text())
    assert record["is"]["seed"] == 0
    assert record["is"]["task"]["kind"] == "Sums"


def test_an_interruption_while_writing_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = checkpoint.write_record

    def interrupted(path: Path, data: dict[str, object]) -> None:
        if data["step"] == 40:
            raise KeyboardInterrupt
        written(path, data)

    monkeypatch.setattr(checkpoint, "write_record", interrupted)
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
        ({"model": Tiny(width=4)}, "model.width was 8, now 4"),
        ({"task": Sums(length=5)}, "task.length was 6, now 5"),
        (
            {"spec": SPEC.model_copy(update={"learning_rate": 0.5})},
            "train.learning_rate was 0.001, now 0.5",
        ),
        ({"seed": 4}, "seed was 0, now 4"),
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


@pytest.mark.parametrize("file", ["model.safetensors", "model.json", "training.safetensors", "training.json"])
def test_a_flipped_byte_is_refused_and_the_checkpoint_before_goes_on(tmp_path: Path, file: str) -> None:
    whole = Tiny()
    expected = train(whole, Sums(), SPEC, folder=tmp_path)
    path = tmp_path / "step_00000060"
    content = (path / file).read_bytes()
    held = json.loads(content) if file.endswith("json") else None
    places = random.Random(0).sample(range(len(content)), 40)
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.Random(place).randrange(8)
        if held is not None and _json(damaged) == held:
            continue  # one white space for another
        (path / file).write_bytes(damaged)
        with pytest.raises(InputError) as caught:
            train(Tiny(), Sums(), SPEC, folder=tmp_path, resume=True)
        assert str(path / file) in str(caught.value)
        assert str(caught.value).endswith(f"; delete the folder {path} to go on from step_00000040")
    shutil.rmtree(path)
    resumed = Tiny(seed=3)
    assert columns(train(resumed, Sums(), SPEC, folder=tmp_path, resume=True)) == columns(expected)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))


def _json(text: bytes | bytearray) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def test_a_first_checkpoint_that_is_damaged_offers_to_train_again(tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"checkpoint_every": 0})
    path = train(Tiny(), Sums(), spec, folder=tmp_path).checkpoint
    assert path is not None
    (path / "training.json").write_text("[]")
    with pytest.raises(InputError) as caught:
        train(Tiny(), Sums(), spec, folder=tmp_path, resume=True)
    assert str(caught.value) == (
        f"{path / 'training.json'}: damaged: expected a mapping, found a list; delete the folder {path} to train again"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"history": None}, "'history' is a NoneType, expected list"),
        ({"step": "60"}, "'step' is a str, expected int"),
        ({"step": True}, "'step' is a bool, expected int"),
        ({"is": []}, "'is' is a list, expected dict"),
        ({"seconds": "1"}, "'seconds' is a str, expected int or float"),
    ],
)
def test_a_record_of_another_shape_is_told(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = train(Tiny(), Sums(), SPEC, folder=tmp_path).checkpoint
    assert path is not None
    record = json.loads((path / "training.json").read_text())
    del record["checksum"]
    (path / "training.json").write_text(json.dumps({**record, **changes}))
    with pytest.raises(InputError) as caught:
        train(Tiny(), Sums(), SPEC, folder=tmp_path, resume=True)
    assert message in str(caught.value)
    (path / "training.json").write_text(json.dumps({name: record[name] for name in record if name not in changes}))
    with pytest.raises(InputError, match=f"lacks the key '{next(iter(changes))}'"):
        train(Tiny(), Sums(), SPEC, folder=tmp_path, resume=True)


def test_the_newest_is_that_of_the_most_steps(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    for name in ("step_00000009", "step_100000000", "step_99999999", "step_9", "step_00000010.old", "xstep_200000000"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_300000000").write_text("no folder")
    assert checkpoint.newest(tmp_path) == tmp_path / "step_100000000"


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".step_00000010.abc", ".old-step_00000010.x", "step_00000005", "notes", ".hidden"):
        (tmp_path / name / "inner").mkdir(parents=True)
    checkpoint.prepare(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".hidden", "notes", "step_00000005"]
    checkpoint.prepare(tmp_path / "deeper" / "new")
    assert (tmp_path / "deeper" / "new").is_dir()


def test_older_ones_leave_and_other_things_stay(tmp_path: Path) -> None:
    for name in ("step_00000001", "step_00000002", "step_00000003", "step_best", "step_00000009"):
        (tmp_path / name).mkdir()
    record = {"step": 4, "is": {}, "history": [], "pending": [], "status": "", "seconds": 1.0, "tokens": 3}
    path = checkpoint.write(tmp_path, Tiny(), {"x": torch.ones(2)}, record)
    kept = ["step_00000003", "step_00000004", "step_00000009", "step_best"]
    assert sorted(each.name for each in tmp_path.iterdir()) == kept
    with pytest.raises(InputError, match="step_00000004: is there already"):
        checkpoint.write(tmp_path, Tiny(), {}, record)
    model = Tiny(seed=2)
    found = checkpoint.read(path, model, {"model": model.spec.model_dump(mode="json")}, {"x": torch.zeros(2)})
    assert found.record == record
    assert torch.equal(found.tensors["x"], torch.ones(2))
    assert torch.equal(model.read_in.weight, Tiny().read_in.weight)
    for expected in ({"x": torch.zeros(3)}, {"y": torch.zeros(2)}):
        with pytest.raises(InputError, match="a checkpoint of another model: '[xy]' differs in shape or is missing"):
            checkpoint.read(path, model, {"model": model.spec.model_dump(mode="json")}, expected)


def test_differences_are_found_wherever_they_are() -> None:
    was = {"a": 1, "b": [1, {"c": 2}], "d": [1]}
    assert checkpoint.differences(was, was) == []
    now = {"a": 1, "b": [1, {"c": 3}], "d": [1, 2], "e": None}
    assert checkpoint.differences(was, now) == [("b.1.c", 2, 3), ("d", [1], [1, 2])]
    assert checkpoint.differences({"a": 1}, {"b": 1}) == [("a", 1, None), ("b", None, 1)]
    assert checkpoint.differences([1], {"a": 1}, "x") == [("x", [1], {"a": 1})]


def test_seconds_go_on_where_they_stopped(tmp_path: Path) -> None:
    short = SPEC.model_copy(update={"checkpoint_every": 20})

    def stop(step: int, steps: int, loss: float) -> None:
        if step >= 21:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        train(Tiny(), Sums(), short, folder=tmp_path, progress=stop)
    before = json.loads((tmp_path / "step_00000020" / "training.json").read_text())["seconds"]
    resumed = train(Tiny(), Sums(), short, folder=tmp_path, resume=True)
    assert resumed.steps_per_second == pytest.approx((resumed.step - 20) / resumed.seconds)  # its own, not those before
    seconds = resumed.history["seconds"]
    assert seconds.is_monotonic_increasing
    assert seconds.iloc[-1] > before > 0
    assert seconds[2] >= before  # the first row after the resume, that of step 21


def test_one_whose_removal_is_cut_short_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("step_00000001", "step_00000002", "step_best"):
        (tmp_path / name / "inner").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *args, **options: None)  # killed before it has begun
        checkpoint.remove(tmp_path / "step_00000002")
    assert checkpoint.newest(tmp_path) == tmp_path / "step_00000001"
    checkpoint.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_best"]
    checkpoint.clear(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_all_checkpoints_stay_where_they_are_kept(tmp_path: Path) -> None:
    plain = Tiny()
    train(plain, Sums(), SPEC, folder=tmp_path / "two")
    kept = Tiny()
    spec = SPEC.model_copy(update={"keep_checkpoints": True})
    train(kept, Sums(), spec, folder=tmp_path / "all")
    assert [path.name for path in sorted((tmp_path / "all").glob("step_*"))] == [
        f"step_{step:08d}" for step in range(SPEC.checkpoint_every, SPEC.steps + 1, SPEC.checkpoint_every)
    ]
    assert len(list((tmp_path / "two").glob("step_*"))) == 2
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), kept.parameters(), strict=True))


def test_which_checkpoints_stay_is_not_what_a_training_is(tmp_path: Path) -> None:
    """Those of versions that did not know the key go on, too."""
    whole, resumed = Tiny(), Tiny()
    expected = train(whole, Sums(), SPEC)
    train(Tiny(), Sums(), SPEC, folder=tmp_path, pause=SPEC.checkpoint_every)
    written = json.loads((tmp_path / f"step_{SPEC.checkpoint_every:08d}" / "training.json").read_text())
    assert "keep_checkpoints" not in json.dumps(written)
    spec = SPEC.model_copy(update={"keep_checkpoints": True})
    found = train(resumed, Sums(), spec, folder=tmp_path, resume=True)
    assert found.step == expected.step
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    assert len(list(tmp_path.glob("step_*"))) == SPEC.steps // SPEC.checkpoint_every
