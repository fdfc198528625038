"""The hierarchical memory against its description, read segment by segment and token by token, with gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.mixers import build_mixer
from contextlab.ops.position import rope

WIDTH, SEGMENT, HEADS, SIZE = 12, 4, 2, 6


def mixer_and_input(length: int = 22, **options) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    mixer = build_mixer("hierarchical_memory", width=WIDTH, segment=SEGMENT, heads=HEADS, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer, torch.randn(1, length, WIDTH, dtype=torch.float64, requires_grad=True)


def read_last(mixer: nn.Module, line: list[Tensor], places: list[int]) -> Tensor:
    """What the last vector of a line, at these places, reads of all of it."""
    q, k, v = mixer.qkv_proj(torch.stack(line)).unflatten(-1, (3, HEADS, SIZE)).unbind(1)
    q, k = (rope(y[None], torch.tensor(places))[0] for y in (q, k))
    return torch.cat([(k[:, h] @ q[-1, h] * SIZE**-0.5).softmax(0) @ v[:, h] for h in range(HEADS)])


def normed(mixer: nn.Module, x: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * mixer.norm.weight


def by_the_paper(mixer: nn.Module, x: Tensor, sensory: int, memories: int) -> tuple[Tensor, list[Tensor]]:
    """x [T, width] -> outputs [T, width] and the memories after the last complete segment."""
    P, T, M, before, outputs = mixer.initial, mixer.topic, [], [], []
    for piece in x.split(SEGMENT):
        line = [P, *before]
        places = list(range(len(line)))
        for t, token in enumerate(piece):
            line, places = [*line, token], [*places, 1 + sensory + t]
            outputs.append(mixer.out_proj.weight @ read_last(mixer, line, places))
        if len(piece) < SEGMENT:
            break
        read = read_last(mixer, [*line, P], [*places, 1 + sensory + SEGMENT])
        M = [*M, normed(mixer, P + mixer.memory_out.weight @ read)][-memories:]
        read = read_last(mixer, [T, *piece, T], list(range(SEGMENT + 2)))
        S = normed(mixer, T + mixer.memory_out.weight @ read)
        scores = [(mixer.search_q.weight @ S) @ (mixer.search_k.weight @ m) / WIDTH**0.5 for m in M]
        P = sum(weight * m for weight, m in zip(torch.stack(scores).softmax(0), M, strict=True))
        before = list(piece[SEGMENT - sensory :])
    return torch.stack(outputs), M


@pytest.mark.parametrize(("sensory", "memories"), [(2, 3), (0, 2), (4, 9)])
def test_hierarchical_memory_is_its_description(sensory: int, memories: int) -> None:
    mixer, x = mixer_and_input(sensory=sensory, memories=memories)
    y, state = mixer(x)
    expected, kept = by_the_paper(mixer, x[0], sensory, memories)
    torch.testing.assert_close(y[0], expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(state["memories"][0, -len(kept) :], torch.stack(kept), rtol=0, atol=1e-10)
    assert state["count"].tolist() == [x.shape[1] // SEGMENT]
    wanted = [x, *mixer.parameters()]
    weight = torch.randn_like(expected)
    got = torch.autograd.grad((y[0] * weight).sum(), wanted)
    for one, other in zip(got, torch.autograd.grad((expected * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_what_a_segment_sees_of_those_before() -> None:
    """With no way through the prompt, the sensory tokens are all that is left of the segment before."""
    mixer, x = mixer_and_input(sensory=2, memories=2)
    (through_all,) = torch.autograd.grad(mixer(x)[0][0, 2 * SEGMENT : 3 * SEGMENT].sum(), x)
    assert through_all[0, : 3 * SEGMENT].any(-1).all()
    assert not through_all[0, 3 * SEGMENT :].any()
    with torch.no_grad():
        mixer.norm.weight.zero_()  # memories, and so the prompts recalled from them, are zero
    (bridged,) = torch.autograd.grad(mixer(x)[0][0, 2 * SEGMENT : 3 * SEGMENT].sum(), x)
    assert bridged[0].any(-1).nonzero().flatten().tolist() == list(range(2 * SEGMENT - 2, 3 * SEGMENT))


def test_the_oldest_memory_leaves_the_queue() -> None:
    mixer, x = mixer_and_input(length=6 * SEGMENT, sensory=0, memories=2)
    queues = [mixer(x[:, : n * SEGMENT])[1]["memories"][0] for n in range(1, 7)]
    assert not queues[0][0].any()
    for before, after in pairwise(queues):
        torch.testing.assert_close(after[0], before[1])


def test_more_sensory_tokens_than_a_segment_has_are_refused() -> None:
    with pytest.raises(InputError, match="sensory 5 is more than the 4 tokens of a segment; the most is 4"):
        mixer_and_input(sensory=5)
