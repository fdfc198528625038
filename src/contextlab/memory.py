"""Memory: no more is taken than the machine has, and what does not fit is said in one line."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from contextlab.errors import ContextlabError, ResourceError
from contextlab.words import bytes_in_words

LACK = re.compile(
    "allocate memory|not enough memory|out of memory|bad_alloc|storage size calculation overflowed|invalid tensor size",
    re.IGNORECASE,
)
"""What torch and C++ say in a RuntimeError when they get no memory."""
LARGEST_WHOLE = 2**31 - 1
"""Of the whole numbers in specs and options: products of two fit into the 64 bits that tensors count with."""
SLACK = 1 << 30
"""Bytes that libraries set aside and never touch."""


def available_bytes() -> float:
    """Memory that can still be taken: the machine's, or that of the container (control group) around this process.

    A limit that was set for the process itself (`ulimit`) counts, too.
    """
    free = psutil.virtual_memory().available
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most, held = (int(Path("/sys/fs/cgroup", name).read_text()) for name in (limit, used))
        except (OSError, ValueError):  # no control group, or no limit in it ("max")
            continue
        free = min(free, most - held)
    return max(min(free, _left_to_process()), 0)


def _left_to_process() -> float:
    """Bytes that the limits of this process leave it; infinite where it has none."""
    if sys.platform != "linux":
        return math.inf
    import resource

    pairs = ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize"))
    soft = [(resource.getrlimit(limit)[0], name) for limit, name in pairs]
    return min((most - _held(name) for most, name in soft if most != resource.RLIM_INFINITY), default=math.inf)


def _held(name: str) -> int:
    """Bytes that the kernel says of this process: VmData is what it has set aside to write to, VmSize everything."""
    found = re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) << 10 if found else 0


@contextmanager
def limited_memory() -> Iterator[None]:
    """Let this process and its children take no more than is free now, so that what does not fit is an error.

    Without it the operating system promises more than there is, and kills the process when it is used. On Linux
    without a GPU only: the drivers of GPUs set far more aside than they use.
    """
    if sys.platform != "linux" or any(Path("/dev", gpu).exists() for gpu in ("nvidiactl", "kfd")):
        yield
        return
    import resource

    soft, hard = before = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = int(available_bytes()) + SLACK + _held("VmData")
    limits = [wanted, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@contextmanager
def plain_memory_errors(hint: str = "") -> Iterator[None]:
    """Turn a lack of memory, however it is raised, into a one-line ResourceError. hint: what to do about it."""
    try:
        yield
    except Exception as error:
        if (plain := lack_of_memory(error, hint)) is None:
            raise
        raise plain from error


def lack_of_memory(error: BaseException, hint: str = "") -> ResourceError | None:
    """What a lack of memory is in one line; None when the error is another."""
    text = str(error)
    raised = isinstance(error, RuntimeError) and not isinstance(error, ContextlabError) and LACK.search(text)
    if not (raised or isinstance(error, MemoryError)):
        return None
    asked = re.search(r"tried to allocate ([\d.]+ ?[KMGT]iB|\d+)", text, re.IGNORECASE)
    size = "" if asked is None else bytes_in_words(int(asked[1])) if asked[1].isdigit() else asked[1]
    free = "the GPU has" if "CUDA" in text else f"the {bytes_in_words(available_bytes())} that are"
    wanted = f"asked for {size} at once, more than" if size else "asked for more than"
    return ResourceError(f"not enough memory: {wanted} {free} free{hint}")


def require_room(what: str, count: int, each: float) -> None:
    """Refuse `count` things of `each` bytes that together are larger than the memory that is free."""
    if count * each > (free := available_bytes()):
        raise ResourceError(
            f"{what} {count}: what is kept of them takes {bytes_in_words(count * each)}, and {bytes_in_words(free)} of "
            f"memory is free; use at most {max(1, int(free // each))}"
        )


def require_bytes(what: str, size: float, instead: str) -> None:
    """Refuse work that is known to take more bytes than are free, before it begins. instead: what to do.

    what: whose bytes they are, for example "the parameters". Raises ResourceError.
    """
    if size > (free := available_bytes()):
        raise ResourceError(
            f"not enough memory: {what} take {bytes_in_words(size)}, and {bytes_in_words(free)} of memory are free; "
            + instead
        )
