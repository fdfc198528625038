"""NSA's mixer: what each branch reads, and that none shares keys and values with another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.mixers.sparse.native import NativeSparseAttention

WIDTH, HEADS, GROUPS, DIM = 24, 4, 2, 6
PARTS = ("q", "k", "near_k", "v", "near_v", "raw_k", "raw_v")


def built(**options: object) -> NativeSparseAttention:
    torch.manual_seed(0)
    mixer = build_mixer("nsa", width=WIDTH, heads=HEADS, kv_heads=GROUPS, **options).double()
    assert isinstance(mixer, NativeSparseAttention)
    return mixer


def rows_of(mixer: NativeSparseAttention, weight: Tensor) -> dict[str, Tensor]:
    """The rows of qkv_proj by what they make."""
    parts = weight.split((HEADS * DIM, *(GROUPS * DIM,) * 6))
    return dict(zip(PARTS, parts, strict=True))


def test_each_branch_has_keys_and_values_of_its_own():
    mixer, x = built(), torch.randn(2, 40, WIDTH, dtype=torch.float64)
    assert mixer.qkv_proj.weight.shape == ((HEADS + 6 * GROUPS) * DIM, WIDTH)
    mixer(x)[0].square().sum().backward()
    assert mixer.qkv_proj.weight.grad is not None
    for name, rows in rows_of(mixer, mixer.qkv_proj.weight.grad).items():
        assert rows.norm(dim=-1).min() > 0, name
    before = mixer(x)[0].detach()
    for name in PARTS:
        changed = built()
        with torch.no_grad():
            rows_of(changed, changed.qkv_proj.weight)[name].mul_(1.5)
        assert (changed(x)[0] - before).abs().max() > 1e-4, name


def test_every_token_reads_the_first_block_and_its_last_two():
    block, top_k, length = 4, 4, 48
    mixer = built(block=block, top_k=top_k, window=3)
    with torch.no_grad():  # leaves the branch that reads blocks in full
        rows_of(mixer, mixer.qkv_proj.weight)["near_v"].zero_()
        mixer.value_out.weight.zero_()
    x = torch.randn(1, length, WIDTH, dtype=torch.float64, requires_grad=True)
    y = mixer(x)[0][0]
    for t in range(length):
        (slope,) = torch.autograd.grad(y[t].square().sum(), x, retain_graph=True)
        read = (slope[0].norm(dim=-1) > 0).unflatten(0, (-1, block)).any(-1).nonzero().flatten().tolist()
        own = t // block
        assert {0, max(0, own - 1), own} <= set(read), t
        assert min(top_k, own + 1) <= len(read) <= 3 + 2 * (top_k - 3)  # two key heads choose apart


def test_the_defaults_have_the_papers_proportions():
    mixer = built()
    sizes = (mixer.size, mixer.stride, mixer.block, mixer.top_k, mixer.window)
    assert sizes == (8, 4, 16, 8, 64)  # the paper's: 32, 16, 64, 16, 512
    assert (mixer.initial_blocks, mixer.local_blocks) == (1, 2)
    odd = built(block=9, top_k=3)
    assert (odd.size, odd.stride) == (9, 9)


def test_the_state_holds_what_each_branch_needs():
    mixer, length = built(), 100
    _, state = mixer(torch.randn(1, length, WIDTH, dtype=torch.float64))
    assert state.chosen.length == length
    assert state.near.keys.shape == (1, GROUPS, 63, DIM)
    assert state.recent.shape == (1, 7, GROUPS, 2 * DIM)
    assert state.compressed.shape == (1, (length - 8) // 4 + 1, GROUPS, 2 * DIM)


def test_too_few_blocks_are_refused():
    with pytest.raises(InputError, match="top_k 2: .* expected at least 3"):
        built(top_k=2)
