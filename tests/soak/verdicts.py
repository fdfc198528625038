"""The records of `mutants.py`, and the table of them."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from tests.soak.mutate import Mutant

EQUIVALENT = Path(__file__).with_name("equivalent.json")
VERDICTS = ("killed", "timed out", "survived", "equivalent")


def read(out: Path) -> list[dict[str, Any]]:
    """The records of a file, the last of each mutant."""
    found = {}
    for line in out.read_text().splitlines():
        record = json.loads(line)
        found[Mutant(**record["mutant"]).key] = record
    return list(found.values())


def equivalent() -> dict[tuple[str, str, str], str]:
    """The keys of the mutants that no test can kill, with the reasons."""
    return {(e["file"], e["before"], e["after"]): e["reason"] for e in json.loads(EQUIVALENT.read_text())}


def described(record: dict[str, Any]) -> str:
    m = Mutant(**record["mutant"])
    return f"{m.file}:{m.line}: {m.before.strip()}  ->  {m.after.strip()}"


def report(records: list[dict[str, Any]], least: float) -> int:
    """Print the table and the survivors. Returns 1 where too few were killed."""
    reasons = equivalent()
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    survivors = []
    for record in records:
        mutant = Mutant(**record["mutant"])
        verdict = record["verdict"]
        if verdict == "survived":
            verdict = "equivalent" if mutant.key in reasons else "survived"
            survivors.append(f"{verdict}: {described(record)}  {reasons.get(mutant.key, '')}")
        for room in (mutant.room, "all"):
            counts[room][verdict] += 1
    print(f"\n{'room':12}", *(f"{name:>10}" for name in VERDICTS), f"{'share':>8}")
    share = 1.0
    for room in sorted(counts, key=lambda name: (name == "all", name)):
        row = counts[room]
        noticed = row["killed"] + row["timed out"]
        share = noticed / max(noticed + row["survived"], 1)
        columns = (f"{row[name]:10}" for name in VERDICTS)
        print(f"{room:12}", *columns, f"{share:8.1%}")
    print(*sorted(survivors), sep="\n")
    if records:
        each = [sum(record[name] for record in records) / len(records) for name in ("seconds", "wall_seconds")]
        print(f"a mutant takes {each[0]:.0f} s of one core, {each[1]:.0f} s of the clock")
    return 0 if share >= least else 1
