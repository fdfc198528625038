"""Prompt compression against attention computed head by head, and on heads that are known to find the evidence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.models import build_model, load
from contextlab.policies import compress_prompt, evaluator_heads
from contextlab.policies.prompt.shorten import observed

SIZE = 20


def model(position: str = "rope", depth: int = 3, **options: Any) -> Any:
    layer = {"mixer": "attention", "options": options}
    spec = {"width": 32, "depth": depth, "heads": 4, "mlp_ratio": 1, "position": position, "layers": [layer]}
    return build_model({**spec, "input_size": SIZE, "output_size": SIZE, "read_in": "token"}, seed=0).double()


def tokens(batch: int = 2, length: int = 40, seed: int = 0) -> Tensor:
    return torch.randint(0, SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


def masked(x: Tensor, pads: tuple[int, ...]) -> Tensor:
    return torch.arange(x.shape[1]) >= torch.tensor(pads)[:, None]


@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
@torch.no_grad()
def test_what_is_observed_is_the_attention_and_no_more_is_read(position: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, x, pads = model(position, kv_heads=2), tokens(), (0, 9)
    taken: list[tuple[Tensor, Tensor]] = []
    mixer = type(reader.blocks[0].mixer)
    whole = mixer._score

    def noted(self: Any, new: Any, k: Tensor, *rest: Any) -> Tensor:
        taken.append((new.q, k))
        return whole(self, new, k, *rest)

    monkeypatch.setattr(mixer, "_score", noted)
    reader(x, masked(x, pads))
    ran: list[int] = []
    for i, block in enumerate(reader.blocks):
        block.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    heads = [(1, 3), (0, 0), (1, 0)]
    rows = observed(reader, x, heads, 5, masked(x, pads))
    assert rows.shape == (2, 3, 5, 40)
    assert ran == [0]  # layer 1 is left after its attention
    slopes = reader.blocks[0].mixer.slopes
    for i, (layer, head) in enumerate(heads):
        q, k = taken[layer]
        for row, pad in enumerate(pads):
            for j, t in enumerate(range(35, 40)):
                score = k[row, pad : t + 1, head // 2] @ q[row, t, head] / math.sqrt(8)
                if slopes is not None:
                    score = score - slopes[head] * (t - torch.arange(pad, t + 1))
                torch.testing.assert_close(rows[row, i, j, pad : t + 1], score.softmax(0))
                assert not rows[row, i, j, :pad].any()
                assert not rows[row, i, j, t + 1 :].any()


@pytest.mark.parametrize(("keep", "pads"), [("14tok", (0, 0)), ("50%", (0, 13)), ("14tok", (0, 30))])
def test_the_best_scored_and_the_ends_are_kept_in_order(keep: str, pads: tuple[int, int]) -> None:
    reader, x, heads = model(), tokens(), [(0, 1), (1, 2)]
    mask = masked(x, pads) if any(pads) else None
    short = compress_prompt(reader, x, keep, heads, window=4, sinks=2, kernel=3, mask=mask)
    weights = observed(reader, x, heads, 4, mask)
    for row, pad in enumerate(pads):
        score = [float(weights[row, :, :, t].mean()) if t < 36 else 0.0 for t in range(40)]
        pooled = {t: sum(score[s] for s in range(max(0, t - 1), min(40, t + 2))) / 3 for t in range(pad + 2, 36)}
        left = min(40 - pad, 14) if keep == "14tok" else math.ceil((40 - pad) / 2)
        best = sorted(pooled, key=lambda t: (-pooled[t], -t))[: left - 6]
        expected = sorted([pad, pad + 1, *best, *range(36, 40)])
        there = torch.ones_like(short.index[row], dtype=torch.bool) if short.mask is None else short.mask[row]
        assert short.index[row, there].tolist() == expected[-left:]
        assert torch.equal(short.tokens[row, there], x[row, expected[-left:]])
        assert there.tolist() == sorted(there.tolist())


def test_a_batch_is_compressed_as_each_prompt_alone_and_everything_is_everything() -> None:
    reader, x, heads, pads = model(), tokens(3), [(0, 1), (2, 3)], (0, 8, 21)
    mask = masked(x, pads)
    together = compress_prompt(reader, x, "12tok", heads, window=3, mask=mask)
    for row, pad in enumerate(pads):
        alone = compress_prompt(reader, x[row : row + 1, pad:], "12tok", heads, window=3)
        assert torch.equal(together.tokens[row], alone.tokens[0])
        assert torch.equal(together.index[row] - pad, alone.index[0])
    everything = compress_prompt(reader, x, "100%", heads, mask=mask)
    assert everything.mask is not None
    assert torch.equal(everything.mask, mask)
    assert torch.equal(everything.tokens[mask], x[mask])
    assert compress_prompt(reader, x[:, :30], "10%", heads, window=1, sinks=1).tokens.shape[1] == 3


@torch.no_grad()
def test_the_heads_that_find_the_evidence_are_found_and_keep_it() -> None:
    """Head 2 of layer 1 is made to look for token 7, whatever asks."""
    reader = model("none", depth=2, bias=True)
    mixer, block = reader.blocks[1].mixer, reader.blocks[1]
    for each in reader.blocks[0].parameters():
        each.zero_()  # layer 1 sees the embeddings
    sought = block.mixer_norm(reader.read_in.weight[7])
    mixer.qkv_proj.weight[16:24] = 0.0  # head 2 asks always the same ..
    mixer.qkv_proj.bias[16:24] = 10.0
    mixer.qkv_proj.weight[32 + 16 : 32 + 24] = sought / sought.norm()  # .. and answers as far as a token is like 7
    x = tokens(8, 60, seed=3)
    x[x == 7] = 3
    at = torch.arange(8) * 5 + 6
    x[torch.arange(8), at] = 7
    evidence = torch.zeros_like(x, dtype=torch.bool)
    evidence[torch.arange(8), at] = True
    heads = evaluator_heads(reader, x, evidence, 3)
    assert heads[0] == (1, 2)
    assert all(layer == 0 for layer, _ in evaluator_heads(reader, x, evidence, 3, layers=1))
    short = compress_prompt(reader, x, "20%", heads[:1], window=4, kernel=3)
    assert short.tokens.shape == (8, 12)
    assert bool((short.tokens == 7).any(1).all())
    other = compress_prompt(reader, x, "20%", [(0, 0)], window=4, kernel=3)
    assert not bool((other.tokens == 7).any(1).all())


def test_hugging_face_models_are_compressed_as_our_import_of_their_weights(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.models.checkpoints import checkpoint

    checkpoint("llama", tmp_path)
    theirs, ours = load(tmp_path), load(tmp_path, native=True)
    x = tokens()
    mask, heads = masked(x, (0, 9)), [(1, 1), (0, 0)]
    expected = observed(ours, x, heads, 3, mask)
    torch.testing.assert_close(observed(theirs, x, heads, 3, mask), expected, rtol=0, atol=1e-5)
    mine, yours = (compress_prompt(each, x, "14tok", heads, window=3, mask=mask) for each in (ours, theirs))
    assert torch.equal(mine.tokens, yours.tokens)
    with torch.no_grad():
        y, _ = theirs.read(yours.tokens, None, yours.mask)  # it goes on as if nothing had been observed
        torch.testing.assert_close(y, ours.read(mine.tokens, None, mine.mask)[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "64MB"}, "a prompt has tokens, not bytes; expected 25% or 512tok"),
        ({"keep": "20tok"}, r"not more than the sinks 4 \+ window 16 .* raise it to 21tok"),
        ({"keep": "10%"}, "of 40 tokens .row 0. is 4, not more than"),
        ({"heads": []}, "expected .layer, head. of at least one"),
        ({"heads": [(3, 0)]}, r"\(3, 0\) is no head of the model; it has layers 0 to 2, each with heads 0 to 3"),
        ({"kernel": 4}, "kernel: expected an odd whole number, got 4; the nearest is 5"),
        ({"window": 0}, "window: expected a whole number of at least 1"),
    ],
)
def test_impossible_wishes_are_refused(options: dict[str, Any], message: str) -> None:
    wishes = {"keep": "25tok", "heads": [(0, 0)], **options}
    with pytest.raises(InputError, match=message):
        compress_prompt(model(), tokens(), **wishes)


def test_impossible_searches_and_models_are_refused() -> None:
    x = tokens()
    with pytest.raises(InputError, match="evidence: expected bool"):
        evaluator_heads(model(), x, torch.zeros_like(x, dtype=torch.bool))
    some = x == x[:, :1]
    with pytest.raises(InputError, match="count: expected 1 to 8, the heads of 2 layers, got 9"):
        evaluator_heads(model(), x, some, 9, layers=2)
    with pytest.raises(InputError, match="layers: expected 1 to 3"):
        evaluator_heads(model(), x, some, 2, layers=4)
    linear = build_model("gated_delta_net", width=32, depth=1, input_size=SIZE, output_size=SIZE, read_in="token")
    with pytest.raises(InputError, match="needs a model with a KV state"):
        compress_prompt(linear, x, "50%", [(0, 0)], window=4)
