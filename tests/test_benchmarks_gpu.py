"""The harness of `benchmarks/gpu.py`; its parts are rehearsed by hand, `python benchmarks/gpu.py --rehearse`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE / "benchmarks"))  # its scripts import each other by their names
import torch  # noqa: E402

import gpu  # noqa: E402
import gpu_page  # noqa: E402
import gpu_parts  # noqa: E402
import target  # noqa: E402
from contextlab.learners import build_learner  # noqa: E402

STAND_IN = """
import json, subprocess, sys, time
name, rows = sys.argv[1:3]
with open(rows, "a") as file:
    file.write(json.dumps({"op": name, "ms": [2.0, 1.0, 3.5], "rehearsal": "--rehearse" in sys.argv}) + "\\n")
    if name == "halts":
        file.write('{"cut')
        file.flush()
        print("before it stood still", flush=True)
        time.sleep(60)
    file.write("{}\\n")
if name == "fails":
    raise ValueError("no kernel")
"""


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    path = tmp_path / "parts.py"
    path.write_text(STAND_IN)
    return path


def test_a_part_that_ends_tells_its_rows(parts: Path) -> None:
    found = gpu.run_part("ends", 30, True, parts)
    assert found["status"] == "done"
    assert found["rows"] == [{"op": "ends", "ms": [2.0, 1.0, 3.5], "rehearsal": True}, {}]
    assert "last_lines" not in found


def test_one_that_fails_keeps_what_it_had_and_its_last_lines(parts: Path) -> None:
    found = gpu.run_part("fails", 30, False, parts)
    assert found["status"] == "failed"
    assert found["rows"][0]["rehearsal"] is False
    assert found["last_lines"][-1] == "ValueError: no kernel"


def test_one_that_stands_still_is_stopped_and_its_half_row_dropped(parts: Path) -> None:
    found = gpu.run_part("halts", 1.0, False, parts)
    assert found["status"] == "stopped"
    assert found["seconds"] < 20
    assert [row["op"] for row in found["rows"]] == ["halts"]
    assert found["last_lines"] == ["before it stood still"]


def test_parts_without_time_left_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, float]] = []

    def run_part(name: str, seconds: float, rehearse: bool) -> dict[str, object]:
        asked.append((name, seconds))
        clock[0] += 200
        return {"status": "done", "seconds": 200.0, "rows": []}

    clock = [0.0]
    monkeypatch.setattr(gpu, "run_part", run_part)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    found = gpu.measure(["together", "kernels", "bf16"], 230, False, tmp_path / "a" / "gpu.json", tmp_path / "gpu.md")
    assert asked == [("together", 85), ("kernels", 30)]
    assert found["parts"]["bf16"]["status"] == "not begun"
    assert json.loads((tmp_path / "a" / "gpu.json").read_text()) == found
    assert "not begun after 0.0 s" in (tmp_path / "gpu.md").read_text()


def test_the_page_shows_figures_and_what_failed() -> None:
    rows = [{"op": "kda", "ms": [2.0, 1.0, 3.5]}, {"op": "gla", "ms": [4.0, 4.0, 4.0]}, {"op": "x", "fault": "a|b"}]
    part = {"status": "failed", "seconds": 3.0, "rows": rows, "last_lines": ["ValueError: no"]}
    text = gpu_page.page({"rehearsal": False, "parts": {"kernels": part}})
    assert "| op | ms |\n| --- | --- |\n| kda | 2 (1 to 3.5) |\n| gla | 4 (4 to 4) |\n" in text
    assert "| x | a\\|b |" in text
    assert "failed after 3.0 s" in text
    assert "ValueError: no" in text
    assert "## Decoding" not in text
    assert "rehearsal" in gpu_page.page({"rehearsal": True, "parts": {}})


def test_the_committed_page_is_that_of_the_committed_figures() -> None:
    figures = HERE / "docs" / "gpu.json"
    found = json.loads(figures.read_text()) if figures.exists() else None
    assert (HERE / "docs" / "gpu.md").read_text() == gpu_page.page(found)


def test_every_part_has_a_limit_and_a_title() -> None:
    assert set(gpu.PARTS) == set(gpu_page.TITLES)
    assert sum(gpu.PARTS.values()) <= 480


def test_rows_and_faults() -> None:
    told: list[dict[str, object]] = []
    with gpu_parts.recorded(lambda **row: told.append(row), op="kda"):
        raise ValueError("no\nkernel")
    assert told == [{"op": "kda", "fault": "ValueError: no"}]
    assert gpu_parts.spread([3.0, 1.0, 2.00001]) == [2.0, 1.0, 3.0]
    assert gpu_parts.ratios([4.0, 9.0], [2.0, 3.0]) == [2.5, 2.0, 3.0]


def test_the_excess_is_of_the_best_prediction_and_the_clock_stops_there() -> None:
    task = target.build_task("linear_regression", dimensions=2, examples=6, noise=0.5)
    yardstick = target.Yardstick(task, 2, prompts=64)
    ridge = build_learner("ridge", strength=0.25)
    assert yardstick(ridge(yardstick.prompt)) < 1e-9
    assert 0.4 < yardstick(torch.zeros_like(yardstick.best)) < 1.0
    assert yardstick(yardstick.best + 0.2) == pytest.approx(0.02)
    left = iter([0.5, 0.1, 0.019, 0.01])
    steps: list[int] = []
    found = target.reach(lambda: steps.append(1), lambda: next(left), every=3, seconds=60)
    assert (found.reached, found.steps, len(steps), [row[2] for row in found.curve]) == (True, 9, 9, [0.5, 0.1, 0.019])
    stopped = target.reach(lambda: None, lambda: 1.0, every=3, seconds=60, steps=5)
    assert (stopped.reached, stopped.steps) == (False, 6)


def test_both_sides_learn() -> None:
    """A step of each lowers a loss; the public side needs transformers."""
    pytest.importorskip("transformers")
    task = target.build_task("linear_regression", dimensions=2, examples=4, noise=0.5)
    yardstick = target.Yardstick(task, 2, prompts=256)
    spec = target.OURS.model_copy(update={"batch": 16})
    sides = [
        target.ours(task, yardstick, spec, depth=1, width=16, heads=2, mlp_ratio=2),
        target.public(2, 4, 0.5, yardstick, "tiny"),
    ]
    for step, excess in sides:
        before = excess()
        for _ in range(25):
            step()
        assert excess() < before
