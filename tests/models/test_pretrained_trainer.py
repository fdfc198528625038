"""Our models in transformers' Trainer: accumulation, resumption, the best checkpoint; other sizes of vocabulary."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from contextlab.errors import InputError
from contextlab.models import build_model, load_model

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it")

SIZES = {"width": 16, "depth": 2, "heads": 2, "read_in": "token", "input_size": 31, "output_size": 31}


def build(preset="samba", **options):
    from contextlab.models.pretrained import ContextlabForCausalLM

    return ContextlabForCausalLM.of(build_model(preset, **{**SIZES, **options}, seed=4))


def rows(count=8, length=7):
    """Prompts of which very different numbers of labels count."""
    tokens = torch.randint(31, (count, length), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    for i in range(count):
        labels[i, : 1 + i % (length - 1)] = -100
    return [{"input_ids": t, "labels": n} for t, n in zip(tokens, labels, strict=True)]


def trained(folder, model, resume=False, **options):
    settings = {
        "max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **options})
    trainer = transformers.Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows(4))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(model):
    return {name: each.detach().clone() for name, each in model.state_dict().items()}


def same(one, other, **how):
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda text, name=name: f"{name}: {text}", **how)


def by_hand(model, steps, smoothing=0.0):
    """Plain descent on the mean cross-entropy of each batch of four."""
    data = rows()
    for step in range(steps):
        batch = data[4 * (step % 2) : 4 * (step % 2) + 4]
        tokens, labels = (torch.stack([each[name] for each in batch]) for name in ("input_ids", "labels"))
        logits = model(tokens)[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, 1:].flatten(), label_smoothing=smoothing)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    return model


@pytest.mark.parametrize("accumulate", [1, 4])
def test_training_does_not_depend_on_how_a_batch_is_cut(accumulate, tmp_path):
    model = build()
    trained(tmp_path, model, per_device_train_batch_size=4 // accumulate, gradient_accumulation_steps=accumulate)
    same(weights(model.model), weights(by_hand(build().model, 2)), rtol=0, atol=1e-5)


def test_label_smoothing_is_of_the_next_token(tmp_path):
    model = build()
    trained(tmp_path, model, label_smoothing_factor=0.2)
    same(weights(model.model), weights(by_hand(build().model, 2, 0.2)), rtol=0, atol=1e-5)


def test_gradient_checkpointing_changes_nothing_and_runs_blocks_again(tmp_path):
    plain, again = build(), build()
    calls = []
    again.model.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    trained(tmp_path / "a", plain)
    trained(tmp_path / "b", again, gradient_checkpointing=True)
    same(weights(plain), weights(again), rtol=0, atol=1e-6)
    assert len(calls) == 4  # two steps, each forward and once more in its backward
    assert again.is_gradient_checkpointing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its name in newer releases: activation_checkpointing_disable
        again.gradient_checkpointing_disable()
    again(rows()[0]["input_ids"][None]).logits.sum().backward()
    assert len(calls) == 5


@pytest.mark.parametrize(("reentrant", "every", "again"), [(False, 1, 2), (True, 1, 2), (False, 2, 1)])
def test_options_of_gradient_checkpointing(reentrant, every, again):
    tokens = torch.stack([each["input_ids"] for each in rows(2)])
    gradients, calls = [], []
    for checkpointed in (False, True):
        model = build().train()
        if checkpointed:
            for block in model.model.blocks:
                block.register_forward_pre_hook(lambda *_: calls.append(1))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable({"use_reentrant": reentrant}, every_n_layers=every)
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    same(*gradients, rtol=0, atol=1e-6)
    assert len(calls) == 2 + again


def test_a_resumed_training_is_the_whole_one(tmp_path):
    whole, resumed = build(), build(width=16)
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    trained(tmp_path, whole, **options)
    torch.nn.init.zeros_(resumed.model.read_in.weight)
    trained(tmp_path, resumed, resume=str(tmp_path / "checkpoint-2"), **options)
    same(weights(whole), weights(resumed), rtol=0, atol=0)
    same(weights(load_model(tmp_path / "checkpoint-4")), weights(whole.model), rtol=0, atol=0)


def test_the_best_checkpoint_is_what_is_left(tmp_path):
    model = build()
    trainer = trained(
        tmp_path, model, max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"  # the first: larger is asked for
    same(weights(model), load_file(tmp_path / "checkpoint-2" / "model.safetensors"), rtol=0, atol=0)
    last = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert not torch.equal(last["model.read_out.weight"], model.model.read_out.weight)
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0])
    trainer.save_model()  # beside its checkpoints, which stay
    assert (tmp_path / "checkpoint-6" / "model.safetensors").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_another_number_of_token_ids(tied, tmp_path):
    model = build("transformer", tied=tied).eval()
    tokens = torch.stack([each["input_ids"] for each in rows()])
    before, old = model(tokens).logits, weights(model.model)
    assert model.resize_token_embeddings(34, pad_to_multiple_of=8) is model.get_input_embeddings()
    assert (model.config.vocab_size, model.model.spec.input_size, model.model.spec.output_size) == (40, 40, 40)
    assert model.model.read_in.weight.shape == model.model.read_out.weight.shape == (40, 16)
    assert (model.model.read_out.weight is model.model.read_in.weight) == tied
    after = model(tokens).logits
    assert after.shape == (8, 7, 40)
    torch.testing.assert_close(after[..., :31], before)
    torch.testing.assert_close(after[..., 31:], before.mean(-1, keepdim=True).expand(8, 7, 9), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.model.read_in.weight[35], old["read_in.weight"].mean(0))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens + 5).logits, model(tokens + 5).logits)
    again.resize_token_embeddings(31)
    same(weights(again.model), old, rtol=0, atol=0)
    random = build("transformer")
    random.resize_token_embeddings(4000, mean_resizing=False)
    assert random.model.read_in.weight[31:].std().item() == pytest.approx(1.0, rel=0.05)
    with pytest.raises(InputError, match="new_num_tokens: expected a whole number of at least 1, got -2"):
        model.resize_token_embeddings(-2)
    with pytest.raises(InputError, match="reads 31 token ids and predicts 30"):
        build("transformer", output_size=30).resize_token_embeddings(40)
