"""The index of papers: what each adds and claims, what of it runs here, and how to look it up.

```python
from contextlab.papers import find, search

print(find("1706.03762").contributes)
for hit in search("evict kv cache while decoding").hits:
    print(hit.paper.id, hit.paper.name)
```
"""

from contextlab.papers.index import STATUSES as STATUSES
from contextlab.papers.index import Area as Area
from contextlab.papers.index import Paper as Paper
from contextlab.papers.index import areas as areas
from contextlab.papers.index import find as find
from contextlab.papers.index import papers as papers
from contextlab.papers.index import read_area as read_area
from contextlab.papers.search import Found as Found
from contextlab.papers.search import Hit as Hit
from contextlab.papers.search import search as search
from contextlab.papers.telling import bibtex as bibtex
from contextlab.papers.telling import digest as digest
