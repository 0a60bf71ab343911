"""Text in six scripts: preparation, training, generation, export. What comes back is what the preparation counted."""

import itertools
import json
import random

import pytest
from conftest import BIN, failure, run
from fairseq.data.encoders.moses_tokenizer import MosesTokenizer, MosesTokenizerConfig
from tabulate import tabulate

from fairseq_alibi.__main__ import main
from fairseq_alibi.data.plain_text import TextSettings, count_restored
from fairseq_alibi.evaluation.generation import decode_tokens, encode_text, load_text_model
from fairseq_alibi.files.data_folders import text_options

#: Words of each script, with what Moses' tokenizer takes apart.
WORDS = {
    "latin": ["café", "résumé", "naïve", '"quoted"', "R&D", "e.g.", "https://a-b.org/x?y=1", "well-known", "3,000"],
    "thai": ["ภาษาไทย", "กำลัง", "เรียน"],
    "hindi": ["हिन्दी", "भाषा", "है।"],
    "arabic": ["اللغة", "العربية،", "مَر"],
    "chinese": ["我们学习中文。", "你好。世界。", "图书"],
    "emoji": ["👩\u200d👧", "👍🏽", "🇩🇪", "❤️", "ok"],
}

OPTIONS = {
    "moses": ["--bpe-merges", "20"],
    "moses, other rules": ["--bpe-merges", "20", "--language", "de", "--no-escape", "--no-dash-splits"],
    "none": ["--tokenizer", "none", "--bpe-merges", "20"],
    "sentencepiece": ["--tokenizer", "sentencepiece", "--bpe-merges", "200"],
}


def write_texts(folder, words):
    """Random lines of a few words each; returns the arguments of prepare-text."""
    rng, arguments = random.Random(1), []
    for split, count in (("train", 60), ("valid", 12), ("test", 12)):
        lines = [" ".join(rng.choices(words, k=rng.randrange(2, 7))) for _ in range(count)]
        (folder / f"{split}.txt").write_text("".join(f"{line}\n" for line in [*lines, " ".join(words)]))
        arguments += [f"--{split}", str(folder / f"{split}.txt")]
    return [*arguments, "--workers", "1"]


def prepared(folder, words, *options):
    """Prepares a text; returns the data folder and the share of lines that come back, by split."""
    data = folder / "data"
    main(["prepare-text", str(data), *write_texts(folder, words), *options])
    counts = json.loads((data / "prepared.json").read_text())["counts"]
    return data, {split: counts[split]["restored"] for split in ("train", "valid", "test")}


def restored_share(data, there_and_back):
    """Share of the lines of the validation text that a function returns unchanged."""
    lines = (data.parent / "valid.txt").read_text().split("\n")[:-1]
    return sum(there_and_back(line) == line for line in lines) / len(lines)


@pytest.mark.parametrize("tokenizer", ["none", "sentencepiece"])
def test_text_of_any_script_comes_back_without_moses(tmp_path, tokenizer):
    if tokenizer == "sentencepiece":
        pytest.importorskip("sentencepiece")
    _, shares = prepared(tmp_path, list(itertools.chain(*WORDS.values())), *OPTIONS[tokenizer])
    assert shares == {"train": 1, "valid": 1, "test": 1}


@pytest.mark.parametrize(("escape", "dashes"), itertools.product([True, False], repeat=2))
def test_text_is_split_as_by_fairseqs_moses_tokenizer(escape, dashes):
    text = 'a-b, "c" well-known R&D'
    tokens = TextSettings(escape=escape, dash_splits=dashes).word_encoder()(text)
    options = {"moses_no_escape": not escape, "moses_no_dash_splits": not dashes}
    assert tokens == MosesTokenizer(MosesTokenizerConfig(source_lang="en", target_lang="en", **options)).encode(text)
    assert ("@-@" in tokens, "&quot;" in tokens) == (dashes, escape)


@pytest.mark.parametrize("tokenizer", ["moses", "none", "sentencepiece"])
def test_any_white_space_separates_words(tokenizer):
    assert TextSettings(tokenizer).word_encoder()("a\u00a0b\tc\u3000d\re").split(" ") == list("abcde")


def test_lines_with_special_or_unknown_words_do_not_come_back(tmp_path):
    """And a carriage return belongs to the line's end."""
    (tmp_path / "dict.txt").write_text("a 1\n")
    for name in ("text", "valid.words"):
        (tmp_path / name).write_text("a\n<s> a\na </s>\nb\na\r\n", newline="")
    shares = count_restored(tmp_path, {"valid": tmp_path / "text"}, tmp_path, "words", TextSettings("none", None))
    assert shares == {"valid": 2 / 5}


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", OPTIONS)
@pytest.mark.parametrize("script", ["latin", "all"])
def test_generation_and_export_restore_what_the_preparation_counted(tmp_path, script, tokenizer, capsys):
    if tokenizer == "sentencepiece":
        pytest.importorskip("sentencepiece")
    words = WORDS["latin"] if script == "latin" else list(itertools.chain(*WORDS.values()))
    data, shares = prepared(tmp_path, words, *OPTIONS[tokenizer])
    assert "restored" in capsys.readouterr().out
    command = (data, "--user-dir", "fairseq_alibi", "--task", "language_modeling", "--arch", "alibi_lm_tiny", "--cpu")
    command += ("--tokens-per-sample", 32, "--max-tokens", 256, "--optimizer", "adam", "--max-update", 2)
    run(BIN / "fairseq-train", *command, "--save-dir", tmp_path / "model", "--no-epoch-checkpoints")
    checkpoint = tmp_path / "model" / "checkpoint_last.pt"
    model = load_text_model(str(data), str(checkpoint), **text_options(data))
    assert restored_share(data, lambda line: decode_tokens(model, encode_text(model, line))) == shares["valid"]
    spaced = "\u00a0".join([words[-1]] * 2)
    assert decode_tokens(model, encode_text(model, spaced)) == spaced.replace("\u00a0", " ")
    main(["generate", str(data), str(checkpoint), words[0], "--tokens", "3", "--cpu"])
    export = ("export-hf", checkpoint, tmp_path / "out", "--data", data)
    if tokenizer == "sentencepiece":
        assert "prepared with --tokenizer sentencepiece" in failure(capsys, main, *export)
        return
    from transformers import AutoTokenizer

    main([*map(str, export)])
    exported = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)

    def through_the_export(line):
        return exported.decode(exported(line).input_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    assert restored_share(data, through_the_export) == shares["valid"]
    assert through_the_export(spaced) == spaced.replace("\u00a0", " ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokenizer", "none", "--no-escape"], "--no-escape is for Moses' tokenizer only"),
        (["--tokenizer", "sentencepiece", "--language", "th"], "--language is for Moses' tokenizer only"),
        (["--tokenizer", "sentencepiece", "--word-level"], "--word-level: a model of sentencepiece has no words"),
        (["--tokenizer", "sentencepiece", "--bpe-merges", "5"], "sentencepiece cannot learn 5 pieces"),
        (["--language", "english"], "'english' is no code of a language"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, options, message, capsys):
    if "5" in options:
        pytest.importorskip("sentencepiece")
    arguments = ("prepare-text", tmp_path / "data", *write_texts(tmp_path, ["a", "bc"]), *options)
    assert message in failure(capsys, main, *arguments)
    assert not (tmp_path / "data").exists()


if __name__ == "__main__":  # prints the table of examples/language_model/languages.md
    import contextlib
    import io
    import tempfile
    from pathlib import Path

    rows = []
    for script, words in WORDS.items():
        row = [script]
        for name, options in OPTIONS.items():
            if name != "sentencepiece":  # BPE changes nothing here, and has too little to learn from
                options = ["--word-level"] + [option for option in options if option not in ("--bpe-merges", "20")]
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                row.append(prepared(Path(folder), words, *options)[1]["train"])
        rows.append(row)
    print(tabulate(rows, ["script", *OPTIONS], tablefmt="github", floatfmt=".0%"))
