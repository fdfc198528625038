"""Memory: what does not fit is said in one line, by every command; no process takes more than there is."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from contextlab import memory
from contextlab.cli.arguments import largest_given
from contextlab.errors import InputError, ResourceError
from contextlab.evaluation import cost
from contextlab.memory import (
    available_bytes,
    lack_of_memory,
    limited_memory,
    plain_memory_errors,
    require_room,
)
from contextlab.models import ModelSpec, build_model, preset
from contextlab.models.room import parameter_bytes, require_room_for_tokens
from contextlab.ops.position import _frequencies
from contextlab.tasks import build_task

TOO_LARGE = 2**47
"""Bytes: more than a process can address, so that no machine gives them."""


def test_what_is_free_is_no_more_than_the_machine_has():
    assert 0 < available_bytes() <= psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_limit_of_the_process_itself_counts(monkeypatch):
    import resource

    for limit, name in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        limits = {resource.RLIMIT_DATA: resource.RLIM_INFINITY, resource.RLIMIT_AS: resource.RLIM_INFINITY}
        limits[limit] = memory._held(name) + 2**26
        with monkeypatch.context() as patch:
            patch.setattr(resource, "getrlimit", lambda one, limits=limits: (limits[one],) * 2)
            assert 2**25 < available_bytes() <= 2**26


@pytest.mark.parametrize(
    "take",
    [
        lambda: torch.empty(TOO_LARGE, dtype=torch.uint8),
        lambda: torch.empty(2**31, 2**31, 2**31),
        lambda: bytearray(TOO_LARGE),
        lambda: torch.zeros(1).numpy().repeat(TOO_LARGE),
    ],
)
def test_a_lack_of_memory_however_raised_is_one_line(take):
    said = "not enough memory: asked for .*more than the .* that are free; use less"
    with pytest.raises(ResourceError, match=said) as caught, plain_memory_errors("; use less"):
        take()
    assert "\n" not in str(caught.value)


def test_sizes_are_told_as_they_were_asked_for():
    with pytest.raises(ResourceError, match="asked for 128 TiB at once, more than the"), plain_memory_errors():
        torch.empty(TOO_LARGE, dtype=torch.uint8)
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ...")
    assert str(lack_of_memory(cuda)) == "not enough memory: asked for 2.50 GiB at once, more than the GPU has free"


@pytest.mark.parametrize("error", [RuntimeError("linalg.cholesky failed"), InputError("out of memory"), KeyError("a")])
def test_other_errors_pass(error):
    assert lack_of_memory(error) is None
    with pytest.raises(type(error)), plain_memory_errors():
        raise error


def test_many_things_need_room():
    require_room("prompts", 10, 100.0)
    with pytest.raises(ResourceError, match="prompts 1000000000000: what is kept .* EiB, .* use at most [1-9]"):
        require_room("prompts", 10**12, 10.0**9)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_processes_are_limited_while_they_last():
    import resource

    if any(Path("/dev", gpu).exists() for gpu in ("nvidiactl", "kfd")):
        pytest.skip("nothing is limited where there is a GPU")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with limited_memory():
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] <= 2 * psutil.virtual_memory().total + 2**30
        with pytest.raises(ResourceError), plain_memory_errors():
            torch.empty(2 * psutil.virtual_memory().total + 2**31, dtype=torch.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "a.dimensions=10000000", "--set", "noise=0.5"], "dimensions=10000000"),
        (["--prompts", "5000", "--set", "length=4000"], "--prompts 5000"),
        (["--lengths", "1k,99999k"], "--lengths 99999"),
        (["--set", "pool=1_000_000"], "pool=1_000_000"),
        (["runs/20240101", "--out", "99999", "--set", "noise=3"], ""),
    ],
)
def test_the_largest_size_given_is_named(arguments, said):
    hint = largest_given(arguments)
    assert hint.endswith(said)
    assert bool(hint) == bool(said)


SWEEP = """
import dataclasses, os, resource, sys, typing
import torch
import contextlab.tasks
from contextlab import build_task, registry
from contextlab.errors import ContextlabError
from contextlab.memory import lack_of_memory

def kinds(hint):
    return {hint}.union(*(kinds(each) for each in typing.get_args(hint)))

largest = 2**31 - 1
torch.set_num_threads(1)
torch.ones(64, 64) @ torch.ones(64, 64)
held = next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]
resource.setrlimit(resource.RLIMIT_DATA, (int(held) * 1024 + 2**28,) * 2)
tried = 0
for entry in registry.entries("task"):
    hints = typing.get_type_hints(entry.factory)
    for field in dataclasses.fields(entry.factory):
        known = kinds(hints[field.name])
        for kind, extremes in ((int, (largest, 10**12, 10**400)), (float, (1e9, 1e-30, 1e30, 1e-300, 10**400))):
            for value in extremes if kind in known else ():
                given = (value,) if tuple in map(typing.get_origin, known) else value
                options = {**entry.cases[0], field.name: given}
                tried += 1
                try:
                    task = build_task(entry.name, **options)
                    if kind is float:
                        assert task.sample(2, torch.Generator().manual_seed(0)).inputs.isfinite().all()
                except ContextlabError as error:
                    assert "\\n" not in str(error) and len(str(error)) < 400
                    continue
                except Exception as error:
                    if lack_of_memory(error) is None:
                        raise AssertionError(f"{entry.name} {field.name}={str(value)[:20]}") from error
                assert -largest <= value <= largest and (value == 0 or abs(value) >= 1e-30)
print(tried)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_extreme_options_of_every_task_work_or_are_refused_in_one_line():
    """In a process of little memory; sizes at the limit are only built, as drawing some of them takes long."""
    done = subprocess.run([sys.executable, "-c", SWEEP], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 500


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 10**6}, "the parameters of this model take 174.6 TiB"),
        ({"width": 10**8}, "width: at most 1048576, got int 100000000"),
        ({"width": 60_000, "depth": 100}, "the largest size given is width=60000"),
        ({"depth": 10_000, "width": 65_536}, "the largest size given is width=65536"),
        ({"input_size": 2**31 - 1, "output_size": 2**31 - 1, "width": 512}, "the largest size given is input_size="),
        ({"mlp_ratio": 1e9}, "the largest size given is mlp_ratio=1000000000"),
        ({"position": "learned", "max_length": 2**31 - 1, "width": 4096}, "the largest size given is max_length="),
        (
            {"depth": 10**6},
            "depth int 1000000 x loops int 1: a model applies at most 10000 layers; use depth of at most",
        ),
        ({"loops": 2**31 - 1}, "use loops of at most 10000"),
        ({"loops": 5, "depth": 2001}, "use depth of at most 2000"),
        ({"width": 2**20, "heads": 1}, "not enough memory"),
        ({"width": 2**20 - 3, "heads": 2}, "the nearest that divides it is 1"),
    ],
)
def test_models_that_do_not_fit_are_refused_within_a_second(changes, message):
    sizes = {"read_in": "token", "input_size": 16, "output_size": 16}
    parameter_bytes(ModelSpec(depth=1))  # PyTorch imports more when its meta device is used for the first time
    began = time.process_time()
    with pytest.raises((InputError, ResourceError)) as caught:
        build_model("transformer", **{**sizes, **changes})
    assert message in str(caught.value)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("name", ["transformer", "mamba2", "looped_transformer", "zamba", "llama3"])
def test_the_bytes_foretold_are_those_of_the_parameters(name):
    _frequencies.cache_clear()  # what is counted first must leave nothing behind that the model then takes
    sizes = {"read_in": "token", "input_size": 16, "output_size": 16}
    spec = ModelSpec.parse({**preset(name).model_dump(), **sizes})
    before = torch.get_rng_state()
    foretold = parameter_bytes(spec)
    assert torch.equal(torch.get_rng_state(), before)
    model = build_model(spec)
    norms = sum(p.nbytes for n, p in model.named_parameters() if "norm" in n or n.endswith("bias"))
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert held - norms <= foretold <= held
    tokens = torch.arange(16)[None]
    assert torch.isfinite(model(tokens)).all()


def test_the_bytes_of_layers_follow_their_number_and_their_sharing():
    def size(**changes):
        return parameter_bytes(ModelSpec(width=32, heads=2, input_size=3, output_size=1, **changes))

    ends = 4 * 32 * 4
    assert size(depth=6) - ends == 3 * (size(depth=2) - ends)
    shared = {"layers": [{"mixer": "attention", "share": "a"}]}
    assert size(depth=6, **shared) == size(depth=1, **shared) == size(depth=1)


def test_prompts_that_do_not_fit_are_refused_before_anything_is_measured():
    spec = ModelSpec(width=64, depth=1, read_in="token", input_size=16, output_size=16)
    require_room_for_tokens(spec, 1024)
    began = time.process_time()
    with pytest.raises(
        ResourceError, match="2147483647 tokens and their vectors take .* give a smaller length or batch"
    ):
        cost(spec, [8, 2**31 - 1], batch=1000)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("autoregression", {"length": 10**6}, "task 'autoregression': length: at most 131072, got int 1000000"),
        ("associative_recall", {"test_pairs": [3, 2**31 - 1]}, "test_pairs: at most 131072, got int 2147483647"),
        ("bandit", {"horizon": 131_073}, "horizon: at most 131072, got int 131073"),
    ],
)
def test_prompts_of_a_task_are_bounded(task, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        build_task(task, **options)
    assert build_task("linear_regression", pool=10**6, pool_seed=2**31 - 1, examples=131_072).pool == 10**6
