"""Freed memory stays with the process that will want it again, and is given back before memory is measured."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from contextlab.allocator import OWN

HERE = sys.platform == "linux" and "glibc" in getattr(os, "confstr", lambda _: "")("CS_GNU_LIBC_VERSION")
PROGRAM = """
import resource, sys
import psutil, torch
from contextlab.allocator import give_back, keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        kept = [torch.ones(1 << 22) for _ in range(4)]  # 16 MiB each
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
kept = keep_freed_memory()
after = faults()
held = psutil.Process().memory_info().rss
give_back()
print(kept, before, after, held - psutil.Process().memory_info().rss)
"""


def _run(**variables: str) -> tuple[bool, int, int, int]:
    environment = {name: value for name, value in os.environ.items() if name not in OWN} | variables
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    kept, *numbers = done.stdout.split()
    before, after, given = map(int, numbers)
    return kept == "True", before, after, given


@pytest.mark.skipif(not HERE, reason="glibc alone has mallopt")
def test_tensors_that_are_made_again_and_again_take_the_same_memory():
    kept, before, after, given = _run()
    assert kept
    assert after < before / 4  # the first round alone takes pages from the system
    assert given > 48 << 20  # what was kept, and is now the system's again


def test_a_variable_of_the_allocator_leaves_all_as_it_is():
    kept, *_ = _run(MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept
