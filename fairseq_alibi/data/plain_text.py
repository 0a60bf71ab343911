"""Plain-text files to a data folder: words, then subword units that are learned on the training text alone."""

import contextlib
import functools
import io
import itertools
import re
import shlex
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

from fairseq.data import Dictionary
from sacremoses import MosesDetokenizer, MosesTokenizer
from sacremoses.util import parallelize_preprocess
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe
from tqdm import tqdm

from ..files.data_folders import first_folder, text_options
from ..files.errors import one_line
from .binarize import SPLITS, check_text, count_tokens, run_preprocess
from .destination import is_prepared, print_counts, publish, work_folder

MERGES = 10_000  # of BPE, where nothing else is asked for
RESTORED_LINES = 10_000  # of each split, which are decoded to see whether they come back
BATCH_LINES = 20_000  # lines in memory at a time while they are encoded
CACHED_WORDS = 1_000_000  # of which a process remembers the BPE, in some 300 MB

Encoder = Callable[[str], str]
read_lines = functools.partial(open, encoding="utf-8", newline="\n")  # at no other line break than this one


def encode_file(folder: Path, split: str, source: str, target: str, encode: Encoder, workers: int) -> None:
    """Encodes `folder`/`split`.`source` to `folder`/`split`.`target` line by line, in several processes."""
    with (
        read_lines(folder / f"{split}.{source}") as lines,
        open(folder / f"{split}.{target}", "w", encoding="utf-8", newline="\n") as encoded,
        tqdm(desc=f"{target} {split}", unit=" lines", unit_scale=True, disable=None) as bar,
    ):
        while batch := [line.rstrip("\n") for line in itertools.islice(lines, BATCH_LINES)]:
            encoded.writelines(f"{line}\n" for line in parallelize_preprocess(encode, batch, workers))
            bar.update(len(batch))


@dataclass(frozen=True)
class TextSettings:
    """How text is split into tokens; every choice has the same name and meaning in fairseq."""

    tokenizer: str = "moses"  # or sentencepiece, or none for white space alone
    units: Optional[int] = MERGES  # BPE merges, or types of sentencepiece; None for whole words
    language: str = "en"  # of Moses' tokenizer, as sacremoses names it
    escape: bool = True  # Moses' tokenizer writes quotes, brackets and & as XML does
    dash_splits: bool = True  # Moses' tokenizer splits words at dashes

    def record(self) -> dict[str, Any]:
        """Returns what `prepared.json` says, in which English, escapes and splits at dashes are not written out."""
        chosen = {"language": self.language, "escape": self.escape, "dash_splits": self.dash_splits}
        others = {name: value for name, value in chosen.items() if value != getattr(TextSettings, name)}
        return {"corpus": "text", "tokenizer": self.tokenizer, "bpe_merges": self.units, **others}

    def word_encoder(self) -> Encoder:
        """Returns the function of fairseq's `--tokenizer moses`, without fairseq, so that workers need not load it.

        Other tokenizers make spaces of all white space, which would glue words together as a part of units.
        """
        if self.tokenizer != "moses":
            return functools.partial(re.compile(r"\s").sub, " ")
        tokenize = MosesTokenizer(self.language).tokenize
        return functools.partial(tokenize, aggressive_dash_splits=self.dash_splits, return_str=True, escape=self.escape)

    def decoder(self) -> Encoder:
        """Returns what fairseq makes of a line of tokens."""
        if self.tokenizer == "sentencepiece":
            return lambda line: line.replace(" ", "").replace("\u2581", " ").strip()
        marker = "@@ " if self.units else None
        detokenizer = MosesDetokenizer(self.language) if self.tokenizer == "moses" else None

        def decode(line: str) -> str:
            line = f"{line} ".replace(marker, "").rstrip() if marker else line
            return detokenizer.detokenize(line.split()) if detokenizer else line

        return decode


def count_restored(
    data: Path, texts: dict[str, Path], folder: Path, suffix: str, settings: TextSettings
) -> dict[str, float]:
    """Returns for each split the share of its first `RESTORED_LINES` lines that come back from their tokens unchanged.

    A line with a token that is special or missing in the dictionary of `data` does not. `folder`/SPLIT.`suffix` holds
    the tokens.
    """
    dictionary, decode, shares = Dictionary.load(str(data / "dict.txt")), settings.decoder(), {}
    for split, path in texts.items():
        with read_lines(path) as lines, read_lines(folder / f"{split}.{suffix}") as encoded:
            restored = []
            for line, tokens in itertools.islice(zip(lines, encoded), RESTORED_LINES):
                words = tokens.split()
                known = all(dictionary.index(word) >= dictionary.nspecial for word in words)
                restored.append(known and decode(" ".join(words)) == line.rstrip("\r\n"))
            shares[split] = sum(restored) / len(restored)
    return shares


def learn_pieces(text: Path, model: Path, pieces: int, workers: int) -> None:
    """Writes a model of sentencepiece that changes no character of the text; ValueError if it cannot be learned."""
    try:
        import sentencepiece
    except ImportError as error:
        raise ValueError("--tokenizer sentencepiece needs the library: pip install sentencepiece") from error
    content = io.BytesIO()
    try:
        with read_lines(text) as lines:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line.rstrip("\n") for line in lines),
                model_writer=content,
                vocab_size=pieces,
                model_type="bpe",
                character_coverage=1.0,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                hard_vocab_limit=False,  # a small text has fewer pieces
                num_threads=min(workers, 128),
                minloglevel=2,
            )
    except RuntimeError as error:
        reason = one_line(error)
        raise ValueError(f"sentencepiece cannot learn {pieces:,} pieces ({reason}): pass other --bpe-merges") from error
    model.write_bytes(content.getvalue())


def learn_codes(text: Path, codes: Path, merges: int) -> None:
    """Learns up to `merges` BPE merges from a tokenized text and writes them to `codes`; ValueError if it has none."""
    with (
        read_lines(text) as lines,
        open(codes, "w", encoding="utf-8") as file,
        tqdm(total=merges, desc="learn bpe", unit=" merges", disable=None) as bar,
    ):

        def write(line: str) -> None:
            file.write(line)
            bar.update(not line.startswith("#version"))

        # subword-nmt raises ValueError without a pair of characters, and writes to stderr without a frequent pair.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(ValueError):
            learn_bpe(lines, types.SimpleNamespace(write=write), merges)
    if codes.read_text(encoding="utf-8").count("\n") < 2:
        raise ValueError("the training text is too small to learn BPE: give more text, or use --word-level")


def learn_units(work: Path, settings: TextSettings, workers: int) -> Path:
    """Learns subword units of train.words of a folder; returns their file."""
    assert settings.units is not None
    if settings.tokenizer == "sentencepiece":
        learn_pieces(work / "train.words", units := work / "sentencepiece.model", settings.units, workers)
    else:
        learn_codes(work / "train.words", units := work / "bpe.codes", settings.units)
    return units


def unit_encoder(units: Path) -> Encoder:
    """Returns the function that splits the words of a line into learned units."""
    if units.name == "sentencepiece.model":
        return functools.partial(encode_pieces, str(units))
    with open(units, encoding="utf-8") as file:
        return functools.partial(encode_bpe, BPE(file))


def encode_bpe(bpe: BPE, line: str) -> str:
    """Encodes a line as fairseq's `--bpe subword_nmt` does; the memory of earlier words stays bounded."""
    if len(bpe.cache) > CACHED_WORDS:
        bpe.cache.clear()
    return bpe.process_line(line)


@functools.lru_cache(1)
def read_pieces(model: str) -> Any:
    """Reads a model of sentencepiece, once in each process."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=model)


def encode_pieces(model: str, line: str) -> str:
    """Encodes a line as fairseq's `--bpe sentencepiece` does."""
    return " ".join(read_pieces(model).encode(line, out_type=str))


def prepare_text(
    destination: Path, texts: dict[str, Path], source: Union[str, dict[str, str]], settings: TextSettings, workers: int
) -> None:
    """Makes a data folder of the text file of every split, which `source` describes; ValueError for bad input."""
    summaries = {split: check_text(path) for split, path in texts.items()}
    inputs = {split: summary.sha256 for split, summary in summaries.items()}
    identity = {"inputs": inputs, "settings": settings.record()}
    if is_prepared(destination, identity):
        return
    with work_folder(destination) as work:
        for split, path in texts.items():
            (work / f"{split}.txt").symlink_to(path.resolve())
            encode_file(work, split, "txt", "words", settings.word_encoder(), workers)
        suffix, units = "words", settings.units and learn_units(work, settings, workers)
        if units:
            for split in SPLITS:
                encode_file(work, split, suffix, "units", unit_encoder(units), workers)
            suffix = "units"
        data = run_preprocess(work, suffix, workers)
        counts = count_tokens(data, summaries)
        for split, share in count_restored(data, texts, work, suffix, settings).items():
            counts[split]["restored"] = share
        if units:
            units.rename(data / units.name)
        publish(data, destination, {**identity, "source": source, "counts": counts})
    print_counts(destination, counts)
    print_commands(str(destination), destination.name)


def print_commands(data: str, name: str) -> None:
    """Prints how to train on data folders, with colons between them, and how to prompt the model called `name`."""
    common = [data, "--user-dir", str(Path(__file__).parents[1]), "--task", "language_modeling"]
    save_dir = f"checkpoints/{name}"
    training = ["--arch", "alibi_lm_tiny", "--tokens-per-sample", "256", "--max-tokens", "4096"]
    training += ["--optimizer", "adam", "--lr", "0.001", "--max-update", "1000", "--save-dir", save_dir]
    prompting = ["--path", f"{save_dir}/checkpoint_best.pt"]
    for option, value in text_options(first_folder(data)).items():
        prompting += [f"--{option.replace('_', '-')}"] if value else []
        prompting += [value] if isinstance(value, str) else []
    print(f"Next:\n  {shlex.join(['fairseq-train', *common, *training])}")
    prompt = shlex.join(["fairseq-interactive", *common, *prompting])
    print(f"The model then continues lines of plain text:\n  {prompt}")
