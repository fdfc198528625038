"""Claims of papers as experiments that can fail: one YAML file a claim, and what runs and decides them.

```python
from contextlab.claims import load_claim, run_claim

record = run_claim(load_claim("few-attention-layers-restore-recall"))
print(record["verdict"], record["outcomes"])
```
"""

from importlib import import_module

from contextlab.claims.cells import Table
from contextlab.claims.claim import BUDGETS, Claim, claim_files, load_claim
from contextlab.claims.engine import decided, judge, run_claim, run_control, spec_hash
from contextlab.claims.measures import MEASURES, Measure, measure
from contextlab.claims.page import claims_page
from contextlab.claims.predicate import Outcome, Quantity, Sum, verdict_of
from contextlab.claims.sums import value_of

for _module in ("answers", "costs", "forms", "policies", "steps"):
    import_module(f"contextlab.claims.{_module}")  # each registers its measures

__all__ = [
    "BUDGETS",
    "MEASURES",
    "Claim",
    "Measure",
    "Outcome",
    "Quantity",
    "Sum",
    "Table",
    "claim_files",
    "claims_page",
    "decided",
    "judge",
    "load_claim",
    "measure",
    "run_claim",
    "run_control",
    "spec_hash",
    "value_of",
    "verdict_of",
]
