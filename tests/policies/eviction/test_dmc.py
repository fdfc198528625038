"""DMC: slots against a recurrence token by token, what a budget merges, what training reaches, files and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contextlab import registry
from contextlab.errors import InputError
from contextlab.files import write_json, write_tensors
from contextlab.models import build_model, load
from contextlab.ops.kv import KVLayer
from contextlab.policies import DMC, MergedState, build_policy
from contextlab.policies.core.training import language_training
from contextlab.policies.eviction.dmc import _Relaxed
from contextlab.policies.eviction.merged_slots import partial_means
from contextlab.policies.eviction.two_pass import Recorder
from contextlab.testing import policies as laws
from contextlab.testing.policies import masked, model, read, tokens
from tests.models.checkpoints import checkpoint


def gated(reader: Any, bias: float = 0.0, scale: float = 1.0, **options: Any) -> DMC:
    """With gates drawn at random: tokens differ in whether they merge, and heads in how often."""
    policy, generator = DMC(**options), torch.Generator().manual_seed(5)
    for layer in Recorder().layers(reader):
        gate = nn.Linear(layer.kv_heads * layer.value_dim, 2 * layer.kv_heads).to(next(reader.parameters()).dtype)
        nn.init.normal_(gate.weight, std=scale, generator=generator)
        nn.init.constant_(gate.bias, bias)
        policy.gates.append(gate.requires_grad_(False))
    return policy


def given(reader: Any, length: int, batch: int = 2, seed: int = 0) -> tuple[KVLayer, Tensor, Tensor, Tensor]:
    layer = Recorder().layers(reader)[0]
    generator = torch.Generator().manual_seed(seed)
    sizes = ((layer.heads, layer.key_dim), (layer.kv_heads, layer.key_dim), (layer.kv_heads, layer.value_dim))
    q, k, v = (torch.randn(batch, length, *size, generator=generator, dtype=torch.float64) for size in sizes)
    return layer, q, k, v


def turned(layer: KVLayer, x: Tensor, steps: int) -> Tensor:
    return x if layer.turn is None else layer.turn(x[None, None, None], torch.tensor([[[steps]]]))[0, 0, 0]


def naive(
    policy: DMC, layer: KVLayer, q: Tensor, k: Tensor, v: Tensor, limit: int | None = None, target: int = 0
) -> tuple[Tensor, list[list[list[list[int]]]]]:
    """The answers, and the tokens in each slot of each row and head, by lists of tokens that are made token by token.

    limit: slots of a row, but the last of each head; more are merged, the likeliest first, until `target` are left.
    """
    numbers = v.flatten(2) @ policy.gates[layer.index].weight.T + policy.gates[layer.index].bias
    logit = numbers[..., : layer.kv_heads].transpose(1, 2)
    weight = numbers[..., layer.kv_heads :].transpose(1, 2).sigmoid()
    y, shared, rows = torch.zeros(*q.shape[:3], v.shape[3], dtype=q.dtype), layer.heads // layer.kv_heads, []
    for b in range(len(q)):
        heads: list[list[list[int]]] = [[] for _ in range(layer.kv_heads)]
        for t in range(q.shape[1]):
            for h, slots in enumerate(heads):
                if t and logit[b, h, t] > 0:
                    slots[-1].append(t)
                else:
                    slots.append([t])
                at = [slot[-1] for slot in slots]
                keys = torch.stack([
                    sum(weight[b, h, j] * turned(layer, k[b, j, h], slot[-1] - j) for j in slot)
                    / weight[b, h, slot].sum()
                    for slot in slots
                ])  # fmt: skip
                values = torch.stack([weight[b, h, s] @ v[b, s, h] / weight[b, h, s].sum() for s in slots])
                for i in range(h * shared, (h + 1) * shared):
                    scores = keys @ q[b, t, i] * layer.scale
                    if layer.slopes is not None:
                        scores = scores - layer.slopes[i] * (t - torch.tensor(at))
                    y[b, t, i] = scores.softmax(0) @ values
            if limit is not None and sum(map(len, heads)) - len(heads) > limit:
                while sum(map(len, heads)) - len(heads) > target:
                    h, i = max(
                        ((h, i) for h, slots in enumerate(heads) for i in range(1, len(slots))),
                        key=lambda hi: float(logit[b, hi[0], heads[hi[0]][hi[1]][0]]),
                    )
                    heads[h][i - 1] += heads[h].pop(i)
        rows.append(heads)
    return y, rows


POSITIONS = ("rope", "none", "alibi")


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("pieces", [[24], [1] * 24, [5, 1, 1, 9, 2, 1, 5]], ids=["whole", "steps", "pieces"])
def test_the_answers_are_those_of_the_recurrence(position: str, pieces: list[int]) -> None:
    reader = model(position=position)
    policy = gated(reader)
    layer, q, k, v = given(reader, 24)
    expected, rows = naive(policy, layer, q, k, v)
    state, outputs, at = None, [], 0
    with torch.no_grad():
        for size in pieces:
            piece = slice(at, at + size)
            y, state = policy.attend(layer, q[:, piece], k[:, piece], v[:, piece], state)
            outputs.append(y)
            at += size
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-9)
    assert isinstance(state, MergedState)
    assert state.counts.tolist() == [[len(slots) for slots in heads] for heads in rows]
    assert len({len(slots) for heads in rows for slots in heads}) > 2  # heads and rows do hold different numbers
    assert max(len(slot) for heads in rows for slots in heads for slot in slots) > 3


@pytest.mark.parametrize("position", POSITIONS)
def test_a_budget_merges_what_the_gates_were_nearest_to_merging(position: str) -> None:
    reader = model(position=position)
    policy = gated(reader, bias=-1.0, budget="6tok", every=2)
    layer, q, k, v = given(reader, 40)
    limit = 5 * layer.kv_heads
    expected, rows = naive(policy, layer, q, k, v, limit, limit - 2 * layer.kv_heads)
    state, outputs = None, []
    with torch.no_grad():
        for t in range(40):
            few = slice(t, t + 1)
            y, state = policy.attend(layer, q[:, few], k[:, few], v[:, few], state)
            assert isinstance(state, MergedState)
            assert int(state.counts.sum(1).max()) <= 6 * layer.kv_heads
            assert state.pool.values["keys"].shape[2] <= limit
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-9)
    assert isinstance(state, MergedState)
    assert state.counts.tolist() == [[len(slots) for slots in heads] for heads in rows]
    lasts = [[slots[-1][-1] for slots in heads] for heads in rows]
    assert state.last["position"].tolist() == lasts
    for row, heads in enumerate(rows):
        places = sorted((h, slot[-1]) for h, slots in enumerate(heads) for slot in slots[:-1])
        owner, at = state.pool["owner"][row, 0].tolist(), state.pool["position"][row, 0].tolist()
        assert sorted((h, place) for h, place in zip(owner, at, strict=True) if place >= 0) == places


def test_after_a_piece_a_budget_merges_likewise() -> None:
    reader = model()
    policy = gated(reader, bias=-1.0, budget="6tok")
    layer, q, k, v = given(reader, 40)
    with torch.no_grad():
        free, _ = gated(reader, bias=-1.0).attend(layer, q, k, v, None)
        y, state = policy.attend(layer, q, k, v, None)
    torch.testing.assert_close(y, free)  # the piece itself is answered by the gates' own decisions
    logits = (v.flatten(2) @ policy.gates[0].weight.T + policy.gates[0].bias)[..., : layer.kv_heads]
    for row in range(2):
        best = logits[row].clone()
        best[0] = -torch.inf  # each head's first token opens a slot in any case
        opened = best.flatten().sort().values[: 6 * layer.kv_heads]
        expected = (best <= opened[-1]).sum(0)
        assert state.counts[row].tolist() == expected.tolist()


def test_gates_that_merge_nothing_change_nothing() -> None:
    reader, x = model(), tokens()
    for mask in (None, masked(x, (0, 7))):
        plain, full, _ = read(reader, x, [60], mask)
        policy = gated(reader, bias=-100.0)
        with policy.attach(reader):
            got, state, _ = read(reader, x, [30, 12], mask)
        real = torch.ones(x.shape, dtype=torch.bool) if mask is None else mask
        torch.testing.assert_close(got[real], plain[real], rtol=0, atol=1e-9)
        assert state.layers[0].counts.tolist() == [[60, 60], [60 if mask is None else 53] * 2]
        kept = policy.apply(full, reader)
        assert torch.equal(kept.layers[1].counts, state.layers[1].counts)


def test_memory_shrinks_as_slots_do() -> None:
    reader, x = model(), tokens(1, 2000)
    with gated(reader, bias=1.0).attach(reader):
        _, state, _ = read(reader, x, [1990])
    held = [int(layer.counts.sum()) for layer in state.layers]
    assert sum(held) < 0.5 * 2 * 2 * 2000
    slot = (8 + 8) * 8 + 4 + 4 + 8 + 2  # key, value, place, logit, weight, owner
    for layer, count in zip(state.layers, held, strict=True):
        assert slot * count <= layer.nbytes <= 1.3 * slot * count


def test_gaps_of_uneven_rows_do_not_pile_up() -> None:
    reader = model()
    policy = gated(reader, bias=1.5)
    layer, q, k, v = given(reader, 600, batch=6)
    state = None
    with torch.no_grad():
        for t in range(600):
            few = slice(t, t + 1)
            _, state = policy.attend(layer, q[:, few], k[:, few], v[:, few], state)
    assert isinstance(state, MergedState)
    held = int(state.counts.sum(1).max())
    assert state.pool.room < 1.8 * held  # of which the buffers' growth is 1.25


@pytest.mark.parametrize(
    "law",
    [
        laws.hold_to_older_states,
        laws.hold_to_batch,
        laws.hold_to_pieces,
        laws.hold_to_no_trace,
        laws.hold_to_refusal,
    ],
)
@pytest.mark.parametrize("budget", ["24tok", None])
def test_it_keeps_the_laws(law: Callable[..., None], budget: str | None) -> None:
    """As test_base.py holds every policy to them that needs no training."""
    law(lambda **options: gated(model(), bias=-1.0, **{**options, "budget": budget}))


@pytest.mark.parametrize("budget", ["24tok", "50%", "40kB"])
@pytest.mark.parametrize("pads", [None, (0, 7)], ids=["", "padded"])
def test_the_budget_is_never_exceeded(budget: str, pads: tuple[int, ...] | None) -> None:
    laws.hold_to_budget(lambda **options: gated(model(), bias=-2.0, **options), budget, pads)


def test_a_state_is_compressed_after_reading() -> None:
    reader, x = model(depth=1), tokens()
    policy = gated(reader, budget="20tok")
    with torch.no_grad():
        _, full = reader.read(x[:, :50], None, masked(x, (0, 7))[:, :50])
        with policy.attach(reader):
            _, expected = reader.read(x[:, :50], None, masked(x, (0, 7))[:, :50])
            after, _ = reader.read(x[:, 50:51], policy.apply(full, reader))
            wanted, _ = reader.read(x[:, 50:51], expected)
    torch.testing.assert_close(after, wanted, rtol=0, atol=1e-9)


def test_partial_accumulation_is_its_recurrence() -> None:
    layer, _, k, v = given(model(), 9)
    generator = torch.Generator().manual_seed(1)
    logit, weight = (torch.randn(2, 2, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = weight.sigmoid()
    keys, values = partial_means(layer, k.transpose(1, 2), v.transpose(1, 2), logit, weight)
    for b in range(2):
        for h in range(2):
            summed, total = torch.zeros(16, dtype=torch.float64), 0.0
            for t in range(9):
                stays = float(logit[b, h, t].sigmoid()) if t else 0.0
                summed = torch.cat((turned(layer, summed[:8], 1), summed[8:])) * stays
                summed = summed + weight[b, h, t] * torch.cat((k[b, t, h], v[b, t, h]))
                total = total * stays + float(weight[b, h, t])
                torch.testing.assert_close(keys[b, h, t], summed[:8] / total, rtol=0, atol=1e-12)
                torch.testing.assert_close(values[b, h, t], summed[8:] / total, rtol=0, atol=1e-12)
    inputs = [x.clone().requires_grad_() for x in (k.transpose(1, 2), v.transpose(1, 2), logit, weight)]
    assert torch.autograd.gradcheck(lambda *given: partial_means(layer, *given), inputs)


def test_sure_decisions_are_those_of_decoding() -> None:
    """Where the relaxed decisions are near 0 and 1, training reads what decoding reads."""
    reader, x = model(), tokens()
    policy = gated(reader, scale=1.0)
    for gate in policy.gates:
        gate.weight[:2] *= 1e6  # of merging; the noise is then too small to matter
    expected = read_with(policy, reader, x)
    policy._relaxed = _Relaxed(torch.Generator().manual_seed(0), 1.0)
    with policy.attach(reader), torch.no_grad():
        got = reader(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    merged = [float((decisions > 0.5).double().mean()) for decisions in policy._relaxed.decisions]
    assert all(0.2 < part < 0.8 for part in merged)


def read_with(policy: DMC, reader: Any, x: Tensor) -> Tensor:
    with policy.attach(reader), torch.no_grad():
        return reader.read(x)[0]


def words(rows: int, seed: int) -> Tensor:
    """Rows of 32 tokens: each word is a letter said four times, and the letters go round in one of two orders."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(8, (rows, 1), generator=generator)
    stride = torch.randint(1, 3, (rows, 1), generator=generator)
    letters = (first + stride * torch.arange(8)) % 8
    return letters.repeat_interleave(4, 1)


def loss_of(reader: Any, x: Tensor, pieces: list[int]) -> tuple[float, Any]:
    logits, state, _ = read(reader, x, pieces)
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())), state


def small() -> Any:
    layer = {"mixer": "attention", "options": {"kv_heads": 2}}
    spec = {"width": 32, "position": "rope", "depth": 2, "heads": 4, "mlp_ratio": 2, "layers": [layer]}
    return build_model({**spec, "input_size": 8, "output_size": 8, "read_in": "token"}, seed=1)


@pytest.fixture(scope="module")
def retrofitted() -> tuple[Any, DMC]:
    reader, policy = small(), DMC()
    policy.fit(reader, words(256, 0), 2.0, steps=150, batch=16, lr=0.1, model_lr=5e-3)
    return reader, policy


def slots_of(state: Any) -> float:
    """Slots of a head, on average."""
    return sum(float(layer.counts.double().mean()) for layer in state.layers) / len(state.layers)


def test_training_reaches_its_ratio_and_keeps_the_loss(retrofitted: tuple[Any, DMC]) -> None:
    reader, policy = retrofitted
    other, plain = words(64, 1), small()
    groups = [{"params": list(plain.parameters()), "lr": 5e-3}]
    language_training(plain, words(256, 0), groups, steps=150, batch=16, seed=0)
    best, _ = loss_of(plain, other, [32])
    with policy.attach(reader):
        loss, state = loss_of(reader, other, [32])
        again, _ = loss_of(reader, other, [20])  # the rest token by token
    assert 1.75 < 32 / slots_of(state) < 2.25
    assert loss < 1.15 * best
    assert again == pytest.approx(loss, rel=1e-4)
    assert loss_of(reader, other, [32])[0] > 1.5 * best  # the model has learnt to read merged slots
    for seed in range(3):  # merging as much by chance loses it: the gates know what they merge
        blind = gated(reader)
        for gate in blind.gates:
            nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(seed))
        with blind.attach(reader):
            worse, state = loss_of(reader, other, [32])
        assert worse > 1.5 * loss
        assert 32 / slots_of(state) < 2.5


def test_gates_alone_leave_the_model_and_its_gradients_as_they_are(retrofitted: tuple[Any, DMC]) -> None:
    reader, _ = retrofitted
    before = [x.detach().clone() for x in reader.parameters()]
    one, two, again = DMC(), DMC(), DMC()
    one.fit(reader, words(64, 0), 2.0, steps=60, batch=16, lr=0.2, press=10.0)
    losses = two.fit(reader, words(64, 0), 2.0, steps=4, batch=16, lr=0.2, press=10.0)
    assert losses == again.fit(reader, words(64, 0), 2.0, steps=4, batch=16, lr=0.2, press=10.0)
    assert all(torch.equal(a, b) for a, b in zip(before, reader.parameters(), strict=True))
    assert all(x.grad is None and x.requires_grad for x in reader.parameters())
    for left, right in zip(two.gates, again.gates, strict=True):
        assert torch.equal(left.weight, right.weight)
    with one.attach(reader):
        _, state = loss_of(reader, words(64, 1), [32])
    assert 32 / slots_of(state) > 1.5


def test_trained_gates_come_back_from_a_file(tmp_path: Path) -> None:
    reader, x = model(), tokens()
    policy = gated(reader, budget="24tok")
    policy.save(tmp_path)
    again = build_policy("dmc", budget="24tok", weights=str(tmp_path))
    with policy.attach(reader):
        expected, _, _ = read(reader, x, [40])
    with again.attach(reader):
        got, _, _ = read(reader, x, [40])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    with pytest.raises(InputError, match="of another model: trained for 2 layers"), again.attach(model(depth=1)):
        pass
    with pytest.raises(InputError, match="no such file"):
        DMC(weights=tmp_path / "nowhere")
    write_json(tmp_path / "dmc.json", {"policy": "dmc", "layers": 3})
    with pytest.raises(InputError, match="layer 2 is not complete"):
        DMC(weights=tmp_path)
    write_json(tmp_path / "dmc.json", {"policy": "locret", "layers": 2})
    with pytest.raises(InputError, match="these are no gates"):
        DMC(weights=tmp_path)
    write_tensors(tmp_path / "dmc.safetensors", {"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(3)})
    write_json(tmp_path / "dmc.json", {"policy": "dmc", "layers": 1})
    with pytest.raises(InputError, match="layer 0 is not complete"):
        DMC(weights=tmp_path)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    reader, x = model(), tokens()
    assert registry.lookup("policy", "dmc").factory is DMC
    with pytest.raises(InputError, match=r"untrained; train them with policy.fit.*weights=FOLDER"):
        build_policy("dmc").attach(reader).__enter__()
    with pytest.raises(InputError, match="nothing to save"):
        DMC().save("anywhere")
    for ratio in (1, 0.5, float("inf"), True):
        with pytest.raises(InputError, match="ratio: expected tokens for each slot, above 1"):
            DMC().fit(reader, x, ratio)
    for options in ({"steps": 0}, {"batch": 0}, {"temperature": 0.0}, {"press": -1.0}):
        with pytest.raises(InputError, match=next(iter(options))):
            DMC().fit(reader, x, 2.0, **options)
    policy = DMC()
    with pytest.raises(InputError, match="tokens: expected ids"):
        policy.fit(reader, torch.zeros(3, 4, 5), 2.0)
    with pytest.raises(InputError, match="untrained"):  # a training that failed leaves nothing half trained
        policy.attach(reader).__enter__()
    with pytest.raises(InputError, match="every"):
        DMC(every=0)
    with pytest.raises(InputError, match="use one"):
        gated(reader) | build_policy("quantize")
    few = gated(reader, budget="100B")
    with few.attach(reader), pytest.raises(InputError, match="does not hold one slot of each of 2 heads.*it takes "):
        read(reader, x, [40])
    with gated(reader).attach(reader), torch.no_grad():
        _, state = reader.read(x)
    with pytest.raises(InputError, match="MergedState was left by a policy"):
        reader.read(x[:, :1], state)


def test_a_model_of_transformers_is_served_as_our_import(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    transformers.logging.disable_progress_bar()
    from tests.policies.test_huggingface import padding, written
    from tests.policies.test_huggingface import tokens as theirs

    checkpoint("llama", tmp_path)
    reader, ours, x = load(tmp_path), load(tmp_path, native=True), theirs(50)
    policy = gated(ours, scale=5.0, budget="16tok")
    with policy.attach(reader):
        y, state, _ = read(reader, x, [25, 10], padding(x))
        with torch.no_grad():
            text = written(reader.model, x, padding(x)).sequences
        again, _, _ = read(reader, text[:, :-1], [50], torch.cat((padding(x), torch.ones(2, 8, dtype=torch.bool)), 1))
    with policy.attach(ours):
        expected, native, _ = read(ours, x, [25, 10], padding(x))
    for mine, other in zip(state.leaves, native.layers, strict=True):
        assert torch.equal(mine.counts, other.counts)
        assert torch.equal(mine.pool["position"], other.pool["position"])
    torch.testing.assert_close(y[padding(x)], expected[padding(x)], rtol=0, atol=1e-5)
    again[..., 2] = -torch.inf  # generate does not end early
    assert torch.equal(again[:, 49:].argmax(-1), text[:, 50:])
    trained = DMC()
    before = [weight.detach().clone() for weight in reader.parameters()]
    trained.fit(reader, x, 1.5, steps=2, batch=2)
    assert len(trained.gates) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, reader.parameters(), strict=True))
