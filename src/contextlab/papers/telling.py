"""Papers as text: a BibTeX entry, and the page that explains an area."""

from __future__ import annotations

import re
import unicodedata

from contextlab.errors import InputError
from contextlab.papers.index import STATUSES, Paper, areas, require_known

SPECIAL = {"&": r"\&", "%": r"\%", "#": r"\#", "_": r"\_", "$": r"\$"}
"""What BibTeX's TeX would read as a command."""


def bibtex(paper: Paper) -> str:
    """The paper's BibTeX entry; its key is the first author's last name, the year and the title's first long word."""
    fields = {"title": f"{{{_tex(paper.title)}}}", "author": _tex(paper.authors), "year": str(paper.year)}
    scheme, colon, rest = paper.id.partition(":")
    if not colon:
        fields |= {"eprint": paper.id, "archivePrefix": "arXiv"}
    elif scheme == "doi":
        fields["doi"] = rest
    fields["url"] = paper.url
    inner = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields.items())
    return f"@misc{{{_key(paper)},\n{inner}\n}}"


def digest(area: str, *, since: int | None = None) -> str:
    """A Markdown page on an area: what it is about, then its papers in order, each with what to run.

    since: the first year of the papers.

    Raises InputError where there is no such area, with the nearest, or no paper so new.
    """
    known = {each.name: each for each in areas()}
    require_known("area", area, known)
    chosen = known[area]
    told = [paper for paper in chosen.papers if since is None or paper.year >= since]
    if not told:
        newest = max(paper.year for paper in chosen.papers)
        raise InputError(f"since: no paper of {area} is of {since} or later; the newest is of {newest}")
    counts = {status: sum(paper.status == status for paper in told) for status in STATUSES}
    summary = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
    parts = [f"# {chosen.title}", chosen.about, f"{len(told)} papers: {summary}."]
    for paper in told:
        parts += [f"## {paper.name} ({paper.year})", *_paragraphs(paper)]
    return "\n\n".join(parts) + "\n"


def _paragraphs(paper: Paper) -> list[str]:
    """What a digest says of one paper."""
    parts = [f"[{paper.title}]({paper.url}). {paper.contributes}", f"Claim: {paper.claim}"]
    why = paper.missing or paper.reason
    parts.append(f"Here: {paper.status}" + (f" ({why.rstrip('.')})." if why else "."))
    if paper.commands:
        parts.append("```bash\n" + "\n".join(paper.commands) + "\n```")
    return parts


def _key(paper: Paper) -> str:
    """A BibTeX key, such as katharopoulos2020transformers."""
    first = paper.authors.split(" and ")[0]
    family = first.split(",")[0] if "," in first else first.split()[-1]
    words = [word for word in re.findall(r"\w+", paper.title) if len(word) > 3]
    plain = unicodedata.normalize("NFKD", f"{family}{paper.year}{words[0] if words else ''}")
    return re.sub(r"[^a-z0-9]", "", plain.lower())


def _tex(text: str) -> str:
    """Text as TeX takes it; mathematics between dollars stays."""
    parts = re.split(r"(\$[^$]+\$)", text)
    return "".join(
        part if index % 2 else "".join(SPECIAL.get(each, each) for each in part) for index, part in enumerate(parts)
    )
