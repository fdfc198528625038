"""Segment memories against the same read segment by segment, one row at a time, as their papers describe them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from contextlab.mixers import build_mixer

WIDTH, SEGMENT, HEADS, SIZE = 12, 4, 2, 6


def mixer_and_input(name: str, length: int = 14, **options) -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    mixer = build_mixer(name, width=WIDTH, segment=SEGMENT, heads=HEADS, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer, torch.randn(1, length, WIDTH, dtype=torch.float64)


def turned(x: Tensor, first: int = 0) -> Tensor:
    """x [S, D] rotated in pairs by the places first, first + 1, ..."""
    angle = torch.arange(first, first + len(x)).double()[:, None] * 10000 ** -(
        torch.arange(SIZE // 2).double() / (SIZE / 2)
    )
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def heads(mixer: torch.nn.Module, x: Tensor) -> Tensor:
    """[3, H, S, D]."""
    return mixer.qkv_proj(x).unflatten(-1, (3, HEADS, SIZE)).permute(1, 2, 0, 3)


def attention(q: Tensor, k: Tensor, v: Tensor, sees: Tensor) -> Tensor:
    return (q @ k.T * SIZE**-0.5).masked_fill(~sees, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("delta", [True, False])
def test_infini_attention(delta: bool) -> None:
    mixer, x = mixer_and_input("infini_attention", delta=delta)
    M, z = torch.zeros(HEADS, SIZE, SIZE).double(), torch.zeros(HEADS, SIZE).double()
    outputs = []
    for piece in x[0].split(SEGMENT):
        q, k, v = heads(mixer, piece)
        parts = []
        for h in range(HEADS):
            gate = torch.sigmoid(mixer.gate[h])
            local = attention(turned(q[h]), turned(k[h]), v[h], torch.ones(len(piece), len(piece)).tril().bool())

            def recall(y: Tensor, h: int = h) -> Tensor:
                read = F.elu(y) + 1
                return read @ M[h] / (read @ z[h])[:, None] if z[h].any() else torch.zeros_like(y)

            parts.append(gate * recall(q[h]) + (1 - gate) * local)
            write = v[h] - recall(k[h]) if delta else v[h]
            key = F.elu(k[h]) + 1
            M[h], z[h] = M[h] + key.T @ write, z[h] + key.sum(0)
        outputs.append(mixer.out_proj(torch.cat(parts, -1)))
    torch.testing.assert_close(mixer(x)[0][0], torch.cat(outputs), rtol=0, atol=1e-10)


def test_transformer_xl() -> None:
    mixer, x = mixer_and_input("transformer_xl")
    pieces, outputs = x[0].split(SEGMENT), []
    for n, piece in enumerate(pieces):
        before = pieces[n - 1] if n else piece[:0]
        q, (_, k, v) = heads(mixer, piece)[0], heads(mixer, torch.cat([before, piece]))
        sees = torch.ones(len(piece), len(before) + len(piece)).tril(len(before)).bool()
        parts = [attention(turned(q[h], len(before)), turned(k[h]), v[h], sees) for h in range(HEADS)]
        outputs.append(mixer.out_proj(torch.cat(parts, -1)))
    torch.testing.assert_close(mixer(x)[0][0], torch.cat(outputs), rtol=0, atol=1e-10)


def test_transformer_xl_can_stop_the_gradient_at_the_segment_before() -> None:
    for stop in (False, True):
        mixer, x = mixer_and_input("transformer_xl", stop_gradient=stop)
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(mixer(x)[0][0, SEGMENT:].sum(), x)
        assert bool(gradient[0, 0].any()) != stop


def test_recurrent_memory() -> None:
    mixer, x = mixer_and_input("recurrent_memory", slots=3)
    memory, outputs = mixer.initial, []
    for piece in x[0].split(SEGMENT):
        q, k, v = heads(mixer, torch.cat([memory, piece]))
        sees = torch.ones(3 + len(piece), 3 + len(piece)).tril().bool()
        sees[:3] = True
        parts = [attention(turned(q[h]), turned(k[h]), v[h], sees) for h in range(HEADS)]
        read = torch.cat(parts, -1)
        outputs.append(mixer.out_proj(read[3:]))
        new = memory + mixer.memory_out(read[:3])
        memory = new / (new.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
    torch.testing.assert_close(mixer(x)[0][0], torch.cat(outputs), rtol=0, atol=1e-10)


def test_the_state_holds_the_tokens_that_wait() -> None:
    mixer, x = mixer_and_input("infini_attention")
    _, state = mixer(x)
    assert state["waiting"].tolist() == [14 % SEGMENT]
    torch.testing.assert_close(state["tokens"][0, :2], mixer.qkv_proj(x[0, 12:]))
    assert not state["tokens"][0, 2:].any()


def test_infini_attention_keeps_its_memory_in_single_precision_at_least() -> None:
    mixer = build_mixer("infini_attention", width=WIDTH, segment=SEGMENT, heads=HEADS).bfloat16()
    y, state = mixer(torch.randn(1, 10, WIDTH).bfloat16())
    assert y.dtype == torch.bfloat16
    assert state["matrix"].dtype == torch.float32
    assert state.nbytes == mixer.state_nbytes(10, dtype=torch.bfloat16)
