"""LM2's memory bank against its formulas, token by token and slot by slot, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.ops.position import rope

WIDTH, SEGMENT, HEADS, SIZE, SLOTS = 12, 4, 2, 6, 5


def mixer_and_input(length: int = 14, **options) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    options = {"segment": SEGMENT, "slots": SLOTS, "heads": HEADS, **options}
    mixer = build_mixer("lm2", width=WIDTH, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer, torch.randn(1, length, WIDTH, dtype=torch.float64, requires_grad=True)


def by_the_paper(mixer: nn.Module, x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """x [T, width] -> outputs [T, width] and the slots after the last complete segment."""
    W_q, W_in = mixer.query_in_proj.weight.chunk(2)
    W_k, W_v = mixer.slot_proj.weight.chunk(2)
    M, outputs = mixer.initial, []
    for piece in x.split(SEGMENT):
        q, k, v = mixer.qkv_proj(piece).unflatten(-1, (3, HEADS, SIZE)).unbind(1)
        q, k = (rope(y[None], torch.arange(len(piece)))[0] for y in (q, k))
        weights, read = [], []
        for t, token in enumerate(piece):
            local = [(k[: t + 1, h] @ q[t, h] * SIZE**-0.5).softmax(0) @ v[: t + 1, h] for h in range(HEADS)]
            score = torch.stack([(W_q @ token) @ (W_k @ slot) for slot in M]) / WIDTH**0.5
            best = score.argsort(descending=True)[:top]
            weight = torch.zeros(SLOTS).double().index_add(0, best, score[best].softmax(0))
            memory = sum(weight[n] * (W_v @ M[n]) for n in range(SLOTS))
            gate = torch.sigmoid(mixer.out_gate.weight @ memory)
            outputs.append(mixer.out_proj.weight @ torch.cat(local) + gate * memory)
            weights.append(weight)
            read.append(memory)
        if len(piece) < SEGMENT:
            break
        after = []
        for n in range(SLOTS):
            total = sum(weight[n] for weight in weights)
            if total == 0:
                after.append(M[n])
                continue
            slot = torch.zeros(WIDTH).double()
            for token, weight, memory in zip(piece, weights, read, strict=True):
                new = torch.sigmoid(W_in @ token) * torch.tanh(memory)
                kept = torch.sigmoid(mixer.forget_gate.weight @ memory) * M[n]
                slot = slot + weight[n] / total * (new + kept)
            after.append(slot)
        M = torch.stack(after)
    return torch.stack(outputs), M


@pytest.mark.parametrize("top", [None, 1, 2])
def test_lm2_is_its_formulas(top: int | None) -> None:
    mixer, x = mixer_and_input(top=top)
    y, state = mixer(x)
    expected, slots = by_the_paper(mixer, x[0], top or SLOTS)
    torch.testing.assert_close(y[0], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(state["slots"][0], slots, rtol=0, atol=1e-10)
    wanted = [x, *mixer.parameters()]
    weight = torch.randn_like(expected)
    got = torch.autograd.grad((y[0] * weight).sum(), wanted)
    for one, other in zip(got, torch.autograd.grad((expected * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_a_slot_that_no_token_reads_is_kept() -> None:
    mixer, x = mixer_and_input(length=SEGMENT, top=1)
    _, state = mixer(x)
    kept = (state["slots"][0] == mixer.initial).all(-1)
    assert SLOTS - SEGMENT <= kept.sum() < SLOTS


def test_earlier_segments_are_heard_through_the_memory_alone() -> None:
    mixer, x = mixer_and_input()
    (heard,) = torch.autograd.grad(mixer(x)[0][0, SEGMENT:].sum(), x)
    assert heard[0, :SEGMENT].any(-1).all()
    nn.init.zeros_(mixer.slot_proj.weight)  # what is read is zero, and so is what is written
    (heard,) = torch.autograd.grad(mixer(x)[0][0, SEGMENT:].sum(), x)
    assert not heard[0, :SEGMENT].any()


def test_the_memory_is_kept_in_single_precision_at_least() -> None:
    mixer = build_mixer("lm2", width=WIDTH, segment=SEGMENT, heads=HEADS).bfloat16()
    y, state = mixer(torch.randn(1, 10, WIDTH).bfloat16())
    assert y.dtype == torch.bfloat16
    assert state["slots"].dtype == torch.float32
    assert state.nbytes == mixer.state_nbytes(10, dtype=torch.bfloat16)


def test_more_slots_read_than_there_are_is_refused() -> None:
    with pytest.raises(InputError, match="top 6 is more than the 5 slots; the most is 5"):
        build_mixer("lm2", width=WIDTH, heads=HEADS, slots=5, top=6)
