"""Packed documents in ops and mixers: as each alone, whatever their lengths; what is no packing is refused."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.nn import functional as F

from contextlab import build_mixer
from contextlab.errors import InputError
from contextlab.ops import (
    by_document,
    causal_conv,
    delta_rule,
    gated_delta_rule,
    landmark_attention,
    linear_scan,
    neighbourhood_attention,
    retention,
    softmax_attention,
    ssd,
)
from contextlab.ops.documents import documents

LENGTHS = (70, 1, 0, 150, 2, 3)  # chunks of several sizes begin within and between them
ENDS = torch.tensor((0, *LENGTHS)).cumsum(0)
TOTAL = int(ENDS[-1])


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(1, TOTAL, *shape, dtype=torch.float64, requires_grad=True)


def op_cases():
    torch.manual_seed(0)
    q, k, v = drawn(2, 4), drawn(2, 4), drawn(2, 3)
    unit = F.normalize(k.detach(), dim=-1).requires_grad_()
    g, beta = (F.logsigmoid(drawn(2).detach()) - 0.01).requires_grad_(), drawn(2).detach().sigmoid().requires_grad_()
    x, flat = drawn(2, 3), drawn(5)
    A, weight = -torch.rand(2, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    return {
        "gated_delta_rule": (gated_delta_rule, (q, unit, v, g, beta), {}),
        "delta_rule by name": (delta_rule, (q, unit, v), {"beta": beta}),
        "retention": (retention, (q, k, v), {}),
        "softmax_attention": (softmax_attention, (q, k, v), {"window": 7, "sinks": 1}),
        "ssd": (ssd, (x, beta), {"A": A, "B": k, "C": q, "D": A}),
        "causal_conv": (causal_conv, (flat,), {"weight": weight}),
        "linear_scan": (linear_scan, (flat, (-flat.detach().square()).requires_grad_()), {}),
    }


@pytest.mark.parametrize("name", op_cases())
def test_an_op_gives_what_it_gives_each_document(name):
    op, tensors, options = op_cases()[name]
    together = by_document(op, ENDS.int(), *tensors, **options)
    alone = []
    for start, end in zip(ENDS[:-1].tolist(), ENDS[1:].tolist(), strict=True):
        if start < end:
            own = {key: x[:, start:end] if x is not None and key in "beta B C" else x for key, x in options.items()}
            result = op(*(x[:, start:end] for x in tensors), **own)
            alone.append(result[0] if isinstance(result, tuple) else result)
    each = torch.cat(alone, 1)
    torch.testing.assert_close(together, each, rtol=1e-10, atol=1e-10)
    wanted = [x for x in (*tensors, *options.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    found, due = (torch.autograd.grad(y.square().sum(), wanted) for y in (together, each))
    torch.testing.assert_close(found, due, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_at_least_half_of_a_batch_is_tokens_and_batches_are_few(seed):
    generator = torch.Generator().manual_seed(seed)
    length = (torch.rand(30, generator=generator) ** (seed % 7) * 300).long()
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), length.cumsum(0)))
    packed = documents(ends, torch.zeros(1, int(ends[-1])))
    for side in ("left", "right"):
        batches = packed.batches(side)
        assert len(batches) <= math.log2(int(length.max())) + 1
        for batch in batches:
            real = batch.index.numel() if batch.mask is None else int(batch.mask.sum())
            assert 2 * real >= batch.index.numel()
        tokens = torch.arange(int(length.sum()))[None, :, None]
        assert packed.back(batches, [batch.of(tokens) for batch in batches]).equal(tokens)
        read = torch.cat([(b.index if b.mask is None else b.index[b.mask]).flatten() for b in batches])
        assert read.sort().values.equal(tokens.flatten())


def test_documents_of_one_length_are_not_padded():
    (batch,) = documents(torch.tensor([0, 4, 8]), torch.zeros(1, 8)).batches("left")
    assert batch.mask is None
    assert batch.index.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([0, 3], r"expected a tensor of integers, got list \[0, 3\]"),
        (torch.tensor([0.0, 6.0]), "expected a tensor of integers, got float32"),
        (torch.tensor([True, False]), r"expected integers \[documents \+ 1\], two or more, got bool \[2\]"),
        (torch.tensor([[0, 6]]), r"got int64 \[1, 2\]"),
        (torch.tensor([0]), r"two or more, got int64 \[1\]"),
        (torch.tensor([1, 6]), "expected 0 first, where the first document begins, got 1"),
        (torch.tensor([0, 4, 3, 6]), "expected no number below the one before, got 4, then 3"),
        (torch.tensor([0, 4]), "expected the 6 tokens of the row last, got 4"),
    ],
)
def test_what_is_no_cu_seqlens_is_refused(ends, message):
    with pytest.raises(InputError, match=f"^cu_seqlens: .*{message}"):
        build_mixer("attention", width=8, heads=2)(torch.randn(1, 6, 8), cu_seqlens=ends)


def test_what_does_not_go_with_packed_documents_is_refused():
    mixer, x, ends = build_mixer("gla", width=8, heads=2), torch.randn(1, 6, 8), torch.tensor([0, 2, 6])
    _, state = mixer(x)
    for message, call in {
        r"stand in one row, \[1, T, ...\], got \[2, 6, 8\]": lambda: mixer(x.expand(2, 6, 8), cu_seqlens=ends),
        "read whole, without a state": lambda: mixer(x, state, cu_seqlens=ends),
        "read whole, without a mask": lambda: mixer(x, None, torch.ones(1, 6, dtype=torch.bool), cu_seqlens=ends),
    }.items():
        with pytest.raises(InputError, match=f"^cu_seqlens: .*{message}"):
            call()
    with pytest.raises(InputError, match="^cu_seqlens: expected documents with tokens, got none"):
        mixer(x[:, :0], cu_seqlens=torch.tensor([0, 0]))
    q = torch.randn(1, 6, 2, 4)
    op = functools.partial(by_document, softmax_attention, ends)
    near, marks = (functools.partial(by_document, op, ends) for op in (neighbourhood_attention, landmark_attention))
    for message, call in {
        "expected tensors": lambda: op(),
        r"expected \[1, 6, ...\] as argument 2 of softmax_attention, got \[6, 2, 4\]": lambda: op(q, q, q[0]),
        "softmax_attention reads both ways": lambda: op(q, q, q, causal=False),
        "q_position: documents are padded and placed here": lambda: op(q, q, q, q_position=torch.arange(6)[None]),
        "neighbourhood_attention reads both ways": lambda: near(q, q, q, window=2),
        "landmark_attention takes landmarks": lambda: marks(q, q, q, landmarks=q, block=2),
        "output_final_state: each document begins without a state": lambda: by_document(
            retention, ends, q, q, q, output_final_state=True
        ),
    }.items():
        with pytest.raises(InputError, match=f"^by_document: .*{message}"):
            call()
    assert by_document(retention, ends, q, q, q, output_final_state=False).shape == q.shape
