"""What runs here: versions, processor, devices, backends; for `doctor` and for each run's record."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from contextlab.ops.backend import backends

PACKAGES = (
    "contextlab",
    "torch",
    "numpy",
    "pandas",
    "pyarrow",
    "pydantic",
    "plotly",
    "flash-linear-attention",
    "triton",
)


def machine_record() -> dict[str, Any]:
    """Versions, machine and backends as plain values that fit into JSON."""
    return {
        "versions": {
            "python": sys.version.split()[0],
            **{name: version for name in PACKAGES if (version := _version(name))},
        },
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "backends": [each.to_dict() for each in backends()],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name; platform.processor() is empty on Linux."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
