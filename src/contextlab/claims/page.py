"""The page of all claims: what papers say, what was found here, and whether it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from contextlab.claims.claim import Claim, claim_files, load_claim
from contextlab.claims.engine import ROOM, decided, spec_hash
from contextlab.files import write_atomic
from contextlab.papers import find, in_words, verdicts
from contextlab.report.page import template

VERDICTS = ("holds", "fails", "unclear", "not tested")
WIDTH, HEIGHT, MIDDLE = 300, 22, 11
"""Pixels of the drawing of an interval, and where its line stands."""


def claims_page(path: str | Path, *, folder: str | Path = ROOM) -> Path:
    """Write the page of all claims that come with contextlab to `path`.

    folder: where they were run; of those that were not run there the published verdicts are told.
    """
    told = [_told(claim, decided(claim, folder=folder) or published(claim)) for claim in map(load_claim, claim_files())]
    told.sort(key=lambda each: each["verdict"] == VERDICTS[-1])  # what was decided first
    counts = {verdict: sum(each["verdict"] == verdict for each in told) for verdict in VERDICTS}
    text = template("claims.html.j2").render(
        title="Claims of papers, tested",
        claims=told,
        counts={key: _counted(n, key) for key, n in counts.items() if n},
        pieces=(),
    )
    write_atomic(Path(path), text)
    return Path(path)


def _counted(number: int, verdict: str) -> str:
    """`13 hold`, `1 fails`, `2 unclear`."""
    verb = verdict.endswith("s") and number != 1
    return f"{number} {verdict.removesuffix('s') if verb else verdict}"


def published(claim: Claim) -> Mapping[str, Any] | None:
    """The verdict that was published with contextlab; None where there is none of this recipe and predicate."""
    record = verdicts().get(claim.name)
    return record if record is not None and record["spec"] == spec_hash(claim) else None


def _told(claim: Claim, record: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the page says of a claim. record: of its verdict; None where it was not tested."""
    paper, record = find(claim.paper), record or {}
    seconds = record.get("cost", {}).get("processor_seconds")
    return {
        "name": claim.name,
        "sentence": claim.sentence,
        "title": paper.title,
        "year": paper.year,
        "url": paper.url,
        "published": claim.published,
        "scaled": claim.scaled,
        "analysis": claim.analysis,
        "changes": claim.changes,
        "verdict": record.get("verdict", "not tested"),
        "seeds": record.get("seeds", 0),
        "minutes": f"{seconds / 60:.1f}" if seconds is not None and record["cost"]["whole"] else "",
        "outcomes": [_outcome(each) for each in record.get("outcomes", ())],
    }


def _outcome(told: Mapping[str, Any]) -> dict[str, Any]:
    """An outcome in words, and drawn."""
    rising = "at_least" in told
    bound = float(told["at_least"] if rising else told["at_most"])
    return {"said": told["said"], **in_words(told), "drawn": _drawn(told, bound, rising)}


def _drawn(told: Mapping[str, Any], bound: float, rising: bool) -> Markup:
    """The interval beside its bound, as SVG; the side on which the claim holds is tinted."""
    known: Sequence[float] = [float(told[key]) for key in ("low", "value", "high") if told[key] is not None]
    if not known:
        return Markup("")
    least, most = min(*known, bound), max(*known, bound)
    room = (most - least) * 0.12 or 1.0
    least, most = least - room, most + room

    def at(value: float) -> float:
        return round((value - least) / (most - least) * WIDTH, 1)

    low = at(known[0]) if told["low"] is not None else 0.0
    high = at(known[-1]) if told["high"] is not None else float(WIDTH)
    x, side = at(bound), (at(bound), WIDTH - at(bound)) if rising else (0.0, at(bound))
    color = {True: "#009E73", False: "#D55E00", None: "#6a51a3"}[told["holds"]]
    label = f"from {told['low']} to {told['high']}; the bound is {bound:g}"
    dot = (
        f'<circle cx="{at(told["value"])}" cy="{MIDDLE}" r="4.5" fill="{color}"/>' if told["value"] is not None else ""
    )
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f'<rect x="{side[0]}" y="0" width="{round(side[1], 1)}" height="{HEIGHT}" fill="#eef6f2"/>'
        f'<line x1="{x}" y1="0" x2="{x}" y2="{HEIGHT}" stroke="#5b6475" stroke-dasharray="3 2"/>'
        f'<line x1="{low}" y1="{MIDDLE}" x2="{high}" y2="{MIDDLE}" stroke="{color}" stroke-width="2.5"/>{dot}</svg>'
    )
