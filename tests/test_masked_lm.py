"""The model `alibi_masked_lm` against a float64 reference model and fairseq's `roberta`; training and evaluation."""

import copy
import json
import math

import numpy
import pytest
import reference
import torch
from conftest import BIN, failure, run

from fairseq_alibi.__main__ import main
from fairseq_alibi.core import position_methods
from fairseq_alibi.core.alibi import ENCODER_FORMS
from fairseq_alibi.evaluation.scoring import masked_tokens
from fairseq_alibi.files.data_folders import read_subset

FORMS = [(f"--alibi-encoder-bias={form}",) for form in ENCODER_FORMS]
LEARNED = ("--alibi-encoder-bias=two_slopes", "--alibi-learned-slopes")
FORMS += [LEARNED]

#: All of them without a mask.
FUSED = [(*form, "--attention=fused") for form in FORMS]

#: What trains an encoder, in place of the arguments of conftest's `train`.
TASK = ("--task", "masked_lm", "--criterion", "masked_lm")


@pytest.fixture
def masked(build):
    """Builds a masked language model for 32 tokens from fairseq-train's options, as it is after loading."""

    def build_model(*arguments, arch="alibi_masked_lm_tiny"):
        model = build(arch, "--tokens-per-sample", 32, *arguments, task="masked_lm")
        for name, parameter in model.named_parameters():
            if "self_attn" in name:
                torch.nn.init.normal_(parameter, std=0.3)  # or attention would be all but even
        model.load_state_dict(copy.deepcopy(model.state_dict()))
        return model

    return build_model


def norms(before):
    """Options for norms in front of the parts of a layer, or behind them."""
    sizes = (
        "--encoder-layers=2",
        "--encoder-embed-dim=32",
        "--encoder-ffn-embed-dim=64",
        "--encoder-attention-heads=4",
    )
    return (*sizes, "--encoder-normalize-before") if before else sizes


def expected_bias(model, length):
    """The reference bias for what a model's options say."""
    method, heads = model.encoder.sentence_encoder.position_method, model.args.encoder_attention_heads
    if model.args.position_method != "alibi":
        return torch.zeros(heads, length, length, dtype=torch.float64)
    if not model.args.alibi_learned_slopes:
        return reference.encoder_bias(heads, length, model.args.alibi_encoder_bias)
    left, right = (1 / (1 + torch.exp(-method.slope_logits.double()))).tolist()
    return reference.encoder_bias(heads, length, "two_slopes", left, right)


@pytest.mark.parametrize("attention", ["mask", "auto"])
@pytest.mark.parametrize("length", [1, 300])
@pytest.mark.parametrize("before", [True, False], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("options", [*FORMS, ("--position-method=rotary",), ("--position-method=none",)])
def test_logits_equal_a_float64_reference_model(masked, options, before, length, attention):
    """At 300 tokens `auto` takes no mask for ALiBi."""
    model = masked(*options, *norms(before), "--attention", attention, arch="alibi_masked_lm")
    tokens = torch.randint(4, 40, (1, length))
    with torch.no_grad():
        (logits,), _ = model(tokens)
    wanted = reference.masked_lm_logits(model, tokens[0], expected_bias(model, length))
    torch.testing.assert_close(logits.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("before", [True, False], ids=["pre-norm", "post-norm"])
def test_learned_positions_are_fairseqs_roberta(masked, build, before):
    """Same parameters, same initial values, same numbers; without the second copy of the weights."""
    arguments = ("--tokens-per-sample", 32, *norms(before))
    theirs = build("roberta", *arguments, task="masked_lm")
    ours = build("alibi_masked_lm", "--position-method", "learned", *arguments, task="masked_lm")
    copies = ("in_proj", "out_proj_", "fc1_", "fc2_")
    weights = {
        name: value
        for name, value in theirs.state_dict().items()
        if not name.rpartition("layers.")[2].partition(".")[2].startswith(copies)
    }
    assert ours.state_dict().keys() == weights.keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, weights[name]), name
    tokens = torch.randint(4, 40, (3, 32))
    tokens[1, 20:] = ours.encoder.dictionary.pad()
    real = tokens != ours.encoder.dictionary.pad()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens)[0][real], theirs(tokens)[0][real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [*FORMS, *FUSED, ("--position-method=sinusoidal",)])
def test_padding_on_either_side_changes_nothing(masked, options):
    model = masked(*options)
    tokens, pad = torch.randint(4, 40, (1, 40)), model.encoder.dictionary.pad()
    padding = torch.full((1, 9), pad)
    with torch.no_grad():
        alone = model(tokens)[0][0]
        right = model(torch.cat([torch.cat([tokens, padding], 1), torch.randint(4, 40, (1, 49))]))[0][0, :40]
        left = model(torch.cat([torch.cat([padding, tokens], 1), torch.randint(4, 40, (1, 49))]))[0][0, 9:]
    torch.testing.assert_close(right, alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(left, alone, rtol=1e-4, atol=1e-5)


def test_every_parameter_learns_with_checkpoints_of_activations_and_without_a_mask_too(masked):
    tokens = torch.randint(4, 40, (2, 50))
    tokens[1, 30:] = 1
    gradients = []
    again = "--checkpoint-activations"
    for more in ((), (again,), ("--attention=fused",), (again, "--attention=fused")):
        model = masked(*LEARNED, *more, "--dropout=0", "--attention-dropout=0").train()
        torch.manual_seed(1)
        weights = torch.randn(2, 50, len(model.encoder.dictionary))
        (model(tokens)[0] * weights).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert name.endswith("k_proj.bias") or expected.abs().max() > 1e-3, name  # softmax ignores a bias of all keys
        for others in gradients[1:]:
            torch.testing.assert_close(others[name], expected, rtol=1e-3, atol=1e-3, msg=name)


def test_a_copy_has_a_bias_of_its_own(masked):
    """As fairseq's moving average of the weights is one."""
    model = masked(*LEARNED)
    tokens = torch.randint(4, 40, (1, 20))
    model(tokens)[0].sum().backward()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = model(tokens)[0]
        copied.encoder.sentence_encoder.position_method.slope_logits += 1
        assert (copied(tokens)[0] - before).abs().max() > 1e-3
        assert torch.equal(model(tokens)[0], before)


def test_any_length_unless_there_is_a_table(masked):
    assert masked().max_positions() > 10**9
    assert masked("--position-method", "sinusoidal").max_positions() > 10**9
    assert masked("--position-method", "learned").max_positions() == 32
    assert masked("--max-positions", 64).max_positions() == 64
    assert [name for name in masked().state_dict() if "embed_positions" in name] == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ["--alibi-encoder-bias", "two_slopes", "--position-method", "none"],
            "bias two_slopes is for",
        ),
        ([*LEARNED, "--position-method", "rotary"], "is for --position-method alibi, not rotary"),
        (["--alibi-learned-slopes"], "two_slopes, not symmetric"),
        (
            ["--alibi-encoder-bias", "one_sided", "--encoder-attention-heads", 3, "--encoder-embed-dim", 96],
            "even number of heads, not 3",
        ),
        (["--alibi-max-bias", -1], "not -1"),
        (
            ["--position-method", "none", "--attention", "fused"],
            "--attention fused: an encoder with --position-method none needs a mask",
        ),
        (["--mha-heads-to-keep", 2], "--mha-heads-to-keep"),
        (["--quant-noise-scalar", 0.1], "--quant-noise-scalar"),
    ],
)
def test_options_that_contradict_each_other_are_refused(masked, arguments, named):
    with pytest.raises(ValueError, match=named) as refused:
        masked(*arguments)
    assert "\n" not in str(refused.value)


def test_t5_has_no_buckets_for_what_comes_after(masked, capsys):
    assert "t5" not in position_methods("encoder")
    with pytest.raises(SystemExit):
        masked("--position-method", "t5")
    assert "invalid choice: 't5'" in capsys.readouterr().err


@pytest.fixture(scope="session")
def masked_checkpoint(train):
    """A masked language model of 32 tokens, trained for a few updates."""
    return train(*TASK, *LEARNED, "--disable-validation", arch="alibi_masked_lm_tiny", updates=20)


def evaluate(*arguments):
    """Runs `fairseq-alibi evaluate` in this process."""
    main(["evaluate", *map(str, arguments), "--cpu"])


def load(path, **options):
    """The model of a checkpoint as fairseq loads it, and its task."""
    from fairseq import checkpoint_utils

    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(path)], **options)
    return model.eval(), task


def bits(logits, targets):
    """Loss of each target, (n, V) and (n,) -> (n,) float64, bits."""
    return -logits.double().log_softmax(-1)[torch.arange(len(targets)), targets] / math.log(2)


def test_evaluation_is_the_loss_of_the_same_masked_tokens_at_any_length(corpus, masked_checkpoint, tmp_path, capsys):
    """Each block is computed here one by one, from the logits of all of its positions."""
    output = ("--output", tmp_path / "results", "--max-tokens", 300)
    evaluate(corpus, masked_checkpoint, "--lengths", "32,128", *output, "--save-token-losses", tmp_path / "losses.npz")
    (path,) = (tmp_path / "results").glob("*.json")
    content = json.loads(path.read_text())
    stream = read_subset(str(corpus), "valid").long()
    masked = masked_tokens(len(stream))
    count = round(0.15 * len(stream))
    assert int(masked.sum()) == count
    assert content["model"]["position_method"] == "alibi two_slopes learned"
    model, task = load(masked_checkpoint)
    assert model.encoder.sentence_encoder.position_method.slope_logits.requires_grad
    for result, length in zip(content["results"], (32, 128)):
        assert (result["length"], result["tokens"], result["of_tokens"]) == (length, count, len(stream))
        found = torch.from_numpy(numpy.load(tmp_path / "losses.npz")[f"length {length}, stride {length}"])
        assert torch.equal(found.isnan(), ~masked)
        total = 0.0
        for first in range(0, len(stream), length - 1):
            here = slice(first, first + length - 1)
            block = torch.where(masked[here], task.mask_idx, stream[here])
            with torch.no_grad():
                logits = model(torch.cat([torch.tensor([task.dictionary.bos()]), block])[None])[0][0, 1:]
            wanted = bits(logits[masked[here]], stream[here][masked[here]])
            torch.testing.assert_close(found[here][masked[here]].double(), wanted, rtol=1e-4, atol=1e-4)
            total += wanted.sum().item()
        assert result["loss"] == pytest.approx(total / count, abs=1e-4)
        assert result["perplexity"] == pytest.approx(2 ** (total / count), rel=1e-3)
    shown = capsys.readouterr().out
    assert f"{count:,} masked ones of the {len(stream):,} tokens of valid" in shown
    main(["report", str(path), "--output", str(tmp_path / "report")])
    table = (tmp_path / "report" / "report.md").read_text()
    assert "alibi two_slopes learned, trained on 32" in table
    assert f"{content['results'][1]['perplexity']:.2f}" in table


def test_slopes_divided_for_the_length_are_those_of_a_model_with_such_slopes(corpus, masked_checkpoint, tmp_path):
    losses = []
    for scale in ("auto", 4, 1):
        folder = tmp_path / str(scale)
        override = ("--model-overrides", str({"alibi_length_scale": scale}))
        evaluate(corpus, masked_checkpoint, "--lengths", 128, *override, "--output", folder)
        (path,) = folder.glob("*.json")
        losses.append(json.loads(path.read_text())["results"][0]["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_fairseqs_own_validation_works_unmodified(corpus, masked_checkpoint):
    """Its loss is that of the logits at the tokens that fairseq itself masks."""
    command = [corpus, "--user-dir", "fairseq_alibi", "--task", "masked_lm", "--path", masked_checkpoint, "--cpu"]
    output = run(BIN / "fairseq-validate", *command, "--valid-subset", "valid", "--max-tokens", 512).output
    model, task = load(masked_checkpoint)
    task.load_dataset("valid")
    dataset, total, count = task.dataset("valid"), 0.0, 0
    dataset.set_epoch(1)  # fairseq masks other tokens in each
    for n in range(len(dataset)):
        sample = dataset.collater([dataset[n]])
        targets = sample["target"][0]
        scored = targets != task.dictionary.pad()
        with torch.no_grad():
            logits = model(**sample["net_input"])[0][0]
        total += bits(logits[scored], targets[scored]).sum().item()
        count += int(scored.sum())
    assert float(output.split("| loss ")[1].split(" ")[0]) == pytest.approx(total / count, abs=6e-4)


def test_hub_interface_reads_any_length(corpus, masked_checkpoint):
    from fairseq_alibi.models.masked_model import AlibiMaskedLanguageModel

    folder, name = masked_checkpoint.parent, masked_checkpoint.name
    hub = AlibiMaskedLanguageModel.from_pretrained(str(folder), name, data_name_or_path=str(corpus), bpe=None).eval()
    tokens = torch.randint(4, 40, (1, 500))
    wanted = load(masked_checkpoint)[0](tokens, features_only=True)[0]
    torch.testing.assert_close(hub.extract_features(tokens), wanted)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--lengths", 64, "--streaming"], "reads what is after a token too"),
        (["--lengths", 64, "--stride", 32], "reads what is after a token too"),
        (["--lengths", 64, "--by-position"], "reads what is after a token too"),
        (["--lengths", 1], "at least 2"),
        (["--lengths", 64, "--model-overrides", "{'max_positions': 48}"], "longest sequence, 48"),
        (["--model-overrides", "{'decoder_bias': 1}"], "'decoder_bias'"),
    ],
)
def test_what_a_masked_model_does_not_have_is_refused(corpus, masked_checkpoint, tmp_path, capsys, arguments, named):
    line = failure(capsys, main, "evaluate", corpus, masked_checkpoint, *arguments, "--output", tmp_path, "--cpu")
    assert named in line
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_dictionary_is_named(corpus, masked_checkpoint, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for path in corpus.glob("valid.*"):
        (data / path.name).write_bytes(path.read_bytes())
    (data / "dict.txt").write_text((corpus / "dict.txt").read_text() + "another 1\n")
    assert "was trained with" in failure(capsys, main, "evaluate", data, masked_checkpoint, "--cpu")
