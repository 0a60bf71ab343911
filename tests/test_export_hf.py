"""`fairseq-alibi export-hf`: what transformers loads is what fairseq computes. The real library, offline."""

import copy
import shutil
import sys

import pytest
import torch
from conftest import failure, run

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[transformers]'")
pytest.importorskip("accelerate", reason="accelerate, which transformers' Trainer needs, is not installed")

import transformers
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.hub_utils import GeneratorHubInterface
from omegaconf import OmegaConf
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import fairseq_alibi  # noqa: F401
from fairseq_alibi.__main__ import main
from fairseq_alibi.core import position_methods, tokenization_alibi
from fairseq_alibi.core.modeling_alibi import AlibiConfig, AlibiForCausalLM
from fairseq_alibi.data.binarize import SPLITS
from fairseq_alibi.evaluation import generation, scoring
from fairseq_alibi.files import export_hf
from fairseq_alibi.files.checkpoints import load_model, read_checkpoint
from fairseq_alibi.files.data_folders import text_options
from fairseq_alibi.files.export_hf import export_tokenizer
from fairseq_alibi.models.language_model import AlibiLanguageModel

#: wiki103's form: adaptive input and softmax, tied with their projections, and heads that are no power of two.
WIKI103 = ["--decoder-layers", 2, "--decoder-ffn-embed-dim", 64, "--decoder-attention-heads", 12]
WIKI103 += [word for part in ("embed", "input", "output") for word in (f"--decoder-{part}-dim", 96)]
WIKI103 += ["--adaptive-input-cutoff", "20,40", "--adaptive-softmax-cutoff", "20,40"]

#: What else a checkpoint has.
PROGRESS = {
    "extra_state": {"train_iterator": {"epoch": 1}},
    "optimizer_history": [{"optimizer_name": "FairseqAdam", "lr_scheduler_state": {}, "num_updates": 1}],
}

#: Longer than any training here.
LENGTH = 300

LINES = ["word1 don't stop, 2.5 (the-end) & U.S.", "", "Unseen words: zebra <unk> <pad> </s>", "word3 word3"]


@pytest.fixture(scope="module", autouse=True)
def offline():
    """No network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory, corpus):
    """Data folders: as scripts/prepare_text.sh makes them, the same of whole words, and one of words between spaces."""
    folder = tmp_path_factory.mktemp("text")
    splits = [word for split in SPLITS for word in (f"--{split}", str(folder / "lines.txt"))]
    (folder / "lines.txt").write_text("".join(f"word{n % 40} {LINES[0]} word{n % 7}\n" for n in range(200)))
    main(["prepare-text", str(folder / "bpe"), *splits, "--bpe-merges", "60", "--workers", "1"])
    shutil.copytree(folder / "bpe", folder / "words")
    (folder / "words" / "bpe.codes").unlink()
    words = ["word1", "don", "&apos;t", "stop", ",", "&amp;", "@-@", "U.S.", "word3", "&lt;"]
    (folder / "words" / "dict.txt").write_text("".join(f"{word} 9\n" for word in words))
    return {"bpe": folder / "bpe", "words": folder / "words", "spaces": corpus}


@pytest.fixture(scope="module", params=["plain", "wiki103"])
def both(request, checkpoint, build, corpus, tmp_path_factory):
    """A checkpoint as fairseq's model, as transformers loads its export, and the folder of that."""
    folder = tmp_path_factory.mktemp("export")
    if request.param == "wiki103":
        checkpoint = saved(sharp(build("alibi_lm_wiki103", *WIKI103)), folder)
    main(["export-hf", str(checkpoint), str(folder / "out")])
    model = load_model(str(checkpoint), read_checkpoint(str(checkpoint)), str(corpus))
    return model, loaded(folder / "out"), folder / "out"


def sharp(model):
    """A model whose scores depend strongly on the context, which untrained ones' do not."""
    for name, value in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            value.data *= 3
    return model


def loaded(out, **options):
    return AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, **options).eval()


def saved(model, folder, **options):
    """A checkpoint of a model that `build` made, as fairseq writes it, with some options of the model changed."""
    cfg = OmegaConf.to_container(model.built_from)
    cfg["model"].update(options)
    path = folder / "checkpoint.pt"
    torch.save({"args": None, "cfg": cfg, "model": model.state_dict(), **PROGRESS}, path)
    return path


def hub(folder):
    """fairseq's own way from text to tokens, for a data folder."""
    chosen = {name: value for name, value in text_options(folder).items() if value}
    words = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", value)]
    parser = options.get_interactive_generation_parser("language_modeling")
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [str(folder), "--path", "none", *words]))
    return GeneratorHubInterface(cfg, tasks.setup_task(cfg.task), [])


def tokens(model, *shape):
    return torch.randint(4, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def log_probs(model, tokens):
    with torch.no_grad():
        return model.get_normalized_probs(model(tokens), log_probs=True)


def agree(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_logits_are_fairseqs_past_the_training_length_and_after_another_round(both, tmp_path):
    theirs, ours, _ = both
    x = tokens(ours, 2, LENGTH)
    logits = ours(x).logits
    agree(logits.log_softmax(-1), log_probs(theirs, x))
    if theirs.decoder.adaptive_softmax is not None:
        agree(logits.exp().sum(-1), torch.ones(2, LENGTH))
    else:
        agree(logits, theirs(x)[0])
    agree(ours(x, logits_to_keep=3).logits, logits[:, -3:])
    ours.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert torch.equal(again(x).logits, logits)
    assert again.state_dict().keys() == ours.state_dict().keys()
    stack = AutoModel.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(stack(x).last_hidden_state, again.base_model(x).last_hidden_state)
    assert sum(value.numel() for value in again.parameters()) == sum(value.numel() for value in theirs.parameters())
    half = loaded(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half(x, labels=x).loss.item() == pytest.approx(ours(x, labels=x).loss.item(), rel=0.02)


@torch.no_grad()
def test_generation_with_a_cache_is_token_by_token_argmax_past_the_training_length(both):
    _, ours, _ = both
    how = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    x = tokens(ours, 1, 30)
    found = ours.generate(x, max_new_tokens=50, **how)
    expected = x
    for _ in range(50):
        expected = torch.cat([expected, ours(expected, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, expected)
    short = x[:, :11]
    padded = torch.cat([torch.cat([torch.full((1, 19), 1), short], dim=1), x])
    batch = ours.generate(padded, attention_mask=(padded != 1).long(), max_new_tokens=50, **how)
    assert torch.equal(batch[1:], found)
    assert torch.equal(batch[:1, 19:], ours.generate(short, max_new_tokens=50, **how))
    beams = [ours.generate(x, max_new_tokens=20, num_beams=3, use_cache=cached, **how) for cached in (True, False)]
    assert torch.equal(*beams)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_token(both, side):
    _, ours, _ = both
    x, padding = tokens(ours, 1, 40), torch.full((1, 7), 1)
    parts, at = ([padding, x], slice(7, None)) if side == "left" else ([x, padding], slice(None, -7))
    padded = torch.cat(parts, dim=1)
    agree(ours(padded, attention_mask=(padded != 1).long()).logits[:, at], ours(x).logits)


def test_loss_in_trainer_is_ours(both, tmp_path):
    """Evaluation, and the first step of training, of which the loss is that before it; in two parts."""
    theirs, ours, out = both
    rows, length = 4, 50
    stream = tokens(ours, rows * length)
    losses = [scored.losses for scored in scoring.score_windows(theirs, stream, length, length, length)]
    expected = torch.cat(losses).mean().item()
    source = torch.cat([torch.tensor([2]), stream])
    dataset = []
    for row in range(rows):
        ids = source[row * length : (row + 1) * length + 1]
        labels = ids.clone()
        labels[0] = -100  # nothing predicts it, but transformers 4 would count it
        dataset.append({"input_ids": ids, "labels": labels})
    model = loaded(out, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, adaptive_softmax_dropout=0.0)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        per_device_eval_batch_size=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )

    def metrics(found):
        return {"right": (found.predictions[:, :-1].argmax(-1) == found.label_ids[:, 1:]).sum().item()}

    data = {"train_dataset": dataset, "eval_dataset": dataset}
    trainer = transformers.Trainer(model, arguments, compute_metrics=metrics, **data)
    evaluated = trainer.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(expected, abs=1e-4)
    inputs = torch.stack([item["input_ids"] for item in dataset])
    with torch.no_grad():
        assert evaluated["eval_right"] == (ours(inputs).logits[:, :-1].argmax(-1) == inputs[:, 1:]).sum()
    trainer.train()
    (logged,) = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(expected, abs=1e-3), "which transformers rounds"
    ignored = stream[None].clone()
    ignored[:, 5:] = -100
    some = ours(stream[None], labels=ignored).loss
    agree(some, -log_probs(theirs, stream[None])[0, :4].gather(1, stream[1:5, None]).mean())
    agree(ours(stream[None], labels=ignored, num_items_in_batch=torch.tensor(8)).loss, some / 2)


REFUSED = {
    "rotary --rotary-scaling yarn": "--rotary-scaling yarn with the factor auto: .* 'rotary_scaling_factor': '4.0'",
    "rotary --rotary-scaling dynamic_ntk --rotary-scaling-factor 2": "--rotary-scaling dynamic_ntk with the factor 2: ",
    "alibi --alibi-length-scale auto": "--alibi-length-scale auto: .* pass --model-overrides",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_the_exported_model_cannot_do_is_refused(build, options, tmp_path):
    checkpoint = saved(build("alibi_lm_tiny", "--position-method", *options.split()), tmp_path)
    with pytest.raises(SystemExit, match=REFUSED[options]):
        main(["export-hf", str(checkpoint), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", position_methods())
@torch.no_grad()
def test_every_form_has_fairseqs_logits_at_once_and_with_a_cache(build, method, tmp_path):
    """Each method with other options of the layers, the embeddings and the output."""
    form = {
        "alibi": ["--alibi-max-bias", 12, "--alibi-heads", 5, "--alibi-length-scale", 2.0],
        "sinusoidal": ["--layernorm-embedding", "--no-scale-embedding"],
        "rotary": ["--decoder-normalize-before", "--decoder-input-dim", 32, "--decoder-output-dim", 48],
        "t5": ["--adaptive-softmax-cutoff", "10,20", "--activation-fn", "gelu"],
        "learned": ["--adaptive-input", *WIKI103[-4:], "--tie-adaptive-weights", "--max-target-positions", 400],
        "none": ["--adaptive-input", "--adaptive-input-cutoff", "10", "--decoder-normalize-before"],
        "fox": ["--score-scale", "ssmax"],
        "kerple": ["--score-scale", "log_n", "--position-layers", "10"],
        "cable": ["--position-layers", "01"],
    }.get(method, ["--share-decoder-input-output-embed"])
    sizes = ["--decoder-layers", 2, "--decoder-embed-dim", 64, "--decoder-ffn-embed-dim", 64]
    if "--decoder-input-dim" not in form:
        sizes += ["--decoder-input-dim", 64, "--decoder-output-dim", 64]
    if method == "sinusoidal":
        sizes.append("--share-decoder-input-output-embed")
    theirs = build("alibi_lm", "--position-method", method, *sizes, *form)
    main(["export-hf", str(saved(theirs, tmp_path)), str(tmp_path / "out")])
    ours = loaded(tmp_path / "out")
    x = tokens(ours, 2, LENGTH)
    wanted = log_probs(theirs, x)
    agree(ours(x).logits.log_softmax(-1), wanted)
    first = ours(x[:, :200], use_cache=True)
    later = ours(x[:, 200:], past_key_values=first.past_key_values)
    agree(torch.cat([first.logits, later.logits], dim=1).log_softmax(-1), wanted)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_activation_checkpointing_keeps_the_gradients():
    """Those of a learned bias too, which all layers share."""
    config = AlibiConfig(vocab_size=50, decoder_layers=2, decoder_ffn_embed_dim=64, position_method="t5", dropout=0.0)
    plain = AlibiForCausalLM(config).train()
    torch.nn.init.normal_(plain.decoder.position_method.bucket_bias)
    checkpointed, calls = copy.deepcopy(plain), []
    checkpointed.gradient_checkpointing_enable()
    checkpointed.decoder.layers[0].fc1.register_forward_hook(lambda *_: calls.append(1))
    x = tokens(plain, 2, 20)
    for model in (plain, checkpointed):
        model(x, labels=x).loss.backward()
    assert len(calls) == 2
    for (name, value), other in zip(plain.named_parameters(), checkpointed.parameters()):
        torch.testing.assert_close(value.grad, other.grad, msg=name)
    assert plain.decoder.position_method.bucket_bias.grad.abs().sum() > 0


@pytest.mark.slow
def test_the_folder_needs_neither_fairseq_nor_this_package(both, tmp_path):
    _, ours, out = both
    code = f"""
import sys, torch
sys.modules["fairseq"] = sys.modules["fairseq_alibi"] = None
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)
torch.save(model(torch.arange(4, 14)[None]).logits, {str(tmp_path / "logits")!r})
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": ""}
    run(sys.executable, "-W", "ignore", "-c", code, cwd=tmp_path, **environment)
    agree(torch.load(tmp_path / "logits"), ours(torch.arange(4, 14)[None]).logits)


@pytest.mark.parametrize("kind", ["bpe", "words", "spaces"])
def test_tokenizer_gives_fairseqs_ids_and_the_text_back(kind, data, tmp_path):
    fairseqs = hub(data[kind])
    says = export_tokenizer(fairseqs.tgt_dict, data[kind], tmp_path / "out")
    assert says == {"bpe": "Moses tokens, BPE", "words": "Moses tokens", "spaces": "white space"}[kind]
    AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True).save_pretrained(tmp_path / "again")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert len(tokenizer) == len(fairseqs.tgt_dict)
    text = "\n".join(LINES)
    ids = generation.encode_text(fairseqs, text)
    assert tokenizer(text)["input_ids"] == [0, *ids.tolist()]
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids.tolist()
    assert tokenizer.decode([1, 0, *ids], skip_special_tokens=True) == generation.decode_tokens(fairseqs, ids)
    assert tokenizer.decode(tokenizer(f"{LINES[3]}\n\n{LINES[3]}\n")["input_ids"], skip_special_tokens=True) == (
        f"{LINES[3]}\n\n{LINES[3]}\n"
    )
    batch = tokenizer([LINES[3], f"{LINES[3]} {LINES[3]}"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(1).tolist()[1] == batch["input_ids"].size(1)
    assert batch["input_ids"][0, 0] == 1, "padded on the left, for generation"


@pytest.mark.parametrize("more", [[], ["--add-bos-token"]], ids=["line end", "bos"])
def test_texts_begin_as_the_model_was_trained_to(corpus, train, tmp_path, more):
    """Scores of fairseq's hub interface, from text to score, and greedy texts by full passes."""
    checkpoint = train(*more, updates=3)
    main(["export-hf", str(checkpoint), str(tmp_path / "out"), "--data", str(corpus)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    hub = AlibiLanguageModel.from_pretrained(
        str(checkpoint.parent), checkpoint.name, data_name_or_path=str(corpus), user_dir="fairseq_alibi"
    )
    text = "word1 word2 word3 word3"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0, 0] == 0
    assert model.config.begin_token == (None if more else 2)
    scores = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(scores, hub.score(text)["positional_scores"], rtol=1e-4, atol=1e-4)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    assert model.generation_config.bos_token_id == ids[0, 0]
    empty = model.generate(max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert empty[0, 0] == ids[0, 0], "a text from nothing begins so too"


def test_an_export_that_scores_texts_otherwise_is_not_written(corpus, train, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenization_alibi.AlibiTokenizer, "words", lambda self, line: line.split()[::-1])
    with pytest.raises(SystemExit, match=r"score the text .* differently"):
        main(["export-hf", str(train(updates=3)), str(tmp_path / "out"), "--data", str(corpus)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["--character-embeddings", "--adaptive-softmax-cutoff", "20"],
            "--character-embeddings True: the exported model does not have it",
        ),
        (["--decoder-layerdrop", 0.1], "{'decoder_layerdrop': 0.0}"),
        (["--quant-noise-pq", 0.1], "--quant-noise-pq 0.1"),
        (["--activation-fn", "gelu_accurate"], "gelu_accurate: the exported model has only relu, gelu, tanh"),
        (["--alibi-length-scale", "auto"], "--alibi-length-scale auto"),
    ],
)
def test_what_cannot_be_exported_is_named(build, arguments, reason, tmp_path, capsys):
    path = saved(build("alibi_lm_tiny", *arguments), tmp_path)
    assert reason in failure(capsys, main, "export-hf", path, tmp_path / "out")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_bad_arguments_are_named_and_nothing_is_left(build, corpus, tmp_path, capsys, monkeypatch):
    model = build("alibi_lm_tiny")
    path, out = saved(model, tmp_path), tmp_path / "out"
    assert "there is no checkpoint" in failure(capsys, main, "export-hf", tmp_path / "none.pt", out)
    assert f"{tmp_path}/dict.txt" in failure(capsys, main, "export-hf", path, out, "--data", tmp_path)
    monkeypatch.setattr(export_hf, "largest_difference", lambda *_: 0.5)
    message = failure(capsys, main, "export-hf", path, out)
    assert "differ from fairseq's by up to 0.5, so nothing was written" in message
    monkeypatch.undo()
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    out.mkdir()
    main(["export-hf", str(path), str(out), "--data", str(corpus)])
    assert f"{out} exists: move it away" in failure(capsys, main, "export-hf", path, out)
    theirs = saved(build("transformer_lm", "--decoder-layers", 1), tmp_path)
    assert "import-checkpoint" in failure(capsys, main, "export-hf", theirs, tmp_path / "new")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "transformers is not installed" in failure(capsys, main, "export-hf", path, tmp_path / "new")
