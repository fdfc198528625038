"""The oracle and KVzip: what they note of the text that they watch, against brute force, and what they then keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contextlab.errors import InputError
from contextlab.policies import AdaKV, KVzip, Oracle, build_policy
from contextlab.policies.eviction.oracle import leave_one_out
from contextlab.policies.eviction.two_pass import Recorder
from contextlab.testing.policies import masked, model, read, tokens


def answered(q: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor, cap: float | None) -> Tensor:
    """One query's attention: q [D], keys [N, D], values [N, V], bias [N]."""
    scores = keys @ q * scale
    scores = scores if cap is None else cap * (scores / cap).tanh()
    return (scores + bias).softmax(0) @ values


def changes(
    q: Tensor, keys: Tensor, values: Tensor, held: int, scale: float, slopes: Tensor | None = None,
    position: Tensor | None = None, cap: float | None = None,
) -> Tensor:  # fmt: skip
    """What each of the first `held` tokens is worth to the queries of those after: by leaving it out, in loops.

    q: [F, H, D]. keys: [Hkv, held + F, D], values: [Hkv, held + F, V]. position: [Hkv, held + F].
    """
    worth = torch.zeros(len(keys), held, dtype=torch.float64)
    shared = q.shape[1] // len(keys)
    for f in range(len(q)):
        for h in range(q.shape[1]):
            kv, n = h // shared, held + f + 1
            bias = torch.zeros(n, dtype=torch.float64)
            if slopes is not None and position is not None:
                bias = -slopes[h] * (position[kv, n - 1] - position[kv, :n])
            whole = answered(q[f, h], keys[kv, :n], values[kv, :n], scale, bias, cap)
            for j in range(held):
                rest = torch.arange(n) != j
                less = answered(q[f, h], keys[kv, :n][rest], values[kv, :n][rest], scale, bias[rest], cap)
                worth[kv, j] += (whole - less).square().sum()
    return worth


@given(
    held=st.integers(1, 5),
    ahead=st.integers(1, 4),
    shared=st.integers(1, 2),
    alibi=st.booleans(),
    cap=st.sampled_from([None, 0.5]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_leaving_one_out_is_that(held: int, ahead: int, shared: int, alibi: bool, cap: float | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, ahead, 2 * shared, 3, generator=generator, dtype=torch.float64)
    keys, values = torch.randn(2, 1, 2, held + ahead, 3, generator=generator, dtype=torch.float64)
    slopes = torch.rand(2 * shared, generator=generator, dtype=torch.float64) if alibi else None
    place = torch.arange(20, 20 + ahead)
    position = torch.cat((torch.randperm(20, generator=generator)[:held].sort().values, place)).expand(1, 2, -1)
    got = leave_one_out(
        q, keys[:, :, :held], values[:, :, :held], keys[:, :, held:], values[:, :, held:], scale=0.6, slopes=slopes,
        place=place[None], position=position[..., :held], cap=cap,
    )  # fmt: skip
    expected = changes(q[0], keys[0], values[0], held, 0.6, slopes, position[0], cap)
    torch.testing.assert_close(got[0], expected, rtol=1e-6, atol=1e-12)


def test_a_weight_of_one_is_left_out_in_earnest() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 1, 2, generator=generator, dtype=torch.float64)
    other = torch.randn(1, 1, 1, 2, generator=generator, dtype=torch.float64)
    held, values = torch.cat((1e6 * q, k), 2), torch.cat((v, other), 2)
    worth = leave_one_out(q, held, values, -1e6 * q, v, scale=1.0)
    torch.testing.assert_close(worth[0, 0], torch.stack(((v - other).square().sum(), torch.tensor(0.0).double())))
    unseen = torch.tensor([[[True, False]]])
    assert leave_one_out(q, held, values, -1e6 * q, v, scale=1.0, visible=unseen)[0, 0, 1] == 0
    assert leave_one_out(q, held[:, :, :0], values[:, :, :0], k, v, scale=1.0).shape == (1, 1, 0)
    assert not leave_one_out(q, k, v, k, v, scale=1.0, real=torch.tensor([[False]])).any()


def watching(reader: Any, x: Tensor, mask: Tensor | None = None, of: type[Any] = Oracle, **options: Any) -> Any:
    policy = of(**options)
    policy.watch(reader, x, mask)
    return policy


def test_the_oracle_keeps_what_brute_force_says() -> None:
    reader, x = model(depth=1), tokens(2, 26)
    policy = watching(reader, x, budget="9tok", sinks=1, window=2)
    noted = Recorder()
    with noted.attach(reader), torch.no_grad():
        reader.read(x)
    with policy.attach(reader), torch.no_grad():
        _, state = reader.read(x[:, :18])
    seen = noted.last[0]
    for row in range(2):
        worth = changes(
            seen.q[row, 18:],
            seen.k[row].transpose(0, 1),
            seen.v[row].transpose(0, 1),
            18,
            policy.layers(reader)[0].scale,
        )
        for head in range(2):
            best = worth[head, 1:16].topk(6).indices + 1
            assert state.layers[0].positions[row, head].tolist() == sorted([0, *best.tolist(), 16, 17])


def test_the_oracle_is_a_ceiling() -> None:
    """No other policy comes as close to the full cache's answers on what follows."""
    reader, x = model(depth=1, seed=3), tokens(8, 60, seed=2)
    for parameter in reader.parameters():  # sharper attention than that of fresh weights
        parameter.data *= 2
    expected, _, _ = read(reader, x, [60])
    options: dict[str, Any] = {"budget": "14tok", "window": 4, "every": 1}

    def off(policy: Any) -> float:
        with policy.attach(reader):
            got, _, _ = read(reader, x, [40])
        return float((got - expected)[:, 40:].square().mean())

    ceiling = off(watching(reader, x, **options))
    others = {name: off(build_policy(name, **options)) for name in ("random", "snapkv", "h2o", "keydiff", "tova")}
    assert ceiling < 0.8 * min(others.values()), (ceiling, others)


@pytest.mark.parametrize("pads", [None, (0, 7)], ids=["", "padded"])
@pytest.mark.parametrize("budget", ["24tok", "50%", "40kB"])
def test_the_oracle_keeps_the_laws(budget: str, pads: tuple[int, ...] | None) -> None:
    """As test_base.py holds every policy to them that need not have read the text."""
    reader, x = model(), tokens()
    mask = masked(x, pads)
    policy = watching(reader, x, mask, budget=budget, window=4)
    with policy.attach(reader):
        together, state, sizes = read(reader, x, [30, 10], mask)
        _, before, _ = read(reader, x[:, :33], [30], None if mask is None else mask[:, :33])
        first, _ = reader.read(x[:, 33:34], before)
        again, _ = reader.read(x[:, 33:34], before)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    full = 2 * 2 * 2 * (8 + 8) * 8
    allowed = {"40kB": [40_000] * 22, "50%": [full * n // 2 for n in (30, 40, *range(41, 61))]}.get(
        budget, [10**9] * 22
    )
    assert all(size <= most for size, most in zip(sizes, allowed, strict=True))
    if budget == "24tok":
        assert max(layer.slots.used for layer in state.layers) <= 24
        for row, pad in enumerate(pads or (0, 0)):
            mine = x[row : row + 1, pad:]
            with watching(reader, mine, budget=budget, window=4).attach(reader):
                alone, _, _ = read(reader, mine, [30 - pad, 10])
            torch.testing.assert_close(together[row : row + 1, pad:], alone, rtol=0, atol=1e-9)
    whole = watching(reader, x, mask, budget="100%")
    plain, _, _ = read(reader, x, [60], mask)
    with whole.attach(reader):
        got, _, _ = read(reader, x, [30, 12], mask)
    torch.testing.assert_close(got, plain, rtol=0, atol=1e-9)


def test_a_short_sight_sees_less() -> None:
    reader, x = model(depth=1), tokens(1, 60)
    with watching(reader, x, budget="12tok", ahead=1).attach(reader), torch.no_grad():
        _, near = reader.read(x[:, :40])
    with watching(reader, x[:, :41], budget="12tok").attach(reader), torch.no_grad():
        _, same = reader.read(x[:, :40])
    with watching(reader, x, budget="12tok").attach(reader), torch.no_grad():
        _, far = reader.read(x[:, :40])
    assert near.layers[0].positions.tolist() == same.layers[0].positions.tolist() != far.layers[0].positions.tolist()


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("chunk", [9, 100])
def test_kvzips_score_is_the_greatest_attention_of_the_repetition(chunk: int, position: str) -> None:
    reader, x = model(position=position), tokens(2, 24)
    policy = watching(reader, x, of=KVzip, chunk=chunk, request=[3, 1], lead=2, sinks=3)
    for first in range(0, 24, chunk):
        part = x[:, first : first + chunk]
        ask = torch.cat((torch.tensor([[3, 1]] * 2), x[:, max(0, first - 2) : first], part), 1)
        noted = Recorder()
        with noted.attach(reader), torch.no_grad():
            reader.read(torch.cat((x, ask), 1))
        for layer in policy.layers(reader):
            seen = noted.last[layer.index]
            chosen = [*range(min(3, first)), *range(first, first + part.shape[1])]
            for row, head, place in [(0, 0, first), (1, 1, first + 4), (1, 0, first + part.shape[1] - 1)]:
                best = 0.0
                for t in range(24, seen.q.shape[1]):
                    at = torch.tensor([*chosen, *range(24, t + 1)])
                    for h in (2 * head, 2 * head + 1):
                        scores = seen.k[row, at, head] @ seen.q[row, t, h] * layer.scale
                        if layer.slopes is not None:
                            scores = scores - layer.slopes[h] * (t - at)
                        best = max(best, float(scores.softmax(0)[at == place]))
                got = float(policy._importance[layer.index][row, head, place])
                assert got == pytest.approx(best, rel=1e-9)


def test_kvzip_keeps_what_it_scored_and_all_that_follows() -> None:
    reader, x = model(), tokens(2, 60)
    policy = watching(reader, x[:, :40], of=KVzip, budget="20tok", sinks=2, window=1, every=1)
    with policy.attach(reader):
        _, state, _ = read(reader, x[:, :40], [25, 15])
        _, after, _ = read(reader, x, [25, 15])
    with torch.no_grad():
        _, full = reader.read(x[:, :40])
        applied = policy.apply(full, reader)
    for layer in range(2):
        assert applied.layers[layer].positions.shape[2] == state.layers[layer].positions.shape[2] == 20
        best = policy._importance[layer].clone()
        best[..., :2] = best[..., 39:] = 9.0
        assert applied.layers[layer].positions.tolist() == best.topk(20).indices.sort(2).values.tolist()
        assert set(range(42, 60)) <= set(after.layers[layer].positions[0, 0].tolist())  # two are sinks


def test_heads_may_share_the_budget_of_what_was_watched() -> None:
    reader, x = model(), tokens(2, 60)
    shared = AdaKV(budget="16tok", of=watching(reader, x, of=KVzip, sinks=1), floor=0.0, page=1)
    with shared.attach(reader):
        _, state, _ = read(reader, x, [50])
    assert any(len({len(head) for head in row}) > 1 for layer in state.layers for row in layer.places())
    with pytest.raises(InputError, match="call policy.watch"), AdaKV(of="kvzip").attach(reader):
        pass
    with pytest.raises(InputError, match="sinks: this KVzip has its own"):
        AdaKV(of=watching(reader, x, of=KVzip), sinks=3)


def test_models_of_transformers_are_watched_too() -> None:
    transformers = pytest.importorskip("transformers")
    from contextlab.models import HuggingFaceModel

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, num_key_value_heads=1, **small))
    reader, x = HuggingFaceModel(theirs.double().eval()), tokens(2, 40)
    for of, more in ((Oracle, {}), (KVzip, {"chunk": 16})):
        with watching(reader, x, of=of, budget="12tok", **more).attach(reader):
            logits, state, _ = read(reader, x, [30])
        assert logits.isfinite().all()
        assert state.length == 40
    with pytest.raises(InputError, match="HuggingFaceModel"):
        Oracle().watch(theirs, x)


def test_what_cannot_be_foreseen_is_refused_in_one_line() -> None:
    reader, x = model(), tokens()
    for name in ("oracle", "kvzip"):
        with pytest.raises(InputError, match=r"watch\(model, tokens\) first"), build_policy(name).attach(reader):
            pass
    known = watching(reader, x, budget="24tok")
    with known.attach(reader), pytest.raises(InputError, match="watched another text"):
        reader.read(tokens(seed=5))
    with known.attach(reader), pytest.raises(InputError, match="watched another text, or this one with other padding"):
        reader.read(x, None, masked(x, (0, 3)))
    with known.attach(reader), pytest.raises(InputError, match="watched 2 texts, this is a batch of 1"):
        reader.read(x[:1])
    with known.attach(reader), pytest.raises(InputError, match="watched 60 tokens"):
        read(reader, torch.cat((x, x), 1), [61])
    with pytest.raises(InputError, match="a model of 2 layers, this one has 1"), known.attach(model(depth=1)):
        pass
    with pytest.raises(InputError, match="without padding"):
        KVzip().watch(reader, x, masked(x, (0, 3)))
    with pytest.raises(InputError, match="at least one token"):
        Oracle().watch(reader, x[:, :0])
    for options, message in (({"ahead": 0}, "ahead"), ({"chunk": 0}, "chunk"), ({"lead": -1}, "lead")):
        with pytest.raises(InputError, match=message):
            (Oracle if "ahead" in options else KVzip)(**options)  # type: ignore[arg-type]
