"""AnLLM: dropping tokens against full attention under its mask, what is held, training, and the ids of anchors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contextlab.errors import InputError
from contextlab.models import build_model, load
from contextlab.ops.kv import KVLayer
from contextlab.policies import AnLLM, PerLayer, Policy, build_policy
from contextlab.state import KVState, State
from contextlab.testing import policies as laws
from contextlab.testing.policies import masked, model, read, tokens
from tests.models.checkpoints import V, checkpoint

PADS = (0, 7)
IDS = [3, 11, 17]


def allowed(anchors: list[bool]) -> Tensor:
    """The mask of one text, by Section 3.2 of the paper: [T, T] bool, which tokens each one sees."""
    length = len(anchors)
    segment = [sum(anchors[:t]) for t in range(length)]
    sees = torch.zeros(length, length, dtype=torch.bool)
    for t in range(length):
        for j in range(t + 1):
            same = segment[j] == segment[t]
            sees[t, j] = same if anchors[t] else same or anchors[j]
    return sees


class Masked(Policy):
    """Full attention over all tokens, under a mask [B, T, T] that a test hands in; whole texts only."""

    def __init__(self, sees: Tensor) -> None:
        self.sees = sees

    def attend(
        self,
        layer: KVLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State | None,
        mask: Tensor | None = None,
        keep_state: bool = True,
    ) -> tuple[Tensor, State | None]:
        shared = layer.heads // layer.kv_heads
        k, v = k.repeat_interleave(shared, 2), v.repeat_interleave(shared, 2)
        scores = torch.einsum("bthd,bjhd->bhtj", q, k) * layer.scale
        if layer.slopes is not None:
            step = torch.arange(q.shape[1])
            scores = scores - (step[:, None] - step) * layer.slopes[:, None, None]
        weights = scores.masked_fill(~self.sees[:, None], -torch.inf).softmax(-1)
        return torch.einsum("bhtj,bjhv->bthv", weights, v), KVState.empty(k, v)

    def convert(self, layer: KVLayer, state: KVState) -> State:
        raise NotImplementedError


def ends_of(policy: AnLLM, x: Tensor, pads: tuple[int, ...]) -> list[list[bool]]:
    """Which tokens of each row, its padding left out, are anchors."""
    rows = []
    for row, pad in zip(x.tolist(), pads, strict=True):
        if policy.anchors is not None:
            rows.append([token in policy.anchors for token in row[pad:]])
        else:
            assert policy.segment is not None
            rows.append([(place + 1) % policy.segment == 0 for place in range(len(row) - pad)])
    return rows


def sees_of(policy: AnLLM, x: Tensor, pads: tuple[int, ...]) -> Tensor:
    sees = torch.eye(x.shape[1], dtype=torch.bool).repeat(len(x), 1, 1)
    for row, (pad, ends) in enumerate(zip(pads, ends_of(policy, x, pads), strict=True)):
        sees[row, pad:, pad:] = allowed(ends)
    return sees


FIRSTS = [int(row[pad]) for row, pad in zip(tokens(), PADS, strict=True)]  # a text may begin with an anchor
options = pytest.mark.parametrize(
    "options",
    [{"segment": 1}, {"segment": 5}, {"segment": 16}, {"anchors": [*IDS, *FIRSTS]}, {"anchors": [3]}],
    ids=str,
)
PIECES = {"whole": [60], "steps": [1] * 60, "pieces": [1, 4, 1, 23, 6]}


@options
@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_it_is_full_attention_under_the_mask(options: dict[str, Any], position: str, pieces: list[int]) -> None:
    reader, x, policy = model(position=position), tokens(), AnLLM(**options)
    for pads in ((0, 0), PADS):
        mask = masked(x, pads) if any(pads) else None
        with Masked(sees_of(policy, x, pads)).attach(reader), torch.no_grad():
            expected, _ = reader.read(x)
        with policy.attach(reader):
            got, _, _ = read(reader, x, pieces, mask)
        real = torch.ones(x.shape, dtype=torch.bool) if mask is None else mask
        torch.testing.assert_close(got[real], expected[real], rtol=0, atol=1e-9)


@options
def test_only_anchors_and_the_segment_that_has_not_ended_are_held(options: dict[str, Any]) -> None:
    reader, x, policy = model(), tokens(), AnLLM(**options)
    ends = ends_of(policy, x, PADS)
    with policy.attach(reader), torch.no_grad():
        state = None
        for t in range(60):
            _, state = reader.read(x[:, t : t + 1], state, masked(x, PADS)[:, t : t + 1])
            for row, pad in enumerate(PADS):
                so_far = ends[row][: max(0, t + 1 - pad)]
                last = max((place for place, end in enumerate(so_far) if end), default=-1)
                expected = [place for place, end in enumerate(so_far) if end or place > last]
                for layer in state.layers:
                    for head in layer.positions[row].tolist():
                        assert [place for place in head if place >= 0] == expected
        _, whole = reader.read(x, None, masked(x, PADS))
    assert state is not None
    assert [x.positions.tolist() for x in whole.layers] == [x.positions.tolist() for x in state.layers]


def test_memory_is_freed() -> None:
    reader, x = model(), tokens(1, 1000)
    with AnLLM(segment=20).attach(reader):
        _, state, _ = read(reader, x, [900])
    assert state.nbytes < 0.1 * reader.state_nbytes(1000, dtype=torch.float64)


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
@options
def test_it_keeps_the_laws(law: Callable[..., None], options: dict[str, Any]) -> None:
    """With short segments, which end in the first piece; the case that it is registered with has them longer."""
    law(lambda **_: AnLLM(**options))


def test_a_state_is_compressed_after_reading() -> None:
    reader, x = model(depth=1), tokens()
    policy, mask = AnLLM(segment=7), masked(x, PADS)
    with torch.no_grad():
        _, full = reader.read(x[:, :50], None, mask[:, :50])
        kept = policy.apply(full, reader)
        with policy.attach(reader):
            _, expected = reader.read(x[:, :50], None, mask[:, :50])
            got, _ = reader.read(x[:, 50:51], kept)
            wanted, _ = reader.read(x[:, 50:51], expected)
    assert torch.equal(kept.layers[0].positions, expected.layers[0].positions)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)  # one layer: its keys have read nothing
    with pytest.raises(InputError, match="attach the policy before reading"):
        AnLLM(anchors=IDS).apply(full, reader)


def topics(rows: int, seed: int) -> Tensor:
    """Rows of segments "topic, two letters by chance, full stop"; the topic, 1 to 8, is that of the row; 0 ends."""
    generator = torch.Generator().manual_seed(seed)
    topic = torch.randint(1, 9, (rows, 1, 1), generator=generator).expand(-1, 6, -1)
    letters = torch.randint(9, 12, (rows, 6, 2), generator=generator)
    return torch.cat((topic, letters, torch.zeros(rows, 6, 1, dtype=torch.int64)), 2).flatten(1)


def test_a_model_that_is_trained_under_the_mask_sums_segments_up_in_their_anchors() -> None:
    spec = {"width": 32, "depth": 2, "heads": 2, "mlp_ratio": 2, "input_size": 12, "output_size": 12}
    plain = build_model({**spec, "read_in": "token", "layers": ["attention"]}, seed=0)
    reader, policy, x = copy.deepcopy(plain), AnLLM(anchors=[0]), topics(64, 1)
    losses = policy.fit(reader, topics(512, 0), steps=120, batch=32, lr=5e-3)

    def right(served: Any) -> float:
        """How often the topic that a segment after the first begins with is foretold, token by token."""
        with policy.attach(served):
            logits, state, _ = read(served, x, [9])
        assert all(layer.slots.used <= 6 for layer in state.layers)  # of 24 tokens the six anchors
        return float((logits[:, 3:-1:4].argmax(-1) == x[:, 4::4]).double().mean())

    assert losses[-1] < losses[0]
    assert right(reader) > 0.95
    assert right(plain) < 0.5


def test_training_as_usual_while_attached_is_training_under_the_mask() -> None:
    reader, x, policy = model(), tokens(), AnLLM(anchors=IDS)
    gradients = []
    for served in (policy, Masked(sees_of(policy, x, (0, 0)))):
        with served.attach(reader):
            loss = nn.functional.cross_entropy(reader(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())
            gradients.append(torch.autograd.grad(loss, list(reader.parameters())))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{"segment": 6}, {"anchors": [*range(4, V, 8)]}], ids=["segment", "ids"])
def test_a_model_of_transformers_is_served_as_our_import(options: dict[str, Any], tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers", minversion="5")
    transformers.logging.disable_progress_bar()
    from tests.policies.test_huggingface import padding, written
    from tests.policies.test_huggingface import tokens as theirs

    checkpoint("llama", tmp_path)
    reader, ours, x = load(tmp_path), load(tmp_path, native=True), theirs(50)
    policy = AnLLM(**options)
    with policy.attach(reader):
        y, state, _ = read(reader, x, [25, 10], padding(x))
        with torch.no_grad():
            text = written(reader.model, x, padding(x)).sequences
    with policy.attach(ours):
        expected, native, _ = read(ours, x, [25, 10], padding(x))
    for mine, other in zip(state.leaves, native.layers, strict=True):
        assert torch.equal(mine.positions, other.positions)
    assert state.leaves[0].slots.used < 25
    torch.testing.assert_close(y[padding(x)], expected[padding(x)], rtol=0, atol=1e-5)
    with policy.attach(reader), torch.no_grad():  # what generate wrote is what one reading of it foretells
        whole = torch.cat((padding(x), torch.ones(2, 8, dtype=torch.bool)), 1)
        logits, _ = reader.read(text[:, :-1], None, whole)
    logits[..., 2] = -torch.inf  # generate does not end early
    assert torch.equal(logits[:, 49:].argmax(-1), text[:, 50:])


def test_what_cannot_be_is_refused_in_one_line() -> None:
    reader, x = model(), tokens()
    assert build_policy("anllm").segment == 64
    with pytest.raises(InputError, match="give one of them"):
        AnLLM(anchors=[1], segment=4)
    with pytest.raises(InputError, match="segment: expected a whole number of at least 1"):
        AnLLM(segment=0)
    for anchors in ([], 5, [-1], ["."]):
        with pytest.raises(InputError, match="anchors: expected"):
            AnLLM(anchors=anchors)
    vectors = build_model("transformer", width=32, depth=1, input_size=4, output_size=4)
    with pytest.raises(InputError, match="use segment in place of anchors"), AnLLM(anchors=[1]).attach(vectors):
        pass
    with AnLLM(segment=3).attach(vectors), torch.no_grad():
        vectors.read(torch.randn(2, 7, 4))
    with (
        PerLayer({}, AnLLM(anchors=IDS)).attach(reader),
        pytest.raises(InputError, match="embedding read none; attach the policy to a model"),
    ):
        reader.read(x)
    with pytest.raises(InputError, match="use one of the two alone"):
        AnLLM() | build_policy("quantize")
    with build_policy("h2o").attach(reader), torch.no_grad():
        _, state = reader.read(x)
    with AnLLM().attach(reader), pytest.raises(InputError, match="a KeptState of AnLLM"):
        reader.read(x[:, :1], state)
    with pytest.raises(InputError, match="steps"):
        AnLLM().fit(reader, x, steps=0)
