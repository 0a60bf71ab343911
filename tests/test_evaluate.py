"""`fairseq-alibi evaluate` against fairseq-eval-lm and against scores computed by hand."""

import json
import math
import shutil
import signal

import numpy
import pytest
import torch
from conftest import BIN, failure, fairseqs_own, run
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from tensorboardX.proto.event_pb2 import Event

from fairseq_alibi.__main__ import main
from fairseq_alibi.evaluation import checkpoint_evaluation
from fairseq_alibi.evaluation.curves import read_curves
from fairseq_alibi.evaluation.measurement import Windowing, position_bins
from fairseq_alibi.evaluation.result_files import TokenLossFile, evaluation_subject
from fairseq_alibi.evaluation.text import EvaluationText, read_evaluation_text
from fairseq_alibi.files.data_folders import read_dictionary, read_subset

ADAPTIVE = (
    *("--adaptive-input", "--adaptive-input-cutoff", "10,20", "--adaptive-softmax-cutoff", "10,20"),
    *("--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp", "--tie-adaptive-weights"),
    *(
        "--decoder-normalize-before",
        "--decoder-layers",
        2,
        "--decoder-embed-dim",
        64,
        "--decoder-input-dim",
        64,
        "--decoder-output-dim",
        64,
    ),
)

NAMES = ("embed", "input", "output")


def command(*arguments):
    """Runs `fairseq-alibi evaluate` in this process."""
    main(["evaluate", *(str(part) for part in arguments), "--cpu"])


def results(folder):
    """Of the one file in a folder: its results by length and stride."""
    (path,) = folder.glob("*.json")
    return {(one["length"], one["stride"]): one for one in json.loads(path.read_text())["results"]}


def fails(capsys, *arguments):
    """Runs the command; returns its one line."""
    return failure(capsys, main, "evaluate", *arguments, "--cpu")


@pytest.fixture(scope="session")
def bpe_corpus(corpus, tmp_path_factory):
    """The corpus, in which every third word is called the first part of another."""
    folder = tmp_path_factory.mktemp("bpe") / "data"
    shutil.copytree(corpus, folder)
    lines = (corpus / "dict.txt").read_text().splitlines()
    marked = [line.replace(" ", "@@ ", 1) if n % 3 == 0 else line for n, line in enumerate(lines)]
    (folder / "dict.txt").write_text("\n".join(marked) + "\n")
    return folder


@pytest.fixture(scope="session")
def bpe_checkpoint(bpe_corpus, checkpoint, tmp_path_factory):
    """A checkpoint that was trained on `bpe_corpus`, for all that it knows."""
    state = torch.load(checkpoint)
    state["cfg"]["task"]["data"] = str(bpe_corpus)
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint_last.pt"
    torch.save(state, path)
    return path


@pytest.mark.parametrize("kind", ["plain", "adaptive", pytest.param("transformer_lm", marks=pytest.mark.slow)])
def test_loss_is_that_of_fairseq_eval_lm(corpus, checkpoint, sharpened, tmp_path, kind):
    if kind == "adaptive":
        checkpoint = sharpened(*ADAPTIVE, arch="alibi_lm")
    if kind == "transformer_lm":
        sizes = ("--decoder-normalize-before", "--decoder-layers", 1, *(f"--decoder-{n}-dim=64" for n in NAMES))
        checkpoint = sharpened(*sizes, "--decoder-attention-heads", 4, arch="transformer_lm")
    longest = 32 if kind == "transformer_lm" else 200  # fairseq's own model is limited to what it was trained on
    command(corpus, checkpoint, "--lengths", f"16,{longest}", "--output", tmp_path)
    command(corpus, checkpoint, "--lengths", 32, "--stride", 12, "--output", tmp_path)
    command(corpus, checkpoint, "--lengths", "24,32", "--stride-fraction", "1/4", "--output", tmp_path)
    found = results(tmp_path)
    assert found.keys() == {(16, 16), (longest, longest), (32, 12), (24, 6), (32, 8)}
    # fairseq's command takes seconds to start: one window of each kind tells of the other output layers
    ways = ((longest, longest), (32, 12), (32, 8))
    compared = {way: found[way] for way in (ways if kind == "plain" else ways[:2])}
    for (length, stride), one in compared.items():
        arguments = ("--tokens-per-sample", length, "--context-window", length - stride, "--max-tokens", 300)
        loss, tokens = fairseqs_own(corpus, checkpoint, *arguments)
        assert one["loss"] == pytest.approx(loss, abs=1e-4)
        assert (one["tokens"], one["context_window"]) == (tokens, length - stride)
        assert one["perplexity"] == pytest.approx(2 ** one["loss"])
    assert found[32, 8]["loss"] != pytest.approx(found[16, 16]["loss"], abs=1e-3), "context matters to this model"


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (20, 1)])
def test_words_are_counted_as_remove_bpe_does_and_rightly(bpe_corpus, bpe_checkpoint, tmp_path, length, stride):
    """fairseq's own looks for the marker "subword_nmt", which no type has, unless it is told the right one."""
    command(bpe_corpus, bpe_checkpoint, "--lengths", length, "--stride", stride, "--output", tmp_path, "--remove-bpe")
    one = results(tmp_path)[length, stride]
    arguments = ("--tokens-per-sample", length, "--context-window", length - stride, "--max-tokens", 64)
    assert one["fairseq_remove_bpe_loss"] == pytest.approx(
        fairseqs_own(bpe_corpus, bpe_checkpoint, *arguments, "--remove-bpe", "@@ ")[0], abs=1e-4
    )
    symbols = Dictionary.load(str(bpe_corpus / "dict.txt")).symbols
    text = " ".join(symbols[n] for n in read_subset(str(bpe_corpus), "valid")).replace("@@ ", "")
    assert one["tokenized_words"] == len(text.split(" "))
    word_loss = one["loss"] * one["tokens"] / one["tokenized_words"]
    assert one["tokenized_word_perplexity"] == pytest.approx(2**word_loss)


def test_characters_without_a_record_are_those_of_the_tokenized_text(tmp_path):
    """Lines, an empty one among them, with single spaces and line ends; whatever the parts of the words."""
    dictionary = Dictionary()
    symbols = {"lo@@", "wer", "a", "\u2581low", "\u2581a", "er"}
    for symbol in sorted(symbols):
        dictionary.add_symbol(symbol)

    def text(line, marker):
        stream = dictionary.encode_line(line.replace("\n", " </s> "), append_eos=False, add_if_not_exist=False)
        return EvaluationText(stream, dictionary, marker)

    lines = "a lower a\n\nlower\n"
    by_bpe = text("a lo@@ wer a\n\nlo@@ wer\n", "@@ ")
    assert (by_bpe.tokens, by_bpe.tokenized_words, by_bpe.tokenized_characters) == (9, 7, len(lines))
    by_pieces = text("\u2581a \u2581low er \u2581a\n\n\u2581low er\n", "sentencepiece")
    assert (by_pieces.tokens, by_pieces.tokenized_words, by_pieces.tokenized_characters) == (9, 7, len(lines))
    by_words = text("a a\n\na\n", None)
    assert (by_words.tokens, by_words.tokenized_words, by_words.tokenized_characters) == (6, 6, len("a a\n\na\n"))
    measures = by_bpe.measures(34.0, 3)
    assert measures["bits_per_tokenized_character"] == pytest.approx(34 / len(lines))
    assert measures["tokenized_word_perplexity"] == pytest.approx(2 ** (34 / 7))
    unknown = text("a lo@@ new\n", "@@ ").measures(34.0, 3)
    assert not [name for name in unknown if "word" in name or "character" in name], "nobody knows what <unk> stands for"


def test_measures_divide_by_the_text_as_it_was_given(tmp_path):
    """Not by what the tokenizer made of it: escaped quotes, two spaces, unknown characters, a last line without end."""
    valid = 'a "b"  c\u00e9-d\n\n\u0e01\u0e32 a\u0301 <b> zz'
    for split, text in (("train", 'a "b" c-d a b\n' * 40), ("valid", valid), ("test", "a\n")):
        (tmp_path / f"{split}.txt").write_text(text)
    texts = [part for split in ("train", "valid", "test") for part in (f"--{split}", str(tmp_path / f"{split}.txt"))]
    main(["prepare-text", str(tmp_path / "data"), *texts, "--bpe-merges", "3", "--workers", "1"])
    read = read_evaluation_text(str(tmp_path / "data"), "valid", "@@ ")
    assert read.unknown
    measures = read.measures(100.0, 3)
    assert measures["bits_per_character"] == pytest.approx(100 / len(valid))
    assert measures["bits_per_byte"] == pytest.approx(100 / len(valid.encode()))
    assert measures["word_perplexity"] == pytest.approx(2 ** (100 / (len(valid.split()) + 3)))
    state = {"model": {}, "cfg": OmegaConf.create({"model": {}, "task": {"tokens_per_sample": 4}})}
    uncounted = EvaluationText(read.stream, read_dictionary(str(tmp_path / "data")), "@@ ")
    subjects = [evaluation_subject(state, text, {}, "float32", "cpu") for text in (read, uncounted)]
    assert subjects[0]["text"] != subjects[1]["text"], "the same tokens of another text are another evaluation"
    shutil.copy(tmp_path / "data" / "test.idx", tmp_path / "data" / "valid.idx")
    shutil.copy(tmp_path / "data" / "test.bin", tmp_path / "data" / "valid.bin")
    other = read_evaluation_text(str(tmp_path / "data"), "valid", "@@ ")
    assert "bits_per_byte" not in other.measures(100.0, 3), "the record is of another text"


def test_bpe_of_prepared_data_is_known(bpe_corpus, bpe_checkpoint, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(bpe_corpus, data)
    command(data, bpe_checkpoint, "--lengths", 64, "--output", tmp_path / "without")
    (data / "bpe.codes").write_text("#version: 0.2\n")
    command(data, bpe_checkpoint, "--lengths", 64, "--output", tmp_path / "with")
    assert "tokenized_words" not in results(tmp_path / "without")[64, 64]
    assert "tokenized_words" in results(tmp_path / "with")[64, 64]


def test_streaming_is_a_way_of_its_own(corpus, checkpoint, tmp_path, capsys):
    command(corpus, checkpoint, "--lengths", "32,5000", "--streaming", "--output", tmp_path)
    out = capsys.readouterr().out
    command(corpus, checkpoint, "--lengths", "5000", "--output", tmp_path)
    found = results(tmp_path)
    assert found[32, None]["context_window"] is None
    assert found[5000, None]["loss"] == pytest.approx(found[5000, 5000]["loss"], abs=1e-5), "all of the text"
    assert found[32, None]["loss"] != pytest.approx(found[5000, None]["loss"], abs=1e-4)
    assert "streaming" in out.splitlines()[-3]


def test_a_stream_without_a_length_sees_all_of_the_text(corpus, checkpoint, tmp_path):
    command(corpus, checkpoint, "--streaming", "--output", tmp_path)
    command(corpus, checkpoint, "--lengths", "5000", "--output", tmp_path)
    found = results(tmp_path)
    tokens = found[5000, 5000]["tokens"]
    assert found[tokens, None]["loss"] == pytest.approx(found[5000, 5000]["loss"], abs=1e-5)


def test_losses_of_tokens_and_positions_add_up_to_the_loss(corpus, checkpoint, tmp_path):
    file = tmp_path / "losses.npz"
    options = ("--save-token-losses", file, "--output", tmp_path)
    command(corpus, checkpoint, "--lengths", "10,64", *options, "--by-position")
    command(corpus, checkpoint, "--lengths", 64, "--stride", 16, *options, "--by-position")
    found, kept = results(tmp_path), numpy.load(file)
    windowings = {"length 10, stride 10", "length 64, stride 64", "length 64, stride 16"}
    assert set(kept) == {"tokens", "subject", "runs", *windowings}
    assert kept["tokens"].tolist() == read_subset(str(corpus), "valid").tolist()
    for (length, stride), one in found.items():
        losses = kept[f"length {length}, stride {stride}"]
        assert losses.mean() == pytest.approx(one["loss"], rel=1e-5)
        position = numpy.arange(len(losses))
        if stride == length:
            position %= length
        else:
            position = numpy.where(position < 64, position, 48 + position % 16)
        for bucket in one["by_position"]:
            there = losses[(position >= bucket["first"]) & (position <= bucket["last"])]
            assert bucket["tokens"] == len(there) > 0
            assert bucket["loss"] == pytest.approx(there.mean(), rel=1e-4)
        assert sum(bucket["tokens"] for bucket in one["by_position"]) == one["tokens"]
        assert one["by_position"][-1]["last"] == length - 1


def test_bins_of_positions_cover_all_and_get_longer():
    for length in (1, 5, 8, 9, 100, 4096):
        edges = position_bins(length)
        assert edges[: min(length, 8)] == list(range(min(length, 8)))
        assert edges == sorted(set(edges))
        assert edges[-1] < length
    assert [edge for edge in edges if edge >= 1000] == [1024, 1218, 1448, 1722, 2048, 2435, 2896, 3444]


def test_what_is_done_is_not_done_again(corpus, checkpoint, tmp_path, monkeypatch, capsys):
    """An interrupted sweep goes on with the next length; one file takes all ways."""
    scored, original = [], checkpoint_evaluation.evaluate_model

    def interrupted(model, text, way, *rest):
        scored.append(way.length)
        if scored.count(way.length) == 1 and way.length == 64:
            raise KeyboardInterrupt
        if scored.count(way.length) == 1 and way.length == 128:
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            signal.raise_signal(signal.SIGTERM)
        return original(model, text, way, *rest)

    monkeypatch.setattr(checkpoint_evaluation, "evaluate_model", interrupted)
    sweep = (corpus, checkpoint, "--lengths", "16,64,128", "--output", tmp_path)
    for status, done in (("130", {(16, 16)}), ("143", {(16, 16), (64, 64)})):
        assert fails(capsys, *sweep) == status
        assert "evaluate: interrupted; start the same command again, and it continues" in capsys.readouterr().err
        assert results(tmp_path).keys() == done
    command(*sweep)
    assert scored == [16, 64, 64, 128, 128]
    assert results(tmp_path).keys() == {(16, 16), (64, 64), (128, 128)}
    assert "(in " in capsys.readouterr().out
    command(*sweep, "--by-position", "--save-token-losses", tmp_path / "losses.npz")
    assert scored[5:] == [16, 64, 128], "more is wanted of each"
    command(*sweep, "--by-position", "--save-token-losses", tmp_path / "losses.npz")
    assert len(scored) == 8


def test_results_of_something_else_are_neither_lost_nor_mixed(corpus, checkpoint, train, tmp_path, capsys):
    sweep = (corpus, checkpoint, "--lengths", "16", "--output", tmp_path)
    command(*sweep)
    (path,) = tmp_path.glob("*.json")
    before = path.read_text()
    assert "model_overrides" in fails(capsys, *sweep, "--model-overrides", "{'alibi_length_scale': '2'}")
    other = tmp_path / checkpoint.parent.name / checkpoint.name
    other.parent.mkdir()
    shutil.copy(train(updates=3), other)
    message = fails(capsys, corpus, other, "--lengths", 32, "--output", tmp_path)
    assert "weights" in message
    assert "--overwrite" in message
    assert path.read_text() == before
    command(corpus, other, "--lengths", 32, "--output", tmp_path, "--overwrite")
    assert results(tmp_path).keys() == {(32, 32)}
    taken = tmp_path / "taken.npz"
    taken.write_text("mine")
    assert "taken.npz exists" in fails(
        capsys, corpus, other, "--lengths", 32, "--output", tmp_path, "--save-token-losses", taken
    )
    state = torch.load(other, weights_only=False)
    state["cfg"]["model"]["position_method"] = "none"  # which has the same weights
    torch.save(state, other)
    assert "model_options" in fails(capsys, corpus, other, "--lengths", 64, "--output", tmp_path)
    content = json.loads(path.read_text())
    for broken in ({"stride": "1"}, {"loss": "1"}, {"run": "unknown"}):
        path.write_text(json.dumps({**content, "results": [{**content["results"][0], **broken}]}))
        assert "(content)" in fails(capsys, *sweep)
    path.write_text("mine")
    assert "--overwrite" in fails(capsys, *sweep)
    assert path.read_text() == taken.read_text() == "mine"


def test_a_file_of_token_losses_holds_one_evaluation(tmp_path):
    path, stream, windowing = tmp_path / "losses.npz", torch.arange(5), Windowing(4, 4)
    TokenLossFile(path, stream, {"weights": "1", "scale": 8, "x": 1}, False).add(windowing, torch.zeros(5), {})
    assert not TokenLossFile(path, stream, {"x": 1, "weights": "1", "scale": 8.0}, False).lacks(windowing)
    for other in ((stream, {"weights": "2"}), (stream + 1, {"weights": "1"})):
        with pytest.raises(ValueError, match="losses of another evaluation"):
            TokenLossFile(path, *other, False)


def test_results_name_the_model_as_it_was_evaluated(corpus, checkpoint, tmp_path, capsys):
    """Method, options and training length after --model-overrides: in JSON, table, report and TensorBoard's folder."""
    override = "{'position_method': 'none', 'decoder_layerdrop': 0.5, 'tokens_per_sample': 48}"
    options = ("--lengths", 32, "--model-overrides", override)
    command(corpus, checkpoint, *options, "--output", tmp_path / "a", "--tensorboard-logdir", tmp_path / "log")
    assert "none, trained on 48 tokens, with decoder_layerdrop=0.5, evaluated on" in capsys.readouterr().out
    command(corpus, checkpoint, "--lengths", 32, "--output", tmp_path / "b", "--tensorboard-logdir", tmp_path / "log")
    (path,) = (tmp_path / "a").iterdir()
    model = json.loads(path.read_text())["model"]
    assert (model["position_method"], model["training_length"]) == ("none", 48)
    arguments = ("eval-lm", "nonoverlapping", corpus, checkpoint, 32, "--output", tmp_path / "c" / "lm.json")
    main([*map(str, arguments), "--", "--cpu", "--model-overrides", override])
    assert "none, trained on 48 tokens, with decoder_layerdrop=0.5, evaluated on" in capsys.readouterr().out
    model = json.loads((tmp_path / "c" / "lm.json").read_text())["model"]
    assert (model["position_method"], model["training_length"]) == ("none", 48)
    labels = [curve.label for curve in read_curves([path, *(tmp_path / "b").iterdir(), tmp_path / "c" / "lm.json"])]
    assert labels[:2] == ["none, trained on 48, decoder_layerdrop=0.5", "alibi, trained on 32"]
    runs = sorted(folder.name for folder in (tmp_path / "log").iterdir())
    assert len(runs) == 2
    assert any("position_method=none" in name for name in runs)


def test_every_number_names_the_run_that_made_it(corpus, checkpoint, train, tmp_path, capsys):
    """Results that a second command adds, and losses of tokens; another model's are not added."""
    losses, output = tmp_path / "losses.npz", tmp_path / "results"
    for options in (("--lengths", 16), ("--lengths", "16,64", "--max-tokens", 777)):
        command(corpus, checkpoint, *options, "--output", output, "--save-token-losses", losses)
    (path,) = output.iterdir()
    content = json.loads(path.read_text())
    made_by = {result["length"]: content["runs"][result["run"]] for result in content["results"]}
    assert {length: run["max_tokens"] for length, run in made_by.items()} == {16: 4096, 64: 777}
    assert made_by[16]["environment"]["torch"] == torch.__version__
    assert "CPU" in made_by[64]["environment"]["device"]
    command(corpus, checkpoint, "--lengths", 64, "--output", output, "--overwrite")
    assert len(json.loads(path.read_text())["runs"]) == 1
    other = ("--lengths", 32, "--output", tmp_path / "other", "--save-token-losses", losses)
    for change in ((checkpoint, "--dtype", "bfloat16"), (train(updates=3),)):
        assert "losses of another evaluation" in fails(capsys, corpus, *change, *other)
    arrays = numpy.load(losses)
    assert json.loads(str(arrays["runs"])) == {f"length {n}, stride {n}": run for n, run in made_by.items()}


def test_tensorboard_shows_an_evaluation_once_and_apart_from_others(corpus, checkpoint, train, tmp_path):
    """The whole of it after a second command; a model of equal name is not joined to it."""
    log = ("--tensorboard-logdir", tmp_path / "log")
    for options in (("--lengths", 64), ("--lengths", "16,32", "--stride-fraction", "1/2")):
        command(corpus, checkpoint, *options, *log, "--output", tmp_path / "results")
    (file,) = tmp_path.rglob("*tfevents*")
    record, points, texts = file.read_bytes(), [], []
    while record:  # its length, 8 bytes, and a checksum of 4 before it and behind it
        size = int.from_bytes(record[:8], "little")
        values = Event.FromString(record[12 : 12 + size])
        points += [(value.tag, values.step) for value in values.summary.value if "perplexity" in value.tag]
        texts += [value.tensor.string_val[0].decode() for value in values.summary.value if value.tensor.string_val]
        record = record[16 + size :]
    half = "valid/perplexity/stride_1-2_of_the_length"
    assert points == [(half, 16), (half, 32), ("valid/perplexity/non-overlapping", 64)]
    (content,) = (json.loads(path.read_text()) for path in (tmp_path / "results").iterdir())
    assert [json.loads(text.strip("`json\n")) for text in texts] == [content]
    other = tmp_path / checkpoint.parent.name / checkpoint.name
    other.parent.mkdir()
    shutil.copy(train(updates=3), other)
    command(corpus, other, "--lengths", 16, *log, "--output", tmp_path / "more")
    assert len(list((tmp_path / "log").iterdir())) == 2
    assert len(list(tmp_path.rglob("*tfevents*"))) == 2


def test_overrides_change_the_model(corpus, checkpoint, tmp_path):
    for name, override in (
        ("plain", "{}"),
        ("scaled", "{'alibi_length_scale': '1e-6'}"),
        ("mask", "{'attention': 'mask'}"),
    ):
        command(corpus, checkpoint, "--lengths", 64, "--output", tmp_path / name, "--model-overrides", override)
    plain, scaled, mask = (results(tmp_path / name)[64, 64]["loss"] for name in ("plain", "scaled", "mask"))
    assert scaled != pytest.approx(plain, abs=1e-4)
    assert mask == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gives_nearly_the_same(corpus, checkpoint, tmp_path, dtype):
    command(corpus, checkpoint, "--lengths", 64, "--output", tmp_path / "float32")
    command(corpus, checkpoint, "--lengths", 64, "--output", tmp_path / dtype, "--dtype", dtype)
    exact, half = (results(tmp_path / name)[64, 64]["loss"] for name in ("float32", dtype))
    assert half == pytest.approx(exact, abs=0.1)
    assert half != exact


def test_a_batch_of_any_size_gives_the_same(corpus, checkpoint, tmp_path):
    for tokens in (1, 100, 100_000):
        command(
            corpus,
            checkpoint,
            "--lengths",
            24,
            "--stride",
            8,
            "--max-tokens",
            tokens,
            "--output",
            tmp_path / str(tokens),
        )
    losses = [results(tmp_path / str(tokens))[24, 8]["loss"] for tokens in (1, 100, 100_000)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


def test_the_command_is_calm_and_describes_its_results(corpus, checkpoint, sharpened, tmp_path):
    other = sharpened("--position-method", "none")
    log = tmp_path / "tensorboard"
    done = run(
        *(BIN / "fairseq-alibi", "evaluate", corpus, checkpoint, other, "--lengths", "32,64", "--cpu"),
        *("--tensorboard-logdir", log, "--output", tmp_path / "new" / "folder"),
    )
    assert "Warning" not in done.output
    assert "INFO" not in done.output
    files = sorted((tmp_path / "new" / "folder").iterdir())
    assert len(files) == 2
    assert all(path.suffix == ".json" for path in files)
    contents = {
        content["model"]["position_method"]: content
        for content in map(json.loads, map(type(files[0]).read_text, files))
    }
    assert contents.keys() == {"alibi", "none"}
    content = contents["alibi"]
    assert content["model"]["training_length"] == 32
    (run_of_results,) = content["runs"].values()
    assert "commit" in run_of_results["environment"]
    assert content["results"][0]["tokens_per_second"] > 0
    for one in content["results"]:
        assert f"{one['perplexity']:.2f}" in done.output
    assert len([path for path in log.rglob("*tfevents*")]) == 2


def test_default_lengths_are_multiples_of_the_training_length(corpus, checkpoint, tmp_path):
    copied = tmp_path / "checkpoint_best.pt"
    shutil.copy(checkpoint, copied)
    command(corpus, copied)
    path = tmp_path / "checkpoint_best_valid.json"
    assert [one["length"] for one in json.loads(path.read_text())["results"]] == [32, 64, 128, 256, 512]


@pytest.mark.parametrize("method", ["rotary", "t5", "learned"])  # the others are trained in other tests
def test_methods_train_and_evaluate_past_their_length(corpus, train, tmp_path, method):
    trained = train("--position-method", method, updates=3)
    way = ["--stride", 16] if method == "learned" else ["--streaming"]
    command(corpus, trained, "--lengths", "32" if method == "learned" else "32,100", *way, "--output", tmp_path)
    assert all(one["perplexity"] < 100 for one in results(tmp_path).values()), "it has learned something of 48 types"
    if method == "t5":
        assert torch.load(trained)["model"]["decoder.position_method.bucket_bias"].any()


def test_learned_positions_end_with_the_training_length(corpus, train, tmp_path, capsys):
    learned = train("--position-method", "learned", updates=2)
    message = fails(capsys, corpus, learned, "--lengths", "16,32,33", "--output", tmp_path)
    assert "length 33 is longer than the model's longest sequence, 32" in message
    assert results(tmp_path).keys() == {(16, 16), (32, 32)}


def test_a_model_that_diverged_is_named_and_what_was_done_is_kept(corpus, checkpoint, tmp_path, capsys, monkeypatch):
    state = torch.load(checkpoint)
    state["model"]["decoder.layers.0.fc1.weight"].fill_(math.nan)
    torch.save(state, tmp_path / "checkpoint.pt")
    assert "length 64, stride 64: a loss is nan" in fails(capsys, corpus, tmp_path / "checkpoint.pt", "--lengths", 64)
    assert not list(tmp_path.glob("*.json"))
    original = checkpoint_evaluation.evaluate_model

    def fail_second(model, text, way, *rest):
        if way.length == 64:
            raise RuntimeError("out of memory\nwith details")
        return original(model, text, way, *rest)

    monkeypatch.setattr(checkpoint_evaluation, "evaluate_model", fail_second)
    message = fails(capsys, corpus, checkpoint, "--lengths", "32,64", "--output", tmp_path)
    assert message.endswith("length 64, stride 64: out of memory with details")
    assert results(tmp_path).keys() == {(32, 32)}
