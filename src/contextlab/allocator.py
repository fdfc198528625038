"""How the C library hands out memory; on Linux with glibc alone."""

from __future__ import annotations

import contextlib
import ctypes
import os
from functools import cache

OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Variables by which people choose themselves, the allocator too."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 32 << 20
"""Bytes: what is larger glibc takes from the system each time, whatever it is told."""


@cache
def keep_freed_memory() -> bool:
    """Let this process keep the memory that tensors of up to 32 MiB free, for the next ones. Returns whether it does.

    By default glibc gives it back to the system, which clears each page when it is taken again: in a training step,
    which frees and takes the same tensors each time, that is up to a third of the processor's time (measured: 34% of
    `based` at width 64, 16% of `gated_delta_net`, 3% of `transformer`). The process holds what it once needed until it
    ends. Nothing is changed where a variable of `OWN` is set, or the C library is another.
    """
    if any(name in os.environ for name in OWN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Trimming is off only where both are set: one alone makes glibc adapt the other no more.
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST) and mallopt(M_TRIM_THRESHOLD, -1))


def give_back() -> None:
    """Give the memory that is kept and not in use back to the system, so that what a process holds is what it needs."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
