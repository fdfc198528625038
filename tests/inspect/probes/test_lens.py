"""The lenses: they read a stream as the model does, and name the layer at which a written model has its answer."""

from __future__ import annotations

import pytest
import torch

from contextlab import build_model, build_task
from contextlab.inspect import Subject
from contextlab.inspect.probe import records
from contextlab.inspect.probes.lens import LOGIT, SHARE, TUNED, Lens
from contextlab.inspect.streams import TunedLens, answers_from, batches, counting, read_streams
from contextlab.learners import GradientDescent
from contextlab.models import preset
from contextlab.models.answer import answer
from contextlab.testing.models import noisy

REGRESSION = build_task("linear_regression", dimensions=3, examples=12)
ONE = build_task("linear_regression", dimensions=3, examples=12, query="random")


def drawn(task, count=20, seed=0):
    return task.sample(count, torch.Generator().manual_seed(seed)).to(torch.float64)


@pytest.mark.parametrize(
    ("name", "options", "task"),
    [
        ("transformer", {}, REGRESSION),
        ("mambaformer", {}, REGRESSION),
        ("transformer", {"pool": "mean"}, ONE),
        ("transformer", {"pool": "last"}, ONE),
        ("gated_delta_net", {"loops": 2}, REGRESSION),
    ],
)
@torch.no_grad()
def test_the_last_stream_is_read_as_the_model_reads_it(name, options, task):
    model = noisy(preset(name, width=16, depth=2, heads=2, **options).for_task(task)).eval()
    prompt = drawn(task)
    streams, answers = read_streams(model, prompt)
    assert len(streams) == 1 + 2 * options.get("loops", 1)
    assert torch.equal(answers, answer(model, prompt))
    assert torch.equal(answers_from(model, prompt, list(streams.values())[-1]), answers)
    assert counting(model, prompt).any(1).all()


@torch.no_grad()
def test_each_layer_of_a_written_model_answers_as_so_many_steps():
    model = build_model("gd_construction", dimensions=3, steps=3, learning_rate=0.3).double()
    prompt = drawn(REGRESSION)
    streams, _ = read_streams(model, prompt)
    for steps in range(4):
        site = f"blocks.{steps - 1}.output" if steps else "embedded"
        wanted = GradientDescent(steps, 0.3)(prompt) if steps else torch.zeros_like(prompt.targets)
        torch.testing.assert_close(answers_from(model, prompt, streams[site]), wanted)


@torch.no_grad()
def test_the_tuned_lens_is_least_squares():
    model = noisy(preset("transformer", width=8, depth=2, heads=2).for_task(REGRESSION)).eval()
    prompt = drawn(REGRESSION, 300)
    tuned = TunedLens(model, prompt)
    parts = [read_streams(model, part)[0] for part in batches(prompt)]
    first, last = (torch.cat([part[site] for part in parts]) for site in ("blocks.0.output", "blocks.1.output"))
    x = torch.nn.functional.pad(first.flatten(0, 1), (0, 1), value=1.0)
    wanted = x @ torch.linalg.lstsq(x, last.flatten(0, 1)).solution
    torch.testing.assert_close(tuned("blocks.0.output", first).flatten(0, 1), wanted, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(tuned("blocks.1.output", last), last, atol=1e-4, rtol=1e-4)


def test_the_layer_of_a_written_induction_head_is_named_and_fresh_weights_hold_nothing():
    task = build_task("induction_head", vocabulary=8, length=16)
    model = build_model("induction_construction", vocabulary=task.input_size, length=16).double()
    found = Lens(prompts=200, fit=400).measure(Subject(model, task))
    shares = found[found["measure"] == SHARE].set_index(["what", "site"])
    for lens in (LOGIT, TUNED):
        assert shares.loc[(lens, "blocks.1.output"), "value"] == 1
        assert shares.loc[(lens, "blocks.0.output"), "ci_high"] < 0.3
        assert abs(shares.loc[(lens, "blocks.1.output"), "control"]) < 0.3
    assert all("after layer 1 of 0 to 1" in each for each in Lens().words(records(found)))


def test_an_answer_in_a_turned_basis_is_found_by_the_tuned_lens_alone():
    model = build_model("gd_construction", dimensions=3, steps=2, learning_rate=0.3).double()
    width = model.spec.width
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    model.blocks[0] = TurnedBlock(model.blocks[0], turn)
    model.blocks[1] = TurnedBack(model.blocks[1], turn)
    found = Lens(prompts=200, fit=200).measure(Subject(model, REGRESSION))
    shares = found[found["measure"] == SHARE].set_index(["what", "site"])["value"]
    plain = Lens(prompts=200, fit=200).measure(
        Subject(build_model("gd_construction", dimensions=3, steps=2, learning_rate=0.3).double(), REGRESSION)
    )
    truth = plain[plain["measure"] == SHARE].set_index(["what", "site"])["value"]
    assert abs(shares[TUNED, "blocks.0.output"] - truth[TUNED, "blocks.0.output"]) < 0.02
    assert shares[LOGIT, "blocks.0.output"] < truth[LOGIT, "blocks.0.output"] - 0.2


class TurnedBlock(torch.nn.Module):
    """A block whose stream is turned after it."""

    def __init__(self, block, turn):
        super().__init__()
        self.block, self.turn = block, turn

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)

    def forward(self, x, *given):
        y, state = self.block(x, *given)
        return y @ self.turn, state


class TurnedBack(TurnedBlock):
    """A block that reads the stream turned back."""

    def forward(self, x, *given):
        return self.block(x @ self.turn.mT, *given)


def test_a_model_that_learned_nothing_is_said_to_hold_nothing():
    model = preset("transformer", width=8, depth=1, heads=2).for_task(REGRESSION)
    found = Lens(prompts=64, fit=64).measure(Subject(noisy(model).float().eval(), REGRESSION))
    assert set(found["measure"]) == {"squared_error"}
    assert "no better than chance" in Lens().words(records(found))[0]
