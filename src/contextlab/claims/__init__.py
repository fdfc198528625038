"""Claims of papers as experiments that can fail: one YAML file a claim, and what runs and decides them.

```python
from contextlab.claims import load_claim, run_claim

record = run_claim(load_claim("few-attention-layers-restore-recall"))
print(record["verdict"], record["outcomes"])
```
"""

from contextlab.claims.claim import BUDGETS as BUDGETS
from contextlab.claims.claim import Claim as Claim
from contextlab.claims.claim import claim_files as claim_files
from contextlab.claims.claim import load_claim as load_claim
from contextlab.claims.engine import decided as decided
from contextlab.claims.engine import judge as judge
from contextlab.claims.engine import run_claim as run_claim
from contextlab.claims.engine import run_control as run_control
from contextlab.claims.engine import spec_hash as spec_hash
from contextlab.claims.predicate import Outcome as Outcome
from contextlab.claims.predicate import Quantity as Quantity
from contextlab.claims.predicate import verdict_of as verdict_of
