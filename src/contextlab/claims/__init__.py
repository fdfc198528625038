"""Claims of papers as experiments that can fail: one YAML file a claim, and what runs and decides them.

```python
from contextlab.claims import load_claim, run_claim

record = run_claim(load_claim("few-attention-layers-restore-recall"))
print(record["verdict"], record["outcomes"])
```
"""

from contextlab.claims.claim import BUDGETS, Claim, claim_files, load_claim
from contextlab.claims.engine import decided, judge, run_claim, run_control, spec_hash
from contextlab.claims.page import claims_page
from contextlab.claims.predicate import Outcome, Quantity, verdict_of

__all__ = [
    "BUDGETS",
    "Claim",
    "Outcome",
    "Quantity",
    "claim_files",
    "claims_page",
    "decided",
    "judge",
    "load_claim",
    "run_claim",
    "run_control",
    "spec_hash",
    "verdict_of",
]
