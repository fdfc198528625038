"""Sentinel tokens against their description, segment by segment and token by token, with gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from contextlab.mixers import build_mixer
from contextlab.ops.position import rope

WIDTH, SEGMENT, HEADS, SIZE = 12, 4, 2, 6


def mixer_and_input(length: int = 22, **options) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    options = {"segment": SEGMENT, "heads": HEADS, **options}
    mixer = build_mixer("sentinel", width=WIDTH, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer, torch.randn(1, length, WIDTH, dtype=torch.float64, requires_grad=True)


def turned(x: Tensor, place: int) -> Tensor:
    """x [H, D] at a place."""
    return rope(x[None, None], torch.tensor([place]))[0, 0]


def attention(q: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """q [H, D] reads keys and values [H, D] -> [H D]."""
    k, v = (torch.stack(each, 1) for each in zip(*pairs, strict=True))
    scores = torch.einsum("hd,hnd->hn", q, k) * SIZE**-0.5
    return torch.einsum("hn,hnd->hd", scores.softmax(-1), v).flatten()


def by_the_paper(mixer: nn.Module, x: Tensor, look_back: bool) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """x [T, width] -> outputs [T, width] and what the complete segments left."""
    maps = (mixer.qkv_proj if mixer.sentinel_proj is None else mixer.sentinel_proj).weight
    left: list[tuple[Tensor, Tensor]] = []
    outputs = []
    for piece in x.split(SEGMENT):
        first = len(left)
        own: list[tuple[Tensor, Tensor]] = []
        for t, token in enumerate(piece):
            q, k, v = (mixer.qkv_proj.weight @ token).view(3, HEADS, SIZE)
            own.append((turned(k, first + t), v))
            outputs.append(mixer.out_proj.weight @ attention(turned(q, first + t), left + own))
        if len(piece) < SEGMENT:
            break
        made = []
        for j, embedding in enumerate(mixer.embedding):
            q = (maps @ embedding).view(3, HEADS, SIZE)[0]
            read = attention(turned(q, first + SEGMENT + j), left + own if look_back else own)
            summary = embedding + mixer.read_out.weight @ read
            summary = summary / (summary.square().mean() + 1e-6).sqrt() * mixer.norm.weight
            _, k, v = (maps @ summary).view(3, HEADS, SIZE)
            made.append((turned(k, first + j), v))
        left = left + made
    return torch.stack(outputs), left


@pytest.mark.parametrize("look_back", [True, False])
@pytest.mark.parametrize("own_maps", [True, False])
@pytest.mark.parametrize("sentinels", [1, 3])
def test_sentinel_is_its_description(look_back: bool, own_maps: bool, sentinels: int) -> None:
    mixer, x = mixer_and_input(look_back=look_back, own_maps=own_maps, sentinels=sentinels)
    y, state = mixer(x)
    expected, left = by_the_paper(mixer, x[0], look_back)
    torch.testing.assert_close(y[0], expected, rtol=0, atol=1e-10)
    pairs = torch.stack([torch.stack(pair) for pair in left])
    torch.testing.assert_close(state["left"][0].flatten(0, 1), pairs, rtol=0, atol=1e-10)
    wanted = [x, *mixer.parameters()]
    weight = torch.randn_like(expected)
    got = torch.autograd.grad((y[0] * weight).sum(), wanted)
    for one, other in zip(got, torch.autograd.grad((expected * weight).sum(), wanted), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def test_later_segments_hear_a_segment_through_its_sentinels_alone() -> None:
    mixer, x = mixer_and_input()
    (heard,) = torch.autograd.grad(mixer(x)[0][0, SEGMENT:].sum(), x)
    assert heard[0, :SEGMENT].any(-1).all()
    with torch.no_grad():
        mixer.read_out.weight.zero_()  # sentinels that read nothing
    (heard,) = torch.autograd.grad(mixer(x)[0][0, SEGMENT:].sum(), x)
    assert not heard[0, :SEGMENT].any()


def test_rows_that_are_in_different_segments() -> None:
    """Left padding of a whole segment and more: rows then count their segments, and their places, apart."""
    mixer, x = mixer_and_input()
    x = torch.randn(2, 22, WIDTH, dtype=torch.float64)
    mask = torch.arange(22) >= torch.tensor([0, 9])[:, None]
    y, state = mixer(x, None, mask)
    assert state["count"].tolist() == [22 // SEGMENT, 13 // SEGMENT]
    torch.testing.assert_close(y[1, 9:], by_the_paper(mixer, x[1, 9:], True)[0], rtol=0, atol=1e-10)


def test_the_state_grows_as_sentinels_over_a_segment() -> None:
    mixer = build_mixer("sentinel", width=WIDTH, heads=HEADS, segment=64, sentinels=4)
    pair = 2 * HEADS * SIZE * 4
    assert mixer.state_nbytes(64 * 100) - mixer.state_nbytes(64 * 10) == 90 * 4 * pair
    assert mixer.state_nbytes(64 * 11 - 1) == mixer.state_nbytes(64 * 10)


def test_a_copied_state_is_known_though_segments_are_long() -> None:
    mixer, x = mixer_and_input(length=210, segment=100)
    mixer(x[:, :3], mixer(x[:, :2])[1].select(torch.tensor([0])))
    with torch.no_grad():
        _, state = mixer(x)
        rows = torch.tensor([0, 0])
        mixer(x[:, :1].expand(2, -1, -1), state.select(rows))
