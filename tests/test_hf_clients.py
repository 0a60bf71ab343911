"""Exported models in trl, peft and quanto, each where it is installed, and with the oldest transformers."""

import copy
import subprocess

import pytest
import torch
from conftest import ROOT
from test_hf_model import agree, build_model, text

from fairseq_alibi.core.tokenization_alibi import AlibiTokenizer

TEXTS = [" ".join(f"w{(7 * n + k) % 56}" for k in range(4 + n % 9)) for n in range(12)]
COMMON = {"report_to": [], "max_steps": 2, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}


@pytest.fixture
def tokenizer(tmp_path):
    types = ["<s>", "<pad>", "</s>", "<unk>", *(f"w{n}" for n in range(56))]
    (tmp_path / "vocab.txt").write_text("\n".join(types))
    return AlibiTokenizer(str(tmp_path / "vocab.txt"))


@pytest.mark.slow
def test_the_oldest_transformers():
    found = subprocess.run(["bash", "scripts/test_transformers.sh"], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-1000:]


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_trl_trains_on_texts(tokenizer, tmp_path, packing):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    model = build_model("tied")
    before = copy.deepcopy(model.state_dict())
    arguments = trl.SFTConfig(output_dir=str(tmp_path), max_length=16, packing=packing, **COMMON)
    data = Dataset.from_dict({"text": TEXTS})
    trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer).train()
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])


@pytest.mark.slow
def test_trl_trains_on_preferences(tokenizer, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    columns = {"prompt": TEXTS[:4], "chosen": TEXTS[4:8], "rejected": TEXTS[8:]}
    model, data = build_model(), Dataset.from_dict(columns)
    arguments = trl.DPOConfig(output_dir=str(tmp_path), logging_steps=1, **COMMON)
    trainer = trl.DPOTrainer(model, build_model(), args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert float(first) == pytest.approx(0.693, abs=1e-3), "ln 2: the model is its own reference"


@torch.no_grad()
@pytest.mark.parametrize("form", ["plain", "tied", "adaptive", "untied"])
def test_lora_is_merged_without_another_result(form):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    x = text(2, 9)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(build_model(form), config).eval()
    wanted = adapted(x).logits
    assert not torch.allclose(wanted, build_model(form)(x).logits, atol=0.1)
    agree(adapted.merge_and_unload()(x).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("form", ["plain", "tied", "adaptive", "untied"])
def test_eight_bits_are_close(form, tmp_path):
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    from transformers import QuantoConfig

    model, x = build_model(form), text(2, 9)
    model.save_pretrained(tmp_path)
    small = type(model).from_pretrained(tmp_path, quantization_config=QuantoConfig(weights="int8")).eval()
    difference = (small(x).logits.log_softmax(-1) - model(x).logits.log_softmax(-1)).abs().mean()
    assert 0 < difference < 0.1
