from __future__ import annotations

import pandas as pd

from contextlab.report.figures import styles


def test_many_models_look_different() -> None:
    names = [f"model{i}" for i in range(40)]
    rows = pd.DataFrame({"run": "r", "model": names, "kind": "model", "seed": 0, "task": "t"})
    looks = styles(rows)
    assert list(looks) == names
    assert len({(look["colour"], look["marker"]) for look in looks.values()}) == 40
    assert len({(look["colour"], look["dash"]) for look in looks.values()}) == 40
