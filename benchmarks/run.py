"""Make every benchmark figure again: `make bench`. Each script can be run alone; `--help` tells its options."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = (
    "training.py", "ops.py", "scan.py", "naive.py", "learners.py", "learners.py --all", "tasks.py", "decode.py",
    "inside.py", "stream_policies.py --tokens 100000",
)  # fmt: skip


def main() -> int:
    """Run the scripts one after another. Returns the first exit code that is not 0."""
    folder, worst = Path(__file__).parent, 0
    for script in SCRIPTS:
        print(f"== {script}", flush=True)
        name, *options = script.split()
        done = subprocess.run([sys.executable, str(folder / name), *options], check=False)
        worst = worst or done.returncode
    return worst


if __name__ == "__main__":
    sys.exit(main())
