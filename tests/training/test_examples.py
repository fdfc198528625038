from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_training import Some, Sums, Tiny

from contextlab.errors import InputError, ResourceError
from contextlab.evaluation import evaluate
from contextlab.prompt import Prompt
from contextlab.tasks import build_task
from contextlab.training import CurriculumSpec, TrainSpec, train
from contextlab.training.distributed import Workers
from contextlab.training.examples import CHUNK, Examples, draw_examples, fingerprints, without_known
from contextlab.training.schedule import Turns

ALONE = Workers(0, 1, torch.device("cpu"))
SPEC = TrainSpec(examples=20, epochs=12, batch=8, warmup=3, log_every=3, checkpoint_every=7)


def test_a_prompt_is_fixed_by_task_seed_and_number() -> None:
    small, large = draw_examples(Sums(), 10, seed=3), draw_examples(Sums(), CHUNK + 40, seed=3)
    assert (small.batch, large.batch) == (10, CHUNK + 40)
    for name in ("inputs", "targets", "scored", "shot"):
        assert torch.equal(getattr(small, name), getattr(large, name)[:10])
    assert len(fingerprints(large.inputs).unique()) == CHUNK + 40, "no two are the same"
    assert not torch.equal(small.inputs, draw_examples(Sums(), 10, seed=4).inputs)
    functions = draw_examples(build_task("linear_regression", dimensions=2, examples=3), 600)
    assert functions.xs is not None
    assert functions.at is not None
    assert (functions.xs.shape, functions.at.shape) == ((600, 3, 2), (3,))


@pytest.mark.parametrize(("size", "batch"), [(20, 8), (24, 8), (5, 8), (1, 4)])
def test_an_epoch_shows_each_prompt_once_in_another_order(size: int, batch: int) -> None:
    spec = TrainSpec(examples=size, epochs=6, batch=batch)
    assert spec.steps == -(-6 * size // batch)
    examples = Examples(Turns([Sums()], spec), spec, 0, ALONE)
    shown = torch.cat([examples.indices(0, turn) for turn in range(spec.steps)])
    epochs = shown[: 6 * size].view(6, size)
    assert torch.equal(epochs.sort(1).values, torch.arange(size).expand(6, -1))
    if size > 4:
        assert len({tuple(each) for each in epochs.tolist()}) == 6
    # a step that is asked for out of turn, as by a resumed training, has the same prompts
    again = Examples(Turns([Sums()], spec), spec, 0, ALONE)
    for step in reversed(range(spec.steps)):
        expected = draw_examples(Sums(), size).inputs[shown[step * batch : (step + 1) * batch]]
        assert torch.equal(again(step).inputs, expected)


def test_processes_share_each_batch() -> None:
    whole = Examples(Turns([Sums()], SPEC), SPEC, 0, ALONE)
    parts = [Examples(Turns([Sums()], SPEC), SPEC, 0, Workers(r, 2, torch.device("cpu"))) for r in range(2)]
    for step in range(5):
        assert torch.equal(whole(step).inputs, torch.cat([part(step).inputs for part in parts]))


def test_of_several_tasks_each_shows_its_own_set() -> None:
    tasks = [Sums(), Sums(scale=2.0)]
    for order in ("random", "mixed", "sequential"):
        spec = TrainSpec(examples=12, steps=40, batch=4, order=order)
        turns = Turns(tasks, spec, 5)
        examples = Examples(turns, spec, 5, ALONE)
        seen: list[list[Prompt]] = [[], []]
        for step in range(40):
            seen[turns.which(step)].append(examples(step))
        for task, prompts in zip(tasks, seen, strict=True):
            first = Prompt.join(prompts[:3])  # three batches are an epoch
            known = draw_examples(task, 12, 5)
            assert torch.equal(fingerprints(first.inputs).sort().values, fingerprints(known.inputs).sort().values)
            assert torch.equal(first.targets, first.inputs.sum(-1, keepdim=True).cumsum(1) * task.scale)
        assert turns.turn(7) == Turns(tasks, spec, 5).turn(7)


def test_a_training_on_few_examples_learns_them_by_heart() -> None:
    model = Tiny()
    train(model, Sums(), {"examples": 4, "epochs": 400, "batch": 4, "log_every": 400})
    known, other = draw_examples(Sums(), 4), draw_examples(Sums(), 64, seed=9)
    with torch.no_grad():
        on_known, on_other = (Sums().loss(model(each.inputs), each) for each in (known, other))
    assert on_known < on_other / 4


def test_resumed_in_the_middle_of_an_epoch_it_is_bit_for_bit_the_same(tmp_path: Path) -> None:
    whole = Tiny()
    expected = train(whole, Sums(), SPEC)

    def stop(step: int, steps: int, loss: float) -> None:
        if step == 12:  # of 2.5 steps an epoch
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        train(Tiny(), Sums(), SPEC, folder=tmp_path, progress=stop)
    resumed = Tiny(seed=7)
    found = train(resumed, Sums(), SPEC, folder=tmp_path, resume=True)
    assert found.history["loss"].tolist() == expected.history["loss"].tolist()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    with pytest.raises(InputError, match="train.examples was 20, now 21"):
        train(Tiny(), Sums(), SPEC.model_copy(update={"examples": 21}), folder=tmp_path, resume=True)


def test_however_a_batch_is_cut_it_is_the_same_training() -> None:
    found = []
    for parts in (1, 4):
        model = Tiny().double()
        train(model, Some(), SPEC.model_copy(update={"accumulate": parts}))
        found.append(torch.cat([each.detach().flatten() for each in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)


def test_prompts_of_the_training_set_do_not_count_in_an_evaluation() -> None:
    task = build_task("mad_compression", vocabulary=4, length=5)  # 81 prompts in all
    known = fingerprints(draw_examples(task, 40).inputs).unique()
    assert 20 < len(known) < 40
    seen = []

    def answer(inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs)
        return torch.zeros(*inputs.shape, task.output_size)

    found = evaluate(answer, task, prompts=200, batch=50, splits=["train"], apart=without_known(known))
    asked = torch.cat(seen)
    assert not torch.isin(fingerprints(asked), known).any()
    assert 0 < len(asked) < 200
    assert set(found["n"]) == {len(asked)}
    every = fingerprints(draw_examples(task, 4000).inputs).unique()
    assert len(every) == 81
    with pytest.warns(UserWarning, match="trained on all of the prompts"):
        none = evaluate(answer, task, prompts=50, splits=["train"], apart=without_known(every))
    assert none["n"].tolist() == [0]


def test_fingerprints_tell_prompts_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(16, (5000, 30), generator=generator)
    assert len(fingerprints(tokens).unique()) == 5000
    assert torch.equal(fingerprints(tokens[7:8]), fingerprints(tokens)[7:8])
    near = tokens[:1].repeat(30, 1)
    near[torch.arange(30), torch.arange(30)] += 1  # one token differs
    assert len(fingerprints(near).unique()) == 30
    signs = (torch.randint(2, (2000, 32), generator=generator) * 2 - 1).float().unique(dim=0)
    low = fingerprints(signs) & 0xFFFFFF  # as 1 and -1 differ in one bit, the highest, sums could agree in all below it
    assert len(low.unique()) > 1990
    floats = torch.randn(100, 4, 3, generator=generator)
    for each in (floats, floats.double()):
        assert len(fingerprints(torch.cat([each, each])).unique()) == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 3}, "epochs 3: of which prompts\\? give examples"),
        ({"examples": 100, "epochs": 4, "batch": 10, "steps": 30}, "steps 30 and epochs 4, which take 40 steps"),
        (
            {"examples": 100, "curriculum": {"length": {"start": 2, "end": 6}}},
            "a fixed set cannot grow with a curriculum",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrainSpec.parse(options, "train")


def test_steps_that_follow_from_epochs_are_not_written_down() -> None:
    spec = TrainSpec(examples=100, epochs=4, batch=16)
    assert spec.steps == 25
    assert "steps" not in spec.model_dump(exclude_unset=True)
    assert TrainSpec(examples=100, epochs=4, batch=16, steps=25).steps == 25  # they agree
    assert TrainSpec.parse({**spec.model_dump(exclude_unset=True), "examples": 50}).steps == 13
    assert CurriculumSpec(start=1, end=2).value(0) == 1


def test_sets_that_cannot_be_are_refused() -> None:
    spec = TrainSpec(examples=10, epochs=2, batch=4)
    with pytest.raises(InputError, match="2 tasks take turns, each with its own 10 examples; give steps"):
        train(Tiny(), [Sums(), Sums(scale=2.0)], spec)
    with pytest.raises(ResourceError, match="train.examples 2000000000: what is kept of them takes"):
        train(Tiny(), Sums(), spec.model_copy(update={"examples": 2_000_000_000}))

    class Varying(Sums):
        def sample(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Prompt:
            length = int(torch.randint(2, 50, (), generator=generator))
            return Sums(length=length).sample(batch, generator, device)

    with pytest.raises(InputError, match="prompts of Varying have .* tokens in one draw and .* in another"):
        train(Tiny(), Varying(), spec.model_copy(update={"examples": 5 * CHUNK}))
