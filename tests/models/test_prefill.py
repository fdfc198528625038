"""What reads prompts for less, against reading them one by one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contextlab.errors import InputError
from contextlab.models import LazyPrefill, Prepacked, build_model
from contextlab.models.generation import generate
from contextlab.models.prefill import Packing
from contextlab.ops.packed import packed_attention
from contextlab.ops.softmax import softmax_attention
from contextlab.policies import KeptState, build_policy
from contextlab.state import KVState

SIZE = 20


def model(seed: int = 0, **options: Any) -> Any:
    layer = {"mixer": "attention", "options": options.pop("layer", {"kv_heads": 2})}
    spec = {"width": 32, "depth": 2, "heads": 4, "mlp_ratio": 1, "layers": [layer], **options}
    return build_model({**spec, "input_size": SIZE, "output_size": SIZE, "read_in": "token"}, seed=seed).double()


def prompts(sizes: tuple[int, ...], seed: int = 0, pad: int = 0) -> tuple[Tensor, Tensor]:
    """A left-padded batch of prompts of these sizes, and its mask."""
    length = max(sizes) + pad
    x = torch.randint(0, SIZE, (len(sizes), length), generator=torch.Generator().manual_seed(seed))
    return x, torch.arange(length) >= length - torch.tensor(sizes)[:, None]


@pytest.mark.parametrize("slopes", [None, torch.tensor([0.5, 0.25, 0.1, 0.01], dtype=torch.float64)])
def test_packed_attention_is_each_segments_own(slopes: Tensor | None) -> None:
    sizes = (300, 1, 5, 250)
    q, k, v = (torch.randn(1, sum(sizes), heads, 4, dtype=torch.float64) for heads in (4, 2, 2))
    segment = torch.repeat_interleave(torch.tensor([3, 0, 7, 1]), torch.tensor(sizes))[None]
    got = packed_attention(q, k, v, segment=segment, slopes=slopes)
    alone = zip(*(x.split(sizes, 1) for x in (q, k, v)), strict=True)
    expected = torch.cat([softmax_attention(*each, slopes=slopes) for each in alone], 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=9).filter(any), st.integers(0, 3))
def test_every_token_is_packed_once_and_in_order(sizes: list[int], pad: int) -> None:
    x, mask = prompts(tuple(sizes), pad=pad)
    packing = Packing.of(mask)
    rows, length = packing.prompt.shape
    assert length == max(sizes)
    full = (packing.prompt >= 0).sum(1)
    assert int(full.sum()) == sum(sizes)
    assert rows == 1 or int(full.sort().values[:2].sum()) > length  # no two rows would fit into one
    for i, size in enumerate(sizes):
        there = (packing.prompt == i).nonzero()
        assert len(there) == size
        assert len(set(there[:, 0].tolist())) <= 1  # in one row, one after the other
        assert packing.position[packing.prompt == i].tolist() == list(range(size))
        assert torch.equal(x.flatten()[packing.source[packing.prompt == i]], x[i, mask[i]])
        assert torch.equal(x.flatten()[packing.source].flatten()[packing.place[i, mask[i]]], x[i, mask[i]])


@pytest.mark.parametrize(
    "options",
    [
        {}, {"position": "learned", "max_length": 64}, {"position": "sinusoidal"}, {"position": "none"},
        {"layer": {"position": "alibi"}}, {"loops": 2}, {"layer": {"rope_fraction": 0.5, "qk_norm": True}},
        {"block": "parallel"}, {"layers": [{"mixer": "attention", "with_input": True}]},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("sizes", "pad"), [((3, 17, 9, 1, 5, 12), 0), ((4, 4, 2), 3)])
@torch.no_grad()
def test_packed_prompts_are_read_as_alone(options: dict[str, Any], sizes: tuple[int, ...], pad: int) -> None:
    reader = model(**options)
    x, mask = prompts(sizes, pad=pad)
    more = torch.randint(0, SIZE, (len(sizes), 4))
    got, state = Prepacked(reader).read(x, None, mask)
    after, last = Prepacked(reader).read(more[:, :1], state)
    after = torch.cat((after, reader.read(more[:, 1:], last)[0]), 1)
    for i, size in enumerate(sizes):
        alone, own = reader.read(x[i : i + 1, -size:])
        torch.testing.assert_close(got[i : i + 1, -size:], alone, rtol=0, atol=1e-9)
        torch.testing.assert_close(after[i : i + 1], reader.read(more[i : i + 1], own)[0], rtol=0, atol=1e-9)
    assert not got[~mask].any()
    _, padded = reader.read(x, None, mask)
    assert state.length == padded.length
    assert state.nbytes == padded.nbytes
    for ours, due in zip(state.layers, padded.layers, strict=True):
        assert isinstance(ours, KVState)
        assert isinstance(due, KVState)
        assert torch.equal(ours.start, due.start)
        for mine, theirs in zip(ours.cached(), due.cached(), strict=True):
            torch.testing.assert_close(mine[mask], theirs[mask], rtol=0, atol=1e-9)


@torch.no_grad()
def test_less_is_computed_and_the_same_is_written() -> None:
    reader, read = model(), []
    x, mask = prompts((40, 7, 12, 9, 20, 2, 19, 10))
    hook = reader.blocks[0].register_forward_hook(lambda _, given, __: read.append(given[0].shape[:2].numel()))
    got = generate(Prepacked(reader), x, 5, mask=mask)
    assert read[0] == 3 * 40  # 119 tokens in rows of 40; the padded batch has 320
    hook.remove()
    assert torch.equal(got, generate(reader, x, 5, mask=mask))


@torch.no_grad()
def test_a_policy_goes_on_from_packed_prompts() -> None:
    reader, policy = model(), build_policy("streaming_llm", budget="8tok", every=1)
    x, mask = prompts((20, 7, 12))
    more = torch.randint(0, SIZE, (3, 3))
    _, state = Prepacked(reader).read(x, None, mask)
    _, padded = reader.read(x, None, mask)
    mine, theirs = (policy.apply(each, reader) for each in (state, padded))
    with policy.attach(reader):
        torch.testing.assert_close(reader.read(more, mine)[0], reader.read(more, theirs)[0], rtol=0, atol=1e-9)
        with pytest.raises(InputError, match="a policy is attached to this model already"):
            Prepacked(reader).read(x, None, mask)


def test_what_cannot_be_packed_is_refused() -> None:
    for options in ({"layer": {"short_conv": 3}}, {"layers": [{"mixer": "attention"}, {"mixer": "gla"}]}):
        with pytest.raises(InputError, match=r"prompts in one row would not stay apart in block \d"):
            Prepacked(model(**options))
    shared: dict[str, Any] = {"layers": [{"mixer": "attention"}, {"mixer": "attention", "kv": "shared"}]}
    with pytest.raises(InputError, match=r"in block 1 \(SharedKeys\)"):
        Prepacked(model(**shared))
    with pytest.raises(InputError, match="expected a model of contextlab"):
        Prepacked(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    x, mask = prompts((3, 5))
    with pytest.raises(InputError, match="False at left padding only"):
        Prepacked(model()).read(x, None, mask.flip(1))


def _naive(
    reader: Any, x: Tensor, keep: dict[int, float], read: int, window: int, sinks: int
) -> tuple[Tensor, list[int]]:
    """One prompt of `read` tokens and what follows, all computed in all layers; what is left out is not seen there."""
    alive, counts = torch.ones(x.shape[1], dtype=torch.bool), []
    seen: dict[str, Tensor] = {}

    def masked(self: Any, new: Any, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        q = new.q
        shared = q.shape[2] // k.shape[2]
        scores = torch.einsum("thd,shd->hts", q[0], k[0].repeat_interleave(shared, 1)) * q.shape[3] ** -0.5
        at = torch.arange(q.shape[1])
        if self.slopes is not None:
            scores = scores - self.slopes[:, None, None] * (at[:, None] - at)
        weights = scores.masked_fill((at > at[:, None]) | ~alive, -torch.inf).softmax(-1).nan_to_num(0.0)
        seen["last"] = weights[:, read - 1].mean(0)
        return torch.einsum("hts,shd->thd", weights, v[0].repeat_interleave(shared, 1))[None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(reader.blocks[0].mixer), "_score", masked)
        embedded = h = reader.read_in(x)
        if reader.spec.position in ("learned", "sinusoidal"):
            embedded, _ = reader._add_positions(embedded, 0, None, None, None)
            h = embedded
        for i, block in enumerate(reader.blocks):
            h, _ = block(h, None, None, False, embedded, x)
            counts.append(int(alive[:read].sum()))
            if i in keep:
                left = min(read, max(math.ceil(round(keep[i] * read, 6)), window + sinks))
                ends = [t for t in range(read) if t < sinks or t >= read - window]
                others = [t for t in range(read) if alive[t] and t not in ends]
                others.sort(key=lambda t: (-seen["last"][t], -t))  # of equal ones the later
                alive[:read] = False
                alive[[*ends, *others[: left - len(ends)]]] = True
    return reader.read_out(reader.read_out_norm(h))[0, read - 1 :], counts


@pytest.mark.parametrize(
    "options",
    [{}, {"position": "learned", "max_length": 64}, {"layer": {"position": "alibi"}}, {"position": "none"},
     {"layers": [{"mixer": "attention", "with_input": True}]}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("pads", [(0, 0), (0, 11), (2, 30)])
@torch.no_grad()
def test_lazy_prefill_is_attention_without_what_is_left_out(options: dict[str, Any], pads: tuple[int, ...]) -> None:
    reader, keep = model(depth=4, **options), {0: 0.5, 2: 0.3}
    x = torch.randint(0, SIZE, (2, 38), generator=torch.Generator().manual_seed(2))
    mask = None if not any(pads) else torch.arange(32) >= torch.tensor(pads)[:, None]
    lazy = LazyPrefill(reader, keep, window=2, sinks=1)
    first, state = lazy.read(x[:, :32], None, mask)
    got = [first]
    for piece in (x[:, 32:33], x[:, 33:34], x[:, 34:37], x[:, 37:]):
        y, state = lazy.read(piece, state)
        got.append(y)
    for row, pad in enumerate(pads):
        expected, counts = _naive(reader, x[row : row + 1, pad:], keep, 32 - pad, 2, 1)
        torch.testing.assert_close(torch.cat(got, 1)[row], expected, rtol=0, atol=1e-9)
        if pad == max(pads) == 0:
            assert counts == [32, 16, 16, 10]
    assert state.length == 38
    if not any(pads):
        assert [layer.slots.used for layer in state.layers if isinstance(layer, KeptState)] == [38, 22, 22, 16]


@torch.no_grad()
def test_lazy_prefill_that_leaves_nothing_out_changes_nothing_and_less_is_held() -> None:
    reader, (x, mask) = model(depth=3), prompts((40, 17))
    expected, full = reader.read(x, None, mask)
    got, _ = LazyPrefill(reader, {0: 1.0}).read(x, None, mask)
    torch.testing.assert_close(got[:, 0], expected[:, -1], rtol=0, atol=1e-9)
    ran: list[int] = []
    for block in reader.blocks:
        block.mlp.register_forward_hook(lambda _, given, __: ran.append(given[0].shape[1]))
    _, held = LazyPrefill(reader, {0: 0.25}).read(x, None, mask)
    assert ran == [40, 10, 10]
    assert held.nbytes < 0.55 * full.nbytes
    written = generate(LazyPrefill(reader, {0: 1.0}), x, 6, mask=mask)
    assert torch.equal(written, generate(reader, x, 6, mask=mask))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({1: 0.5}, "keep: layer 1 has none above it; expected 0 to 0"),
        ({0: 0.0}, "keep: expected parts above 0, each below the one before"),
        ({0: 1.5}, "keep: expected parts above 0, each below the one before"),
    ],
)
def test_impossible_lazy_prefills_are_refused(keep: dict[int, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LazyPrefill(model(), keep)
    with pytest.raises(InputError, match="runs its layers several times"):
        LazyPrefill(model(loops=2), {0: 0.5})
    with pytest.raises(InputError, match=r"tokens cannot be left out in block 0 \(Attention\)"):
        LazyPrefill(model(layer={"short_conv": 3}), {0: 0.5})
