"""Workers of a process pool whose parent is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_training import Sums, Tiny

from contextlab.training import checkpoint, train
from contextlab.training.parent import parent_watched

SPEC = {"batch": 2, "log_every": 1, "checkpoint_every": 0}
DRIVER = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
sys.path.insert(0, {here!r})
import torch
from tiny_training import Sums, Tiny
from contextlab.training import train

def job(folder, steps):
    torch.set_num_threads(1)
    def told(step, *_):
        if not Path(folder + ".pid").exists():
            Path(folder + ".half").write_text(str(os.getpid()))
            os.rename(folder + ".half", folder + ".pid")  # the test reads it at any time, so it is never half written
        time.sleep(0.002)
    train(Tiny(), Sums(), {{**{spec!r}, "steps": steps}}, folder=folder, progress=told)

if __name__ == "__main__":
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context({how!r})) as pool:
        list(pool.map(job, {folders!r}, {steps!r}))
"""


def alive(process: int) -> bool:
    """Whether it runs; one that nobody has asked for its exit code does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def waited(done, seconds=60) -> bool:
    """Whether it was done in that time."""
    until = time.monotonic() + seconds
    while not (found := done()) and time.monotonic() < until:
        time.sleep(0.02)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux tells of processes there")
@pytest.mark.parametrize("how", ["fork"])
def test_they_end_with_it_one_that_trains_after_a_checkpoint(tmp_path, how):
    steps = {"long": 10**6, "short": 3}
    folders = [str(tmp_path / name) for name in steps]
    names = {"here": str(Path(__file__).parent), "spec": SPEC, "folders": folders, "steps": list(steps.values())}
    file = tmp_path / "driver.py"
    file.write_text(DRIVER.format(how=how, **names))
    driver = subprocess.Popen([sys.executable, str(file)])
    found = [Path(f"{folder}.pid") for folder in folders]
    workers: list[int] = []
    try:
        begun = waited(lambda: all(each.exists() for each in found) and checkpoint.newest(tmp_path / "short"))
        assert begun, driver.poll()
        time.sleep(0.2)  # the short one waits for its next job
        workers = [int(each.read_text()) for each in found]
        assert all(map(alive, workers))
        assert checkpoint.newest(tmp_path / "long") is None
        driver.kill()
        driver.wait()
        assert waited(lambda: not any(map(alive, workers)))
    finally:
        driver.kill()
        for each in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
    last = checkpoint.newest(tmp_path / "long")
    assert last is not None
    step = checkpoint.step_of(last)
    assert 0 < step < 10**6
    spec = {**SPEC, "steps": 10**6}
    assert train(Tiny(), Sums(), spec, folder=tmp_path / "long", resume=True, pause=step + 1).step == step + 1


def test_a_process_that_no_other_started_is_left_alone():
    with parent_watched() as lost:
        assert not lost()
