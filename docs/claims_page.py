"""Publish what was decided of the claims: `python docs/claims_page.py [FOLDER]`, after `contextlab claims run --all`.

Writes the verdicts that lie in FOLDER (runs/claims) into src/contextlab/papers/verdicts.json, where those of claims
that were not run there stay, and the table of docs/claims.md.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from contextlab.claims import claim_files, decided, load_claim, spec_hash
from contextlab.papers import find, in_words, verdicts

PAGE = Path(__file__).parent / "claims.md"
FILE = Path(__file__).parent.parent / "src" / "contextlab" / "papers" / "verdicts.json"
LEFT_OUT = ("budget",)


def main() -> None:
    """Publish."""
    folder = sys.argv[1] if len(sys.argv) > 1 else "runs/claims"
    records, rows = [], []
    for claim in map(load_claim, claim_files()):
        record = decided(claim, folder=folder) or verdicts().get(claim.name)
        if record is None or record["spec"] != spec_hash(claim):
            continue
        records.append({key: value for key, value in record.items() if key not in LEFT_OUT})
        paper = find(claim.paper)
        told = [(each["said"], in_words(each)) for each in record["outcomes"]]
        found = "; ".join(f"{said}: {each['found']} ({each['interval']}), asked {each['asked']}" for said, each in told)
        minutes = f"{record['cost']['processor_seconds'] / 60:.1f}" if record["cost"]["whole"] else ""
        rows.append(
            f"| [{paper.name}]({paper.url}) | {claim.sentence.strip()} | {found} | {record['verdict']} | {minutes} |"
        )
    FILE.write_text(json.dumps(records, indent=1) + "\n")
    head = "| paper | claim | found here | verdict | processor minutes |\n| --- | --- | --- | --- | ---: |\n"
    table = f"<!-- table: written by docs/claims_page.py -->\n\n{head}" + "\n".join(rows) + "\n\n<!-- end of table -->"
    text = re.sub(r"<!-- table: .*?<!-- end of table -->", lambda _: table, PAGE.read_text(), flags=re.DOTALL)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()
