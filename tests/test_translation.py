"""The model `alibi_transformer`: against a float64 reference, step by step, through beam search, its options."""

import argparse
import importlib.util

import pytest
import reference
import torch
from conftest import BIN, ROOT, run, training_config

from fairseq_alibi.core import position_methods
from fairseq_alibi.core.alibi import ENCODER_FORMS

#: All that can tell positions: methods, and forms of ALiBi in the encoder.
WAYS = {name: ["--position-method", name] for name in position_methods("encoder") if name != "alibi"}
WAYS.update({form: ["--alibi-encoder-bias", form] for form in ENCODER_FORMS})

SIZES = ["--encoder-embed-dim", 64, "--encoder-ffn-embed-dim", 96]
TWELVE_HEADS = ["--encoder-embed-dim", 96, "--encoder-attention-heads", 12, "--decoder-attention-heads", 12]
PRE_NORM = ["--encoder-normalize-before", "--decoder-normalize-before"]


@pytest.fixture(scope="module")
def strings():
    """The module of the example."""
    path = ROOT / "examples" / "sequence_to_sequence" / "strings.py"
    spec = importlib.util.spec_from_file_location("strings", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pairs(strings, tmp_path_factory):
    """A fairseq data folder: strings to 16 tokens and their reverse; the test strings have 3 to 1,500."""
    from fairseq import options
    from fairseq_cli import preprocess

    folder = tmp_path_factory.mktemp("pairs")
    splits = {"train": (range(1, 17), 320), "valid": (range(1, 17), 16), "test": ((3, 5, 40, 64), 8)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strings, "SPLITS", splits)
        strings.make("reverse", folder)
    for side in ("source", "target"):
        with (folder / f"test.{side}").open("a") as lines:
            lines.write("01 02 03 " * 500 + "\n")
    arguments = ["--source-lang", "source", "--target-lang", "target", "--joined-dictionary"]
    arguments += [part for split in splits for part in (f"--{split}pref", folder / split)]
    arguments += ["--destdir", folder / "data"]
    preprocess.main(options.get_preprocessing_parser().parse_args([str(part) for part in arguments]))
    return folder / "data"


@pytest.fixture(scope="module")
def build(pairs):
    """Builds a model and its task from fairseq-train's options."""
    from fairseq import tasks

    def build_model(*arguments, arch="alibi_transformer_tiny"):
        cfg = training_config(pairs, "--arch", arch, *SIZES, *arguments)
        task = tasks.setup_task(cfg.task)
        torch.manual_seed(1)
        model = task.build_model(cfg.model).eval()
        for name, parameter in model.named_parameters():
            if "_attn." in name and parameter.dim() == 2:
                parameter.data.mul_(2.5)  # attention depends strongly on what it sees, which training would bring about
        return model, task

    return build_model


def collate(task, lengths, left_pad_source=True):
    """A batch of pairs as fairseq makes it: source and target of each, and what the model reads."""
    from fairseq.data.data_utils import collate_tokens

    words, (pad, eos) = len(task.source_dictionary), (task.source_dictionary.pad(), task.source_dictionary.eos())

    def sentence(length):
        return torch.cat([torch.randint(4, words, (length,)), torch.tensor([eos])])

    sources, targets = ([sentence(length) for length in side] for side in zip(*lengths))
    source = collate_tokens(sources, pad, left_pad=left_pad_source)
    read = collate_tokens(targets, pad, eos, move_eos_to_beginning=True)
    return sources, targets, {"src_tokens": source, "src_lengths": None, "prev_output_tokens": read}


@torch.no_grad()
def expected_logits(model, source, target, way):
    """See `reference.translation_logits`; the target begins with eos in the place of ending with it."""
    return reference.translation_logits(model, source, target.roll(1), way)


@pytest.mark.parametrize("sizes", [[], [*TWELVE_HEADS, *PRE_NORM]], ids=["post-norm", "12 heads, pre-norm"])
@pytest.mark.parametrize("way", WAYS)
def test_logits_equal_a_float64_reference_at_any_length_and_padding(build, way, sizes):
    model, task = build(*WAYS[way], *sizes)
    for left_pad_source in (True, False):
        sources, targets, batch = collate(task, [(300, 3), (7, 280), (1, 9)], left_pad_source)
        with torch.no_grad():
            logits, _ = model(**batch)
        for row, source, target in zip(logits.double(), sources, targets):
            expected = expected_logits(model, source, target, way)
            torch.testing.assert_close(row[: len(target)], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_step_by_step_equals_the_reference(build, way):
    """Pieces of one token and of many; the keys of the source are made once."""
    model, task = build(*WAYS[way])
    sources, targets, batch = collate(task, [(40, 30), (7, 30)])
    made = []
    model.decoder.layers[1].encoder_attn.k_proj.register_forward_hook(lambda *_: made.append(1))
    with torch.no_grad():
        encoder_out = model.encoder(batch["src_tokens"])
        state, read, steps = {}, 0, {}
        for piece in (1, 1, 10, 1, 1, 16, 1):
            read += piece
            tokens = batch["prev_output_tokens"][:, :read]
            steps[read] = model.decoder(tokens, encoder_out=encoder_out, incremental_state=state)[0]
    assert len(made) == 1
    for i, (source, target) in enumerate(zip(sources, targets)):
        expected = expected_logits(model, source, target, way)
        for read, logits in steps.items():
            assert logits.shape[1] == 1
            torch.testing.assert_close(logits[i, 0].double(), expected[read - 1], rtol=1e-3, atol=1e-4)


def forced_scores(model, source, tokens):
    """Log-probability of each token of a target with its end, all of them read at once."""
    batch = {"src_tokens": source[None], "src_lengths": None, "prev_output_tokens": tokens.roll(1)[None]}
    with torch.no_grad():
        return model(**batch)[0][0].log_softmax(-1).gather(1, tokens[:, None])[:, 0]


@pytest.mark.parametrize("way", ["symmetric", "one_sided"])
def test_scores_of_beam_search_are_those_of_teacher_forcing(build, way):
    """Sentences of different lengths, whose hypotheses end at different steps, and so leave the batch; prefixes."""
    model, task = build(*WAYS[way])
    with torch.no_grad():  # or no sentence would end
        model.decoder.embed_tokens.weight[task.target_dictionary.eos()] *= 5
    steps = set()
    for beam, prefix in ((1, 0), (4, 0), (1, 3), (4, 3)):
        torch.manual_seed(1)
        sources, targets, batch = collate(task, [(40, 5), (3, 5), (17, 5), (1, 5)])
        generator = task.build_generator([model], argparse.Namespace(beam=beam, max_len_a=0, max_len_b=60))
        forced = torch.stack([target[:prefix] for target in targets]) if prefix else None
        found = generator.generate([model], {"net_input": batch}, prefix_tokens=forced)
        for source, target, hypotheses in zip(sources, targets, found):
            assert len(hypotheses) == beam
            for hypothesis in hypotheses:
                tokens = hypothesis["tokens"]
                assert tokens[:prefix].equal(target[:prefix])
                expected = forced_scores(model, source, tokens)
                torch.testing.assert_close(hypothesis["positional_scores"], expected, rtol=0, atol=1e-4)
            steps.add(max(len(hypothesis["tokens"]) for hypothesis in hypotheses))
    assert len(steps) > 1
    assert max(steps) == 61


def test_trains_and_translates_what_is_longer_without_overrides(pairs, tmp_path):
    """fairseq-generate on sources up to 1,501 tokens, 16 trained; the scores it prints are those of teacher forcing."""
    from fairseq import checkpoint_utils

    options = ["--user-dir", "fairseq_alibi", "--cpu", "--num-workers", 0]
    command = [BIN / "fairseq-train", pairs, *options, "--arch", "alibi_transformer_tiny", "--save-dir", tmp_path]
    command += ["--share-all-embeddings", "--optimizer", "adam", "--lr", 0.003, "--max-tokens", 512, "--max-update", 8]
    command += ["--criterion", "label_smoothed_cross_entropy", "--ddp-backend", "fully_sharded"]
    run(*command, *SIZES, "--no-epoch-checkpoints")
    checkpoint = tmp_path / "checkpoint_last.pt"
    options += ["--path", checkpoint, "--beam", 4, "--max-len-b", 70, "--max-tokens", 4096, "--print-alignment"]
    output = run(BIN / "fairseq-generate", pairs, *options).output
    lines = {line.split("\t")[0]: line.split("\t")[1:] for line in output.splitlines()}
    (model,), _, task = checkpoint_utils.load_model_ensemble_and_task([str(checkpoint)])
    model.eval()
    seen = set()
    for number in range(9):
        source = task.source_dictionary.encode_line(lines[f"S-{number}"][0], add_if_not_exist=False).long()
        tokens = task.target_dictionary.encode_line(lines[f"H-{number}"][1], add_if_not_exist=False).long()
        printed = torch.tensor([float(score) for score in lines[f"P-{number}"][0].split()])
        expected = forced_scores(model, source, tokens) / torch.log(torch.tensor(2.0))
        torch.testing.assert_close(printed, expected, rtol=0, atol=2e-4)
        seen.add(len(source))
        assert f"A-{number}" in lines
    assert seen == {4, 6, 41, 65, 1501}


@pytest.mark.slow
def test_same_seed_gives_the_parameters_of_fairseqs_transformer(build):
    layers = ["--encoder-layers", 2, "--decoder-layers", 2]
    expected = dict(build(*layers, arch="transformer_iwslt_de_en")[0].named_parameters())
    for way in ("symmetric", "one_sided", "sinusoidal", "rotary"):
        parameters = dict(build(*layers, *WAYS[way], arch="alibi_transformer_iwslt_de_en")[0].named_parameters())
        assert all(value.equal(expected[name]) for name, value in parameters.items())
        copies = {name for name in expected if name.endswith(("_weight", "_bias"))}  # for the kernel of its encoder
        assert set(expected) - set(parameters) == copies


def test_learned_slopes_get_gradients_that_checkpointed_activations_do_not_change(build):
    gradients = []
    for options in ([], ["--checkpoint-activations"]):
        model, task = build("--alibi-encoder-bias", "two_slopes", "--alibi-learned-slopes", "--dropout", 0, *options)
        torch.manual_seed(0)
        model.train()(**collate(task, [(20, 9), (5, 12)])[2])[0].logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0]["encoder.position_method.slope_logits"].ne(0).all()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_no_limit_of_lengths_unless_given(build):
    from fairseq.utils import resolve_max_positions

    def limits(*arguments):
        model, task = build(*arguments)
        return resolve_max_positions(task.max_positions(), model.max_positions())

    assert min(limits()) > 10**9
    assert limits("--max-source-positions", 1024, "--max-target-positions", 30) == (1024, 30)
    assert limits("--position-method", "learned", "--max-source-positions", 50) == (50, 1024)
    assert min(limits("--position-method", "sinusoidal")) > 10**9, "its table grows with the length"


@pytest.mark.parametrize("name", ["transformer", "transformer_iwslt_de_en", "transformer_wmt_en_de_big"])
def test_sizes_of_the_architectures_are_fairseqs(name):
    from fairseq.models import ARCH_CONFIG_REGISTRY

    import fairseq_alibi  # noqa: F401

    ours, theirs = argparse.Namespace(), argparse.Namespace()
    ARCH_CONFIG_REGISTRY[f"alibi_{name}"](ours)
    ARCH_CONFIG_REGISTRY[name](theirs)
    assert ours == theirs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cross-self-attention"], "--cross-self-attention: source and target have no distance"),
        (["--alibi-length-scale", "auto"], "--alibi-length-scale auto: .* pass a number"),
        (["--position-method", "rotary", "--rotary-scaling", "yarn"], "--rotary-scaling yarn: .* no training length"),
        (["--alibi-learned-slopes"], "learned slopes are for alibi_encoder_bias two_slopes, not symmetric"),
        (["--alibi-encoder-bias", "one_sided", "--position-method", "none"], "--alibi-encoder-bias one_sided is for"),
        (["--encoder-learned-pos"], "--encoder-learned-pos: drop it; alibi is the position method"),
        (["--decoder-learned-pos"], "--decoder-learned-pos: drop it; alibi is the position method"),
        (["--no-token-positional-embeddings", "--position-method", "sinusoidal"], "contradicts --position-method"),
        (["--encoder-xformers-att-config", "{}"], "--encoder-xformers-att-config: xFormers"),
        (["--attention-epsilon", 1], "--attention-epsilon must be at least 0"),
    ],
)
def test_contradictory_options_are_refused_in_a_line(build, arguments, message):
    with pytest.raises(ValueError, match=message) as refused:
        build(*arguments)
    assert "\n" not in str(refused.value)


def test_t5_is_refused(build, capsys):
    with pytest.raises(SystemExit):
        build("--position-method", "t5")
    assert "argument --position-method: invalid choice: 't5'" in capsys.readouterr().err


def test_strings_are_the_same_each_time_and_in_order(strings, tmp_path, monkeypatch):
    monkeypatch.setattr(strings, "SPLITS", {"test": ((3, 5), 40)})
    for task, ordered in (("reverse", lambda words: words[::-1]), ("sort", sorted)):
        for again in "12":
            strings.make(task, tmp_path / again)
        source, target = ((tmp_path / "1" / f"test.{side}").read_text() for side in ("source", "target"))
        assert source == (tmp_path / "2" / "test.source").read_text()
        for line, translated in zip(source.splitlines(), target.splitlines()):
            words = line.split()
            assert len(set(words)) == len(words) in (3, 5)
            assert translated.split() == ordered(words)


def test_accuracy_counts_strings_and_tokens_by_length(strings):
    generated = [
        "T-0\t01 02",
        "H-0\t-0.1\t01 02",
        "T-1\t03 04",
        "H-1\t-0.1\t03 03 04",
        "S-2\t05",
        "T-2\t05",
        "H-2\t-9\t",
    ]
    assert strings.accuracy(generated) == [(1, 0.0, 0.0), (2, 0.5, 0.75)]
