"""The index of papers: what each adds and claims, what of it runs here, and how to look it up.

```python
from contextlab.papers import find, search

print(find("1706.03762").contributes)
for hit in search("evict kv cache while decoding").hits:
    print(hit.paper.id, hit.paper.name)
```
"""

from contextlab.papers.index import STATUSES, Area, Paper, areas, find, papers, read_area
from contextlab.papers.search import Found, Hit, search
from contextlab.papers.telling import bibtex, digest
from contextlab.papers.verdicts import in_words, verdicts, verdicts_of

__all__ = [
    "STATUSES",
    "Area",
    "Found",
    "Hit",
    "Paper",
    "areas",
    "bibtex",
    "digest",
    "find",
    "in_words",
    "papers",
    "read_area",
    "search",
    "verdicts",
    "verdicts_of",
]
