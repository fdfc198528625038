"""Run the commands of docs/gallery.md in build/gallery/, for the reports that the site shows: `python docs/gallery.py`.

What was made by the same sources and the same page is not made again.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "gallery"


def main() -> None:
    page = (ROOT / "docs" / "gallery.md").read_text()
    digest = hashlib.sha256(page.encode())
    for path in sorted((ROOT / "src").rglob("*")):
        if path.suffix in (".py", ".yaml", ".j2"):
            digest.update(path.read_bytes())
    made = FOLDER / "made-from"
    if made.exists() and made.read_text() == digest.hexdigest():
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    for program, *words in commands(page):
        assert program == "contextlab", program
        print(shlex.join([program, *words]), flush=True)
        subprocess.run([sys.executable, "-m", "contextlab.cli", *words], cwd=FOLDER, check=True, stdout=sys.stderr)
    for path in re.findall(r"<!-- report: [\w-]+ from (\S+) -->", page):
        assert (FOLDER / path).exists(), f"docs/gallery.md: no command made {path}"
    made.write_text(digest.hexdigest())


def commands(page: str) -> list[list[str]]:
    """The commands of the page's bash blocks, in words."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


if __name__ == "__main__":
    main()
