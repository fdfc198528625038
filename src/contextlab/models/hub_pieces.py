"""Models of transformers whose answers in pieces differ from those of the whole, by their own code's doing."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Apart:
    """How far answers in pieces are from those of the whole.

    error: the largest difference that `python -m tests.soak.causal` found, of the largest logit, with transformers 5.24
        and small random models. why: in words. beyond: the field of the configuration that holds the number of tokens
        up to which there is none; "" for none.
    """

    error: float
    why: str
    beyond: str = ""


TIES = (
    "its indexer keeps the tokens of the highest scores, and which it takes of those that score 0 depends on how many "
    "tokens are read at once"
)
APART: dict[str, Apart] = {
    "axk2": Apart(0.24, TIES, "index_topk"),
    "deepseek_v32": Apart(0.22, TIES, "index_topk"),
    "deepseek_v4": Apart(0.1, TIES, "index_topk"),
    "dots3_note": Apart(0.3, TIES, "index_topk"),
    "dots3_note_text": Apart(0.3, TIES, "index_topk"),
    "glm_moe_dsa": Apart(0.18, TIES, "index_topk"),
    "hy_v4": Apart(0.28, TIES, "index_topk"),
    "moshi": Apart(1.0, "its window holds only where its cache drops keys", "sliding_window"),
    "prophetnet": Apart(0.021, "the distances of its second stream depend on how many tokens are read at once"),
}
"""By type. bamba and minimax, which once differed, no longer do."""


def warn_of_pieces(kind: str, config: Any, length: int) -> bool:
    """Warn the caller's caller where a model that reads on differs from the whole; whether there is no more to say.

    kind: its type. config: of its text. length: tokens read, the piece's own counted.
    """
    apart = APART.get(kind)
    if apart is None:
        return True
    limit = getattr(config, apart.beyond, None) if apart.beyond else 0
    if limit is None or length <= limit:
        return limit is None
    warnings.warn(
        f"{kind}: answers in pieces differ from those of the whole, on small random models by up to {apart.error:g} of "
        f"the largest logit: {apart.why}; this is transformers' own doing",
        stacklevel=3,
    )
    return True
