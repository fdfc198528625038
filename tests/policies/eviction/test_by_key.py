"""Policies that judge a token by its place or its key."""

from __future__ import annotations

import torch

from contextlab.policies import build_policy
from contextlab.testing.policies import model, tokens


@torch.no_grad()
def test_a_stream_with_alibi_reads_a_long_piece_as_token_by_token() -> None:
    reader, x = model(position="alibi"), tokens(1, 40)
    with build_policy("streaming_llm", budget="12tok", sinks=2, every=1, reposition=False).attach(reader):
        whole, _ = reader.read(x)
        pieces, state = [], None
        for piece in x.split(1, 1):
            y, state = reader.read(piece, state)
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-9)
