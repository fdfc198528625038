"""Torch's threads: how they wait, which is chosen before torch is loaded, and how many they are."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables by which people choose themselves."""
_warned = False


def yield_cores() -> None:
    """On a busy machine let waiting threads sleep: OpenMP's spin, and take the cores from whom they wait for.

    Twice to three times as fast there; where no one else works it would make a decoded token twice as slow, and nothing
    is changed. It must come before torch is loaded.
    """
    if not any(name in os.environ for name in OWN) and _busy():
        os.environ["OMP_WAIT_POLICY"] = "passive"


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within, torch has so many threads in this process; afterwards as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def warn_of_spinning(threads: int) -> None:
    """Warn once where torch was loaded before that could be chosen, and others want the cores: steps take many times as
    long (1,800 ms in place of 28, measured on 2 cores). threads: of torch."""
    global _warned
    if _warned or threads < 2 or any(name in os.environ for name in OWN) or not _busy():
        return
    _warned = True
    warnings.warn(
        f"other programs use the cores, and torch's {threads} threads spin while they wait for each other, so that "
        "steps may take many times as long; import contextlab before torch, set OMP_WAIT_POLICY=passive before Python "
        "starts, or call torch.set_num_threads(1)",
        RuntimeWarning,
        stacklevel=3,
    )


def _busy() -> bool:
    """Whether others want the cores now. The load average alone remembers those, too, who have just ended."""
    if not hasattr(os, "getloadavg") or os.getloadavg()[0] <= 0.75:
        return False
    running = []
    for _ in range(5):
        now = _running()
        if now is None:
            return True
        running.append(now)
        time.sleep(0.004)
    return sorted(running)[2] > 1


def _running() -> int | None:
    """Threads of the machine that run or want to, this one counted; None where the system does not tell."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return None
