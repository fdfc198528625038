"""All that is to be measured on a machine with a GPU, in at most eight minutes: `make bench-gpu`.

    python benchmarks/gpu.py [--parts together,kernels] [--seconds 480] [--json docs/gpu.json] [--page docs/gpu.md]
    python benchmarks/gpu.py --rehearse      the same at tiny sizes on the CPU: whether the script works
    python benchmarks/gpu.py --page docs/gpu.md --from docs/gpu.json      the page alone

Each part (`gpu_parts.py`) runs in a process of its own with its own limit of time, in order of worth; what it finds is
written as it comes, so that a part that fails or takes too long leaves what it had, and the last lines that it wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_page import write_page

HERE = Path(__file__).resolve().parent
PARTS = {
    "machine": 30, "together": 85, "kernels": 75, "target": 85, "tests": 60, "decoding": 60, "captured": 60, "bf16": 25,
}  # fmt: skip
"""In order of worth, with the seconds that each may take."""
LAST_LINES = 15


def run_part(name: str, seconds: float, rehearse: bool, parts: Path = HERE / "gpu_parts.py") -> dict[str, Any]:
    """One part in a process of its own.

    seconds: after which it is stopped. parts: the script that knows it.

    Returns its status ("done", "failed" or "stopped"), its seconds, the rows that it told, and of one that is not done
    the last lines that it wrote.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows", Path(folder) / "log"
        rows.touch()
        command = [sys.executable, str(parts), name, str(rows), *(["--rehearse"] if rehearse else [])]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
            try:
                status = "failed" if process.wait(max(1.0, seconds)) else "done"
            except subprocess.TimeoutExpired:
                status = "stopped"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with what it started
                    process.wait()
        found: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - began, 1)}
        found["rows"] = [json.loads(line) for line in rows.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if status != "done":
            found["last_lines"] = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        return found


def measure(names: Sequence[str], seconds: float, rehearse: bool, path: Path, page: Path | None) -> dict[str, Any]:
    """The parts one after another within so many seconds together; file and page are written after each."""
    end = time.monotonic() + seconds
    found: dict[str, Any] = {"rehearsal": rehearse, "parts": {}}
    for name in names:
        left = end - time.monotonic()
        if left < 5:
            found["parts"][name] = {"status": "not begun", "seconds": 0.0, "rows": [], "last_lines": ["no time left"]}
        else:
            print(f"{name}: at most {min(PARTS[name], left):.0f} s", flush=True)
            found["parts"][name] = run_part(name, min(PARTS[name], left), rehearse)
        told = found["parts"][name]
        print(f"{name}: {told['status']} after {told['seconds']} s, {len(told['rows'])} rows", flush=True)
        for line in told.get("last_lines", ())[-3:]:
            print(f"    {line}", flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
        if page is not None:
            write_page(found, page)
    return found


def main() -> int:
    """Returns 0 where all parts are done, else 1; 2 where there is no GPU and none is to be rehearsed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"which, in what order: {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=480, help="for all together")
    parser.add_argument("--json", type=Path, default=HERE.parent / "build" / "gpu.json")
    parser.add_argument("--page", type=Path, help="write the page, too")
    parser.add_argument("--from", dest="read", type=Path, help="measure nothing: make the page of this JSON file")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on the CPU")
    given = parser.parse_args()
    if given.read is not None:
        write_page(json.loads(given.read.read_text()), given.page or HERE.parent / "docs" / "gpu.md")
        return 0
    names = given.parts.split(",")
    for name in names:
        if name not in PARTS:
            parser.error(f"unknown part {name!r}; expected some of {', '.join(PARTS)}")
    if not given.rehearse and subprocess.run([sys.executable, "-c", ASK], check=False).returncode:
        print("PyTorch finds no CUDA GPU here; --rehearse runs tiny sizes on the CPU", file=sys.stderr)
        return 2
    found = measure(names, given.seconds, given.rehearse, given.json, given.page)
    return int(any(part["status"] != "done" for part in found["parts"].values()))


ASK = "import sys, torch; sys.exit(not torch.cuda.is_available())"


if __name__ == "__main__":
    sys.exit(main())
