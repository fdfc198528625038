"""Data-parallel training under `torchrun`, by PyTorch's own process groups and DistributedDataParallel."""

from __future__ import annotations

import atexit
import hashlib
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from contextlab.errors import InputError, ResourceError
from contextlab.spec import describe


@dataclass(frozen=True)
class Workers:
    """The processes that train one model together, and this one's place among them.

    rank: of this process, from 0.
    count: processes.
    device: on which this process computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes the files and shows the progress."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with averaged gradients, where there is more than one process."""
        return DistributedDataParallel(model) if self.count > 1 else model

    def mean(self, tensor: Tensor) -> Tensor:
        """The average over the processes of a tensor of any shape, the same in all of them."""
        if self.count == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor)
        return tensor / self.count

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.count == 1:
            return flag
        voted = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(voted, op=dist.ReduceOp.MAX)
        return bool(voted.item())

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The CPU tensor, of any shape, of every process, in the order of their ranks, on the CPU."""
        if self.count == 1:
            return [tensor]
        found: list[Tensor] = [torch.empty(0)] * self.count
        dist.all_gather_object(found, tensor)
        return found

    def wait(self) -> None:
        """Wait for all processes."""
        if self.count > 1:
            dist.barrier()


def workers(device: str | torch.device | None, model: nn.Module) -> Workers:
    """The processes of this training: `torchrun`'s (gloo on CPU, nccl on CUDA), or this one alone.

    device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1"; None leaves the model where it is.
    A process group that exists already is used. One that is started here lives until the process ends: to start
    a second one under the same names is a race between the processes.
    """
    found = resolve(device if device is not None else next(model.parameters()).device)
    count = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Workers(0, 1, found)
    if found.type == "cuda" and found.index is None:
        found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(found)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
        atexit.register(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    return Workers(dist.get_rank(), count, found)


def resolve(device: str | torch.device) -> torch.device:
    """The device that a name stands for. Raises ResourceError when this machine lacks it."""
    try:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device: expected 'auto', 'cpu' or 'cuda', got {describe(device)}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ResourceError("device 'cuda' was asked for, but PyTorch finds no CUDA GPU here; use 'cpu' or 'auto'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ResourceError(f"device {str(found)!r}: this machine has {torch.cuda.device_count()} CUDA GPUs")
    return found


def generator(seed: int, rank: int, device: torch.device) -> torch.Generator:
    """The source of a process' training prompts, a stream of its own for each seed and rank."""
    return seeded("training", seed, rank, device=device)


def seeded(what: str, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A stream of random numbers of its own for each purpose, in a word or few, and each choice of numbers."""
    digest = hashlib.sha256(" ".join([what, *map(str, numbers)]).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
