"""Exported models in the libraries that people use with them, and with the oldest transformers.

`bash scripts/test_transformers.sh clients` installs the libraries; elsewhere the tests of those that are missing skip.
"""

import copy
import json
import math
import subprocess

import pytest
import torch
import transformers
from conftest import BIN, ROOT, run
from test_hf_model import GREEDY, agree, build_model, text

from fairseq_alibi.__main__ import main
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
def test_lora_of_the_embedding_is_merged_without_another_result(tmp_path):
    """Of a tied model that is loaded untied, and with the first token, which is read as another one."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    x = text(2, 9).index_fill(1, torch.tensor([0]), 0)
    build_model("tied", begin_token=2).save_pretrained(tmp_path)
    model = type(build_model()).from_pretrained(tmp_path, tie_word_embeddings=False).eval()
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    wanted = adapted(x).logits
    agree(adapted.merge_and_unload()(x).logits, wanted)


def quantization(library):
    """transformers' configuration of a library that quantizes weights."""
    module = {"quanto": "optimum.quanto", "torchao dynamic": "torchao"}.get(library, library)
    pytest.importorskip(module, reason=f"{library} is not installed")
    if library == "quanto":
        return transformers.QuantoConfig(weights="int8")
    if library == "bitsandbytes":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig

    kind = Int8DynamicActivationInt8WeightConfig if "dynamic" in library else Int8WeightOnlyConfig
    return transformers.TorchAoConfig(kind())


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "tied", "adaptive", "untied"])
@pytest.mark.parametrize("library", ["quanto", "bitsandbytes", "torchao", "torchao dynamic"])
def test_eight_bits_are_close(form, library, tmp_path):
    model, x = build_model(form), text(4, 60)
    model.save_pretrained(tmp_path)
    small = type(model).from_pretrained(tmp_path, quantization_config=quantization(library)).eval()
    difference = (small(x).logits.log_softmax(-1) - model(x).logits.log_softmax(-1)).abs().mean()
    assert 0 < difference < (0.2 if form == "adaptive" else 0.1), "tied bands are looser"
    assert small.generate(x[:, :1], max_new_tokens=2, **GREEDY).shape == (4, 3)


@torch.no_grad()
@pytest.mark.parametrize("method", ["alibi", "t5", "fox", "xpos"])
def test_a_quantized_cache_is_close_or_refused(method):
    pytest.importorskip("optimum.quanto", reason="quanto is not installed")
    model, x = build_model(position_method=method), text(2, 60)
    cache = transformers.QuantizedCache("quanto", model.config)
    if method in ("fox", "xpos"):
        with pytest.raises(ValueError, match=f"a quantized cache is too coarse for position method {method}"):
            model(x, past_key_values=cache)
        return
    logits = torch.cat([model(part, past_key_values=cache).logits for part in x.split([40, 10, 10], dim=1)], dim=1)
    difference = (logits.log_softmax(-1) - model(x).logits.log_softmax(-1)).abs()[:, 40:].mean()
    assert 0 < difference < 0.3


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(("form", "method"), [("plain", "alibi"), ("adaptive", "t5")])
def test_onnx_computes_the_same_at_any_length(form, method, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model = build_model(form, position_method=method)
    sizes = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    given = {"input_ids": text(2, 9), "use_cache": False}
    file = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (), file, kwargs=given, dynamo=True, dynamic_shapes={**sizes, "use_cache": None})
    session = runtime.InferenceSession(file)
    for shape in ((2, 9), (1, 30), (5, 300)):
        found = session.run(None, {session.get_inputs()[0].name: text(*shape).numpy()})[0]
        agree(torch.from_numpy(found), model(text(*shape)).logits)


@pytest.mark.slow
@pytest.mark.parametrize("moses", [True, False])
def test_lm_evaluation_harness(moses, tmp_path, monkeypatch):
    """Rolling log-likelihoods are those of `evaluate`, and pairs in a padded batch have the scores of single ones."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = ["the", "cat", "dog", "sat", "on", "No.", "5", "Mr.", "Smith", '"yes",', "far-away", "U.S.", "end."]
    lines = [" ".join(words[(3 * n + k * k) % len(words)] for k in range((n + 1) % 9)) for n in range(150)]
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("\n".join(lines) + "\n")
    files = [part for split in ("train", "valid", "test") for part in (f"--{split}", f"{split}.txt")]
    tokenizer = [] if moses else ["--tokenizer", "none"]
    main(["prepare-text", "data", *files, "--bpe-merges", "30", "--workers", "1", *tokenizer])
    training = ["--user-dir", ROOT / "fairseq_alibi", "--task", "language_modeling", "--arch", "alibi_lm_tiny", "--cpu"]
    training += [
        "--tokens-per-sample",
        32,
        "--max-tokens",
        512,
        "--optimizer",
        "adam",
        "--lr",
        0.004,
        "--max-update",
        9,
    ]
    run(BIN / "fairseq-train", "data", *training, "--save-dir", ".", cwd=tmp_path)
    main(["export-hf", "checkpoint_last.pt", "hf"])
    AlibiTokenizer.from_pretrained("hf", word_by_word=True).save_pretrained("words")

    def client(**options):
        return HFLM(pretrained="hf", trust_remote_code=True, device="cpu", **options)

    tokens = client(add_bos_token=False).tok_encode((tmp_path / "valid.txt").read_text())
    length = next(length for length in range(20, len(tokens)) if len(tokens) % length == 0)
    main(["evaluate", "data", "checkpoint_last.pt", "--lengths", str(length), "--cpu"])
    (wanted,) = json.loads((tmp_path / "checkpoint_last_valid.json").read_text())["results"]
    tasks = TaskManager(include_path=str(ROOT / "examples/language_model/lm_eval"), include_defaults=False)
    rolling = client(add_bos_token=False, max_length=length)
    found = simple_evaluate(rolling, tasks=["own_text"], task_manager=tasks, bootstrap_iters=0)["results"]["own_text"]
    assert wanted["tokens"] == len(tokens)
    assert found["bits_per_byte,none"] == pytest.approx(wanted["bits_per_byte"], abs=1e-6)
    bits = found["bits_per_byte,none"] * (tmp_path / "valid.txt").stat().st_size
    counted = sum(map(len, map(str.split, lines))) + 1
    assert math.log2(found["word_perplexity,none"]) * counted == pytest.approx(bits)

    pairs = [(" ".join(words[n:][: n + 1]), f" {words[n - 3]} {words[n - 7]}") for n in range(9)] + [("", "the cat")]
    requests = [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(pairs)]
    single, padded = client(tokenizer="words"), client(tokenizer="words", batch_size=10)
    for context, choice in pairs:
        before, whole = single.tok_encode(context), single.tok_encode(context + choice)
        assert whole[: len(before)] == before
    one_by_one = [single.loglikelihood([request])[0] for request in requests]
    for (score, greedy), (other, also) in zip(one_by_one, padded.loglikelihood(requests)):
        assert score == pytest.approx(other, abs=1e-4)
        assert greedy == also
