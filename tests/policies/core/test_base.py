"""What every registered policy is held to, under each of the option cases it was registered with.

A new policy gets all of this with no new test code. `Forgetful` at the end shows that the laws can fail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from contextlab import registry
from contextlab.errors import InputError
from contextlab.models import build_model
from contextlab.ops.kv import KVLayer
from contextlab.policies import Budget, EvictionPolicy, Policy, Seen, build_policy

SIZE = 20
Build = Callable[..., Policy]


def cases() -> list[Any]:
    """One test parameter a registered policy and option case; each is called with a budget and further options."""
    found = []
    for entry in registry.entries("policy"):
        for options in entry.cases:
            label = "-".join(f"{key}={value}" for key, value in options.items())

            def build(entry: registry.Entry = entry, options: Any = options, **more: Any) -> Policy:
                known = {p.name for p in entry.parameters}
                small = {"window": 4} if "window" in known else {}
                return entry.build(**{**small, **options, **{k: v for k, v in more.items() if k in known}})

            found.append(pytest.param(build, id=f"{entry.name}-{label}" if label else entry.name))
    return found


every = pytest.mark.parametrize("build", cases())


def model(seed: int = 0, depth: int = 2, **options: Any) -> Any:
    position = options.pop("position", "rope")
    layer = {"mixer": "attention", "options": {"kv_heads": 2, **options}}
    spec = {"width": 32, "position": position, "depth": depth, "heads": 4, "mlp_ratio": 1, "layers": [layer]}
    return build_model({**spec, "input_size": SIZE, "output_size": SIZE, "read_in": "token"}, seed=seed).double()


def tokens(batch: int = 2, length: int = 60, seed: int = 0) -> Tensor:
    return torch.randint(0, SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def read(reader: Any, x: Tensor, pieces: list[int], mask: Tensor | None = None) -> tuple[Tensor, Any, list[int]]:
    """Logits, last state and the bytes after each piece; what is left after the pieces is read token by token."""
    state, outputs, sizes, at = None, [], [], 0
    for size in [*pieces, *[1] * (x.shape[1] - sum(pieces))]:
        piece = slice(at, at + size)
        y, state = reader.read(x[:, piece], state, None if mask is None else mask[:, piece])
        outputs.append(y)
        sizes.append(state.nbytes)
        at += size
    return torch.cat(outputs, 1), state, sizes


padding = pytest.mark.parametrize("pads", [None, (0, 7)], ids=["", "padded"])


def masked(x: Tensor, pads: tuple[int, ...] | None) -> Tensor | None:
    return None if pads is None else torch.arange(x.shape[1]) >= torch.tensor(pads)[:, None]


@every
@padding
def test_a_full_budget_changes_nothing(build: Build, pads: tuple[int, ...] | None) -> None:
    reader, x = model(), tokens()
    mask = masked(x, pads)
    expected, _, _ = read(reader, x, [60], mask)
    with build(budget="100%").attach(reader):
        got, state, _ = read(reader, x, [30, 12], mask)
    real = torch.ones(x.shape, dtype=torch.bool) if mask is None else mask
    assert state.length == 60
    if not build().lossless:  # what is lost is only seen when it is read back: by the pieces after the first
        assert not torch.allclose(got[real], expected[real], rtol=0, atol=1e-9)
        got, expected, real = got[:, :30], expected[:, :30], real[:, :30]
    torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-9)


@every
@pytest.mark.parametrize("budget", ["24tok", "50%", "40kB"])
@padding
def test_the_budget_is_never_exceeded(build: Build, budget: str, pads: tuple[int, ...] | None) -> None:
    reader, x = model(), tokens()
    policy = build(budget=budget)
    if "budget" not in registry.lookup("policy", _name(policy)).signature.parameters:
        pytest.skip("a policy without a budget")
    if policy.bounds != "held":
        pytest.skip("its budget is not of what is held: tests/policies/reading/test_selective.py counts what is read")
    with policy.attach(reader):
        _, state, sizes = read(reader, x, [30, 10], masked(x, pads))
    assert all(size == each.nbytes for size, each in zip(sizes[-1:], [state], strict=True))
    full = 2 * 2 * 2 * (8 + 8) * 8  # layers, rows, key heads, key and value, bytes: of each token
    lengths = [30, 40, *range(41, 61)]
    allowed = {"40kB": [40_000] * 22, "50%": [full * n // 2 for n in lengths]}.get(budget)
    if allowed is not None:
        assert all(size <= most for size, most in zip(sizes, allowed, strict=True)), (sizes, allowed)
    if budget == "24tok":
        held = [layer.slots.used for layer in state.layers if hasattr(layer, "slots")]
        assert sum(held) <= 24 * len(held)
        assert getattr(policy, "pyramid", None) is not None or max(held, default=0) <= 24


@every
def test_an_older_state_stays_valid(build: Build) -> None:
    reader, x = model(), tokens()
    with build(budget="24tok").attach(reader), torch.no_grad():
        _, before, _ = read(reader, x[:, :33], [30])
        kept = before.map(Tensor.clone)
        first, _, _ = _on(reader, x[:, 33:44], before)
        other, _, _ = _on(reader, x[:, 44:54], before)
        again, _, _ = _on(reader, x[:, 33:44], before)
        other_again, _, _ = _on(reader, x[:, 44:54], kept)
    torch.testing.assert_close(again, first, rtol=0, atol=0)
    torch.testing.assert_close(other_again, other, rtol=0, atol=1e-12)


def _on(reader: Any, x: Tensor, state: Any) -> tuple[Tensor, Any, None]:
    outputs = []
    for t in range(x.shape[1]):
        y, state = reader.read(x[:, t : t + 1], state)
        outputs.append(y)
    return torch.cat(outputs, 1), state, None


@every
def test_a_batch_gives_what_each_row_gives_alone(build: Build) -> None:
    reader, x = model(), tokens(3)
    pads = (0, 5, 19)
    with build(budget="24tok").attach(reader):
        together, _, _ = read(reader, x, [40], masked(x, pads))
        for row, pad in enumerate(pads):
            alone, _, _ = read(reader, x[row : row + 1, pad:], [40 - pad])
            torch.testing.assert_close(together[row : row + 1, pad:], alone, rtol=0, atol=1e-9)


@every
def test_what_it_says_of_pieces_is_true(build: Build) -> None:
    reader, x = model(), tokens()
    policy = build(budget="24tok")
    with policy.attach(reader):
        whole, _, _ = read(reader, x, [50])
        pieces, _, _ = read(reader, x, [13, 20, 1, 16])
    if policy.chunk_invariant:
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-9)


@every
def test_it_leaves_no_trace(build: Build) -> None:
    reader, x = model(), tokens()
    expected, _, _ = read(reader, x, [40])
    with build(budget="24tok").attach(reader):
        read(reader, x, [40])
        with pytest.raises(InputError, match="attached to this model already"), build(budget="24tok").attach(reader):
            pass
    got, _, _ = read(reader, x, [40])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@every
def test_a_model_without_a_kv_state_is_refused(build: Build) -> None:
    reader = build_model("gated_delta_net", width=32, depth=1, input_size=4, output_size=4, read_in="token")
    with pytest.raises(InputError, match="needs a model with a KV state.*GatedDeltaNet"), build().attach(reader):
        pass


def _name(policy: Policy) -> str:
    return next(e.name for e in registry.entries("policy") if e.factory is type(policy))


@pytest.mark.parametrize(
    ("text", "kind", "amount", "shown"),
    [
        ("512tok", "tokens", 512, "512tok"), ("10%", "ratio", 0.1, "10%"), (0.25, "ratio", 0.25, "25%"),
        ("64MB", "bytes", 64e6, "64MB"), ("1.5GiB", "bytes", 1.5 * 2**30, "1.61061GB"), (None, "ratio", 1, "100%"),
    ],
)  # fmt: skip
def test_budgets_are_read(text: Any, kind: str, amount: float, shown: str) -> None:
    budget = Budget.of(text)
    assert (budget.kind, budget.amount, str(budget)) == (kind, amount, shown)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0%", "keeps nothing"), ("-5tok", "keeps nothing"), ("150%", "more than the full cache"),
        (64, "did you mean 64tok or 64%"), ("ten", "expected 512tok"), ("1.5tok", "whole number"), (True, "expected"),
        ("1..2MB", "expected 512tok"), ("nan%", "expected 512tok"),
    ],
)  # fmt: skip
def test_impossible_budgets_are_refused(text: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget.of(text)


def test_a_budget_that_does_not_hold_what_is_protected_is_refused() -> None:
    reader = model()
    with (
        pytest.raises(InputError, match="do not hold the 20 protected ones.*21tok"),
        build_policy("h2o", budget="20tok", window=20).attach(reader),
    ):
        pass
    policy = build_policy("h2o", budget="1kB", window=20)
    with policy.attach(reader), pytest.raises(InputError, match="it takes [0-9]+B"):
        read(reader, tokens(), [40])


def test_a_model_that_shares_keys_between_layers_is_refused() -> None:
    layers = ["attention", {"mixer": "attention", "kv": "shared"}]
    spec = {"width": 32, "depth": 2, "heads": 4, "layers": layers, "input_size": 4, "output_size": 4}
    reader = build_model({**spec, "read_in": "token"})
    with pytest.raises(InputError, match="share keys and values"), build_policy("h2o").attach(reader):
        pass


def test_a_needless_reposition_is_refused() -> None:
    reader = model(position="none")
    with pytest.raises(InputError, match="no rotary positions"), build_policy("h2o", reposition=True).attach(reader):
        pass


def test_a_state_without_its_policy_is_refused() -> None:
    reader, x = model(), tokens()
    with build_policy("h2o", budget="24tok", window=4).attach(reader), torch.no_grad():
        _, state = reader.read(x)
    with pytest.raises(InputError, match="KeptState was left by a policy"):
        reader.read(x[:, :1], state)


def test_a_state_is_compressed_after_reading() -> None:
    reader, x = model(), tokens()
    policy = build_policy("streaming_llm", budget="24tok", every=1)
    with torch.no_grad():
        _, state = reader.read(x[:, :40])
        kept = policy.apply(state, reader)
        with policy.attach(reader):
            reader.read(x[:, 40:41], kept)
    assert [layer.slots.used for layer in kept.layers] == [24, 24]
    assert kept.layers[0].positions[0, 0].tolist() == [0, 1, 2, 3, *range(20, 40)]
    with pytest.raises(InputError, match="attach the policy before reading"):
        build_policy("h2o", budget="40tok").apply(state, reader)


class Constant(EvictionPolicy):
    """Importance that a test hands in."""

    def __init__(self, importance: Tensor, **options: Any) -> None:
        super().__init__(**options)
        self.importance = importance

    def score(self, seen: Seen) -> Tensor:
        return self.importance.gather(2, seen.positions.clamp_min(0))


def test_the_kept_set_is_the_most_important_and_the_protected() -> None:
    reader, x = model(depth=1), tokens(1, 40)
    importance = torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(0))
    with Constant(importance, budget="15tok", sinks=2, window=5).attach(reader), torch.no_grad():
        _, state = reader.read(x)
    for head in range(2):
        best = importance[0, head, 2:35].topk(8).indices + 2
        assert state.layers[0].positions[0, head].tolist() == sorted([0, 1, *best.tolist(), *range(35, 40)])


def test_repositioned_keys_stand_where_they_would_without_the_dropped_tokens() -> None:
    """What is read next is answered as if the dropped tokens had never been (one layer: its keys know no others)."""
    reader, x = model(depth=1), tokens(2, 40)
    pads = (0, 6)
    mask = masked(x, pads)
    importance = torch.zeros(2, 2, 60)
    importance[:, :, 11:17] = 1
    with Constant(importance, budget="13tok", sinks=2, window=4, every=1, reposition=True).attach(reader):
        _, state, _ = read(reader, x[:, :34], [30], mask)
        got, _ = reader.read(x[:, 34:35], state)
    for row, pad in enumerate(pads):
        kept = [0, 1, *range(11, 17), *range(34 - pad - 4, 34 - pad)]
        short = torch.cat((x[row, pad:34][kept], x[row, 34:35]))[None]
        expected, _, _ = read(reader, short, [len(kept) + 1])
        torch.testing.assert_close(got[row, -1], expected[0, -1], rtol=0, atol=1e-9)


def test_pyramids_share_the_same_total() -> None:
    policy = build_policy("snapkv", budget="100tok", pyramid=4.0, window=8)
    layers = [KVLayer(i, 5, 4, 4, 8, 8, 0.3) for i in range(5)]
    slots = [policy.slots(layer, 1000, 1, torch.float32) for layer in layers]
    assert slots == [175, 137, 100, 62, 25]


class Forgetful(EvictionPolicy):
    """Breaks its budget and writes into states that were handed on."""

    def score(self, seen: Seen) -> Tensor:
        return seen.positions.to(torch.float64)

    def attend(self, *arguments: Any, **options: Any) -> Any:
        y, state = super().attend(*arguments, **options)
        state.slots["keys"].mul_(1.01)
        return y, dataclasses.replace(state, start=torch.cat([state.start] * 5000)[: len(state.start)])


@pytest.mark.parametrize(
    "law", [test_an_older_state_stays_valid, test_a_full_budget_changes_nothing, test_the_budget_is_never_exceeded]
)
def test_each_law_can_fail(law: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._entries["policy"], "forgetful", registry.Entry("policy", "forgetful", Forgetful))
    more: dict[str, Any] = {}
    if law is not test_an_older_state_stays_valid:
        more["pads"] = None
    if law is test_the_budget_is_never_exceeded:
        more["budget"] = "50%"
    with pytest.raises(AssertionError):
        law(lambda **options: Forgetful(window=4, **options), **more)


@pytest.mark.parametrize("name", ["h2o", "quest", "ada_kv"])
def test_states_of_another_dtype_or_device_are_refused_in_one_line(name: str) -> None:
    reader, x = model(), tokens(1, 40)
    policy = build_policy(name, budget="90%")
    with torch.no_grad(), policy.attach(reader):
        _, state = reader.read(x)
        with pytest.raises(InputError, match=r"the state is of torch.float32.*state.to\(torch.float64\)"):
            reader.read(x[:, :1], state.to(torch.float32))
        with pytest.raises(InputError, match=r"the state is on meta, the tokens are on cpu; .*state.to\('cpu'\)"):
            reader.read(x[:, :1], state.to("meta"))
        reader.read(x[:, :1], state.to(torch.float32).to(torch.float64))
