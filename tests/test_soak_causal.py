"""The soak over causal types of transformers, for some of each kind; the whole is `python -m tests.soak.causal`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers", minversion="5")

from contextlab.models.hub_pieces import APART
from tests.soak.causal import COLUMNS, held

WINDOWS = "all of its attention layers have windows"
INDEXED = "keeps keys and values together with other memory"
REFUSED = {
    "deepseek_v32": dict.fromkeys(("policy", "apply"), INDEXED),
    "qwen4_exp_text": dict.fromkeys(("policy", "apply"), INDEXED),
    "ministral": dict.fromkeys(("policy", "apply"), WINDOWS),
    "cpmant": {"built": "reads both ways"},
    "musicgen": {"built": "several codebooks at each place"},
    "gpt_oss": {},
    "granite_swa": {},
    "falcon_h1": {},
    "minimax": {},
    "jetmoe": {},
    "afmoe": {},
}


@pytest.mark.filterwarnings("ignore:.*answers in pieces differ")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_type_of_each_kind_holds_or_is_refused(kind):
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    if kind not in known:
        pytest.skip(f"this release of transformers has no {kind}")
    with torch.no_grad():
        found = held(kind)
    refused = REFUSED[kind]
    expected = set() if "built" in refused else set(COLUMNS)
    assert set(found) == {"built", *expected}
    for column, what in found.items():
        if column in refused:
            assert what.startswith("refused: "), what
            assert refused[column] in what
        elif column == "pieces" and kind in APART:
            assert what.startswith("known: "), what
        else:
            assert what == "ok", f"{column}: {what}"


@pytest.mark.filterwarnings("ignore:.*answers in pieces differ")
def test_compressed_caches_are_foretold():
    """At lengths around its blocks of 3 and 5 tokens and its window of 6."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as known

    from tests.soak.causal import Held

    if "deepseek_v4" not in known:
        pytest.skip("this release of transformers has no deepseek_v4")
    with torch.no_grad():
        soak = Held("deepseek_v4")
        soak.bytes()
        soak.pieces()
        soak.select()
    rules = {rule.kind for _, rule in soak.model._growth()}
    assert rules == {"window", "block", "rest", "any"}
    assert 2 * soak.model.flops(8) < soak.model.flops(16)
