"""Looking inside models: take what flows through named places (`capture`), and put other values there (`patch`).

```python
import torch, contextlab

model = contextlab.build_model("gated_delta_net", width=32, depth=2, read_in="token", input_size=16, output_size=16)
tokens = torch.randint(0, 16, (1, 12))
with contextlab.capture(model, ["blocks.*.output", "blocks.1.mixer.k"]) as taken:
    model(tokens)
print(taken["blocks.0.output"].shape, taken["blocks.1.mixer.k"].shape)

with contextlab.patch(model, {"blocks.0.mixer.heads": contextlab.inspect.only(torch.zeros_like, heads=[1])}):
    without_head = model(tokens)
```
"""

from typing import TYPE_CHECKING

from contextlab.inspect.capturing import Taken, capture, patch, run_with_cache, states_after
from contextlab.inspect.causal import attribution_effects, patch_effects
from contextlab.inspect.dictionaries import Dictionary, train_dictionary
from contextlab.inspect.edits import Edit, only, ranks
from contextlab.inspect.influences import influence
from contextlab.inspect.layout import Site, sites
from contextlab.inspect.listed import listing
from contextlab.inspect.looking import Looked, look
from contextlab.inspect.maps import head_scores, mixing
from contextlab.inspect.probe import Drawing, Probe, Subject, parse_probe, probe_table
from contextlab.inspect.probing import linear_probe
from contextlab.lazy import modules_on_demand

if not TYPE_CHECKING:  # else mypy would take any name
    __getattr__ = modules_on_demand(__name__, __path__)

__all__ = [
    "Dictionary",
    "Drawing",
    "Edit",
    "Looked",
    "Probe",
    "Site",
    "Subject",
    "Taken",
    "attribution_effects",
    "capture",
    "head_scores",
    "influence",
    "linear_probe",
    "listing",
    "look",
    "mixing",
    "only",
    "parse_probe",
    "patch",
    "patch_effects",
    "probe_table",
    "ranks",
    "run_with_cache",
    "sites",
    "states_after",
    "train_dictionary",
]
