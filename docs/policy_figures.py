"""Renew the frontier of docs/policies.md from a run: `python docs/policy_figures.py runs/frontier-quick`.

The run is the folder that `contextlab run frontier --quick` left. Of it: the tables of what each policy keeps, the
sentences, what each policy could not serve, and a figure a task.

Needs the extra `image` and a Chromium or Chrome.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from suite_figures import markdown

from contextlab import open_run
from contextlab.experiments import load_recipe
from contextlab.report import compress_words, kept_tables, not_served, quality_against_bytes

FOLDER = Path(__file__).parent
PAGE = FOLDER / "policies.md"
MARKS = ("<!-- frontier: written by docs/policy_figures.py -->", "<!-- end of frontier -->")


def main() -> None:
    """Write the section and its figures."""
    if len(sys.argv) != 2:
        sys.exit("give the folder of one run, for example runs/frontier-quick")
    found = open_run(sys.argv[1]).compressed
    if found.empty:
        sys.exit(f"{sys.argv[1]}: the run measured no policies; expected one of recipe frontier")
    (FOLDER / "policies").mkdir(exist_ok=True)
    asked = load_recipe(Path(sys.argv[1]) / "experiment.yaml").compress
    parts = []
    for title, rows in kept_tables(found).items():
        parts += [f"**{title[0].upper()}{title[1:]}**", markdown(rows)]
    parts += compress_words(found)
    missing = not_served(found, asked.policies if asked else ())
    if missing:
        parts += ["What policies could not serve:", "\n".join(f"- {line}" for line in missing)]
    for task, length in found[["task", "length"]].drop_duplicates().itertuples(index=False):
        name = str(task).partition(":")[0]
        figure = quality_against_bytes(found, str(task), int(length))
        figure.write_image(FOLDER / f"policies/{name}.svg", width=900, height=520)
        parts.append(f"{name}, {length} bytes:\n\n![{name}: quality against bytes of state](policies/{name}.svg)")
    text, inside = PAGE.read_text(), "\n\n".join(parts)
    marks = re.compile(f"{re.escape(MARKS[0])}.*?{re.escape(MARKS[1])}", re.S)
    if not marks.search(text):
        sys.exit(f"{PAGE} has no place for the frontier")
    PAGE.write_text(marks.sub(lambda _: f"{MARKS[0]}\n\n{inside}\n\n{MARKS[1]}", text))


if __name__ == "__main__":
    main()
