"""Our models in other people's programs: peft, accelerate, trl, lm-eval, nnsight, captum. Each is tried where it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from contextlab.models import build_model, load_model

from .test_pretrained_files import words

transformers = pytest.importorskip("transformers", minversion="5")

SIZES = {"width": 16, "depth": 2, "heads": 2, "read_in": "token", "input_size": 31, "output_size": 31}
TOKENS = torch.randint(1, 30, (2, 6), generator=torch.Generator().manual_seed(0))


def build(preset="transformer"):
    from contextlab.models.pretrained import ContextlabForCausalLM

    return ContextlabForCausalLM.of(build_model(preset, **SIZES, seed=3).eval())


@pytest.fixture
def offline(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def tokenizer():
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words(), unk_token="[UNK]", pad_token="w29", eos_token="w0"
    )


def likeliest(model, tokens, count):
    """Greedy decoding, all tokens read again in each step."""
    for _ in range(count):
        logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
    return tokens


ADAPTERS = {
    "lora": lambda peft: peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"),
    "whole layers": lambda peft: peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["qkv_proj"], modules_to_save=["read_in", "read_out"]
    ),
    "prompt tuning": lambda peft: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "prefix tuning": lambda peft: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_trained_saved_loaded_and_merged(kind, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(build("samba" if kind == "lora" else "transformer"), ADAPTERS[kind](peft))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3)
    losses = []
    for _ in range(3):
        loss = model(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS), labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    after = model(input_ids=TOKENS).logits
    model.save_pretrained(tmp_path / "adapter")
    base = build("samba" if kind == "lora" else "transformer")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(again(input_ids=TOKENS).logits, after)
    written = again.generate(input_ids=TOKENS, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(written, likeliest(again, TOKENS, 4))
    if "tuning" not in kind:
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(TOKENS).logits, after, rtol=1e-4, atol=1e-5)
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(load_model(tmp_path / "merged")(TOKENS), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer", ["attention", "gated_delta_net", "mamba2", "rg_lru"])
def test_prompt_tuning_is_reading_learned_vectors_first(mixer):
    """2104.08691, section 2: what is predicted is what the model says after P, the prompt's vectors."""
    peft = pytest.importorskip("peft")
    from contextlab.models.pretrained import ContextlabForCausalLM
    from contextlab.models.stack import Within

    model = build_model({**SIZES, "layers": [mixer]}, seed=3).eval()
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = peft.get_peft_model(ContextlabForCausalLM.of(model), config).eval()
    assert sum(each.numel() for each in tuned.parameters() if each.requires_grad) == 3 * SIZES["width"]
    with torch.no_grad():
        prompt = tuned.get_prompt(batch_size=len(TOKENS))
        embedded = torch.cat((prompt, model.read_in(TOKENS)), 1)
        ids = torch.zeros(embedded.shape[:2], dtype=torch.int64)
        wanted = model(ids, within=Within(embedded=embedded))
        mask = torch.ones_like(TOKENS)
        torch.testing.assert_close(tuned(input_ids=TOKENS, attention_mask=mask).logits, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(wanted[:, 3:], model(TOKENS), atol=1e-2)


def test_two_processes_train_as_one(tmp_path):
    """Each on half of the rows, of which different numbers of labels count."""
    pytest.importorskip("accelerate")
    from .test_pretrained_trainer import build, by_hand

    (tmp_path / "train.py").write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {os.getcwd()!r})
        from pathlib import Path
        from tests.models.test_pretrained_trainer import build, trained
        from tests.training.leaving import leave_together
        folder = Path({str(tmp_path)!r})
        trained(folder, build(), per_device_train_batch_size=2, ddp_backend="gloo").save_model(folder / "two")
        leave_together(folder)
        """)
    )
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*run, str(tmp_path / "train.py")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = by_hand(build().model, 2).state_dict(), load_model(tmp_path / "two").state_dict()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)


def test_trl_fine_tunes_and_prefers(tmp_path, offline):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    texts = ["w1 w2 w3 w4 w5", "w2 w3 w4", "w9 w8 w7 w6 w5 w4", "w1 w1 w1 w1"]
    settings = {
        "max_steps": 1, "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "bf16": False,
        "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
    }  # fmt: skip
    tok = tokenizer()
    model = build("samba")
    ids = [tok(text)["input_ids"] + [0] for text in texts]  # trl adds the end of a text
    terms = [-model(torch.tensor([i])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(i)[1:, None]) for i in ids]
    expected = torch.cat(terms).mean().item()
    trainer = trl.SFTTrainer(
        model, args=trl.SFTConfig(str(tmp_path), **settings), processing_class=tok,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    pairs = {"prompt": texts, "chosen": [" w3 w4"] * 4, "rejected": [" w5"] * 4}
    trainer = trl.DPOTrainer(
        build("samba"), ref_model=build("samba"), args=trl.DPOConfig(str(tmp_path), **settings), processing_class=tok,
        train_dataset=datasets.Dataset.from_dict(pairs),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2: it is its own reference


def test_lm_eval_scores_a_folder(tmp_path, offline):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = build()
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "docs.json").write_text(json.dumps({"text": "w1 w2 w3", "a": "w4", "b": "w5 w6", "gold": 0}))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "mini.yaml").write_text(
        textwrap.dedent(f"""
        task: mini
        dataset_path: json
        dataset_kwargs: {{data_files: {{test: {tmp_path / "docs.json"}}}}}
        test_split: test
        output_type: multiple_choice
        doc_to_text: "{{{{text}}}}"
        doc_to_choice: "{{{{[a, b]}}}}"
        doc_to_target: gold
        """)
    )
    scorer = HFLM(
        pretrained=str(tmp_path / "model"), batch_size=2, device="cpu", dtype="float32", trust_remote_code=True
    )
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = lm_eval.simple_evaluate(scorer, tasks=["mini"], task_manager=manager, bootstrap_iters=0)
    scores = [float(each[0]) for each in found["samples"]["mini"][0]["filtered_resps"]]
    logs = model(torch.tensor([[1, 2, 3, 5, 6]])).logits[0].log_softmax(-1)
    assert scores == pytest.approx([logs[2, 4].item(), (logs[2, 5] + logs[3, 6]).item()], abs=1e-4)


def test_nnsight_reads_and_changes_what_a_block_gives():
    nnsight = pytest.importorskip("nnsight")
    model = build()
    traced = nnsight.NNsight(model)
    with traced.trace(TOKENS):
        first = traced.model.blocks[0].output[0].save()
        traced.model.blocks[1].output[0][:] = 0
        logits = traced.output.logits.save()
    assert torch.equal(first, model(TOKENS, output_hidden_states=True).hidden_states[1])
    norm = model.model.read_out_norm(torch.zeros(2, 6, 16))
    torch.testing.assert_close(logits, model.model.read_out(norm))


def test_captum_attributes_a_logit_to_tokens():
    attr = pytest.importorskip("captum.attr")
    model, baseline = build(), torch.zeros_like(TOKENS)
    gradients = attr.LayerIntegratedGradients(lambda ids: model(ids).logits[:, -1], model.get_input_embeddings())
    found = gradients.attribute(TOKENS, baselines=baseline, target=3, n_steps=64)
    due = model(TOKENS).logits[:, -1, 3] - model(baseline).logits[:, -1, 3]
    torch.testing.assert_close(found.sum((1, 2)), due.double(), rtol=0, atol=1e-3, check_dtype=False)
