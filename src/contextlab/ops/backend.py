"""Which implementation each op runs on, chosen in one place and reported in plain words.

"torch" is the chunked PyTorch form and runs everywhere. "fla" is flash-linear-attention's Triton kernels,
taken on CUDA when that package is installed. "onednn" serves the linear layers on some CPUs. `contextlab doctor`
and the record of a run print `backends()`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from contextlab.errors import InputError, ResourceError, unknown

FLA_MODULES = {
    "simple_gla": "fla.ops.simple_gla",
    "gated_delta_rule": "fla.ops.gated_delta_rule",
    "delta_rule": "fla.ops.delta_rule",
    "kda": "fla.ops.kda",
    "dplr_delta_rule": "fla.ops.generalized_delta_rule",
}
TORCH_ONLY = {
    "softmax_attention": "PyTorch's scaled_dot_product_attention picks its own kernel, except short sequences on CPU",
    "causal_conv": "shifted multiply-adds need no other package",
}
OPS = ("dense", "int8_dense", *TORCH_ONLY, *FLA_MODULES)
CHOICES = ("auto", "torch", "fla")
_FLA_LARGEST_KEY = 256  # the delta-rule kernels keep a whole state column in registers

_forced = os.environ.get("CONTEXTLAB_BACKEND", "auto")


@dataclass(frozen=True)
class Backend:
    """What an op runs on.

    name: "torch", "fla" or "onednn". why: one plain sentence. module: the kernels' module when `name` is "fla".
    """

    name: str
    why: str
    module: ModuleType | None = None


@dataclass(frozen=True)
class BackendReport:
    """One line of `contextlab doctor`: the backend that an op gets on a device, and why."""

    op: str
    device: str
    chosen: str
    why: str

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def choose(op: str, tensor: Tensor) -> Backend:
    """The backend for `op` on inputs like `tensor`.

    op: one of `OPS`. tensor: the keys, [B, T, H, K]; its device, dtype and K decide.
    Raises ResourceError when `use_backend("fla")` asks for kernels that cannot run, InputError for unknown
    names.
    """
    return _choose(op, tensor.device.type, tensor.dtype, tensor.shape[-1])


def backends(dtype: torch.dtype = torch.float32) -> list[BackendReport]:
    """The backend of every op on every device here, for inputs of `dtype`; a broken package is reported."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    reports = []
    for op in OPS:
        for device in devices:
            try:
                backend = _choose(op, device, dtype, 64)
                reports.append(BackendReport(op, device, backend.name, backend.why))
            except ResourceError as error:  # a forced backend that cannot run
                reports.append(BackendReport(op, device, "none", str(error)))
    return reports


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend inside a `with` block.

    name: "torch", "fla", or "auto" (the default rule). The variable CONTEXTLAB_BACKEND sets it for a whole
        process.
    """
    global _forced
    if name not in CHOICES:
        raise InputError(unknown("backend", name, CHOICES))
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def forced() -> str:
    """What `use_backend` or CONTEXTLAB_BACKEND asks for; "auto" where nothing is."""
    return _forced


@cache
def onednn() -> tuple[bool, str]:
    """Whether `dense` takes oneDNN on this machine's CPU, and why, in one plain sentence."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False, "this PyTorch carries no oneDNN"
    if not torch.backends.mkl.is_available():
        return False, "this PyTorch's products are not MKL's"
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or _cpu_vendor() != "AuthenticAMD":
        return False, "MKL is slow only on AMD processors with AVX-512, and this is none"
    return True, "on AMD processors with AVX-512, oneDNN's float32 products are twice as fast as MKL's"


def _choose(op: str, device: str, dtype: torch.dtype, key_size: int) -> Backend:
    if op == "dense":
        if device != "cpu" or dtype != torch.float32:
            return Backend("torch", f"PyTorch's own products serve {str(dtype).removeprefix('torch.')} on {device}")
        if _forced == "torch":
            return Backend("torch", "forced by use_backend or CONTEXTLAB_BACKEND")
        chosen, reason = onednn()
        return Backend("onednn" if chosen else "torch", reason)
    if op == "int8_dense":
        return Backend("torch", _int8(device))
    if op in TORCH_ONLY:
        return Backend("torch", TORCH_ONLY[op])
    if op not in FLA_MODULES:
        raise InputError(unknown("op", op, OPS))
    if _forced not in CHOICES:
        raise InputError(f"CONTEXTLAB_BACKEND: {unknown('backend', _forced, CHOICES)}")
    if _forced == "torch":
        return Backend("torch", "forced by use_backend or CONTEXTLAB_BACKEND")
    module, why = None, _refusal(op, device, dtype, key_size)
    if why is None:
        module, why = load_fla(op)
    if module is not None:
        return Backend("fla", why, module)
    if _forced == "fla":
        raise ResourceError(f"the fla backend was asked for, but {op} cannot use it: {why}")
    return Backend("torch", why)


def _int8(device: str) -> str:
    """What serves linear layers in int8, in one plain sentence."""
    if device != "cpu" or _forced == "torch" or not hasattr(torch.ops.aten, "_weight_int8pack_mm"):
        return "the weights of linear layers in int8 are made dense for each product"
    return "in bfloat16 PyTorch's int8 kernel takes up to 8 tokens at once; else some rows after others are made dense"


def _refusal(op: str, device: str, dtype: torch.dtype, key_size: int) -> str | None:
    """Why the kernels cannot take such inputs, or None."""
    if device != "cuda":
        return "no CUDA device" if not torch.cuda.is_available() else f"the inputs are on {device}, not on CUDA"
    if dtype == torch.float64:
        return "flash-linear-attention's kernels do not take float64"
    if op == "delta_rule" and dtype == torch.float32:
        return "flash-linear-attention's delta_rule does not take float32; use bfloat16"
    if key_size > _FLA_LARGEST_KEY:
        return f"flash-linear-attention's kernels take keys of at most {_FLA_LARGEST_KEY} values, not {key_size}"
    return None


@cache
def load_fla(op: str) -> tuple[ModuleType | None, str]:
    """The kernels' module for `op` and the package's version, or None and why not. Cached."""
    try:
        package: Any = importlib.import_module("fla")
    except ModuleNotFoundError as error:
        if error.name == "fla":
            return None, "flash-linear-attention is not installed (pip install contextlab[fla])"
        return None, f"flash-linear-attention does not import: {_one_line(error)}"
    except Exception as error:
        return None, f"flash-linear-attention does not import: {_one_line(error)}"
    version = getattr(package, "__version__", "of unknown version")
    try:
        return importlib.import_module(FLA_MODULES[op]), f"flash-linear-attention {version}"
    except Exception as error:  # a broken Triton raises far more than ImportError; doctor must still report
        return None, f"flash-linear-attention {version} does not import: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _cpu_vendor() -> str:
    """The processor's vendor as Linux tells it; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
