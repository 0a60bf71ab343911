"""Properties for all inputs, tried by hypothesis: windows, slopes, the reader of results, the preparation of text."""

import json
import math
import tempfile
from pathlib import Path

import torch
from fairseq.data import Dictionary
from fairseq.data.encoders.moses_tokenizer import MosesTokenizer, MosesTokenizerConfig
from fairseq.data.encoders.subword_nmt_bpe import SubwordNMTBPE, SubwordNMTBPEConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairseq_alibi.core.alibi import alibi_slopes
from fairseq_alibi.data.binarize import SPLITS, check_text
from fairseq_alibi.data.plain_text import TextSettings, learn_codes
from fairseq_alibi.evaluation.curves import pool_positions, read_curves
from fairseq_alibi.evaluation.tables import length_table, position_table
from fairseq_alibi.evaluation.windows import batches, windows

alike = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def names_one(error, paths):
    """Checks that an error is one line that names one of the files."""
    assert len(str(error).splitlines()) == 1
    assert any(str(path) in str(error) for path in paths)


@settings(alike, max_examples=200)
@given(st.integers(0, 3000), st.integers(1, 400), st.data())
def test_every_token_is_scored_once_with_the_context_it_should_have(tokens, length, data):
    stride = data.draw(st.integers(1, length))
    cut = list(windows(tokens, length, stride))
    assert [n for window in cut for n in range(window.scored, window.end)] == list(range(tokens))
    for window in cut:
        assert window.end - window.begin <= length
        for n in (window.scored, window.end - 1):  # its first and its last token
            assert window.begin == max(0, n // stride * stride - (length - stride))
    positions = data.draw(st.integers(1, 5000))
    grouped = list(batches(iter(cut), positions))
    assert [window for batch in grouped for window in batch] == cut
    assert all(len(batch) == 1 or sum(window.shape[0] for window in batch) <= positions for batch in grouped)


@settings(alike, max_examples=100)
@given(st.integers(1, 300), st.floats(0.1, 64))
def test_slopes_are_two_geometric_sequences_between_0_and_1(heads, max_bias):
    slopes = alibi_slopes(heads, max_bias)
    assert slopes.shape == (heads,)
    assert slopes.unique().numel() == heads
    assert 0 < slopes.min() <= slopes.max() < 1
    power = 2 ** int(math.log2(heads))
    first, second = slopes[:power], slopes[power:]
    ratio = 2 ** (-max_bias / power)
    torch.testing.assert_close(first, ratio ** torch.arange(1, power + 1, dtype=torch.float64), rtol=1e-9, atol=0)
    assert (first.diff() < 0).all()
    torch.testing.assert_close(
        second, ratio ** torch.arange(0.5, heads - power + 0.5, dtype=torch.float64), rtol=1e-9, atol=0
    )


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=5), some, max_size=3),
    max_leaves=6,
)
numbers = st.integers(-1, 300) | st.floats(-1, 300) | anything


def likely(**kinds):
    """A dictionary of these values, of which some may be missing or anything."""
    return st.fixed_dictionaries({}, optional={name: kind | anything for name, kind in kinds.items()})


def good(**kinds):
    """A dictionary of exactly these values."""
    return st.fixed_dictionaries(kinds)


def contents(part, number):
    """What a result file may hold, each part made by `part`."""
    bins = part(first=number, last=number, tokens=number, loss=number)
    more = {"tokens_per_second": number, "by_position": st.lists(bins, max_size=3)}
    one = part(length=number, stride=number | st.none(), perplexity=number, **more)
    model = part(checkpoint=st.text(max_size=9), position_method=st.text(max_size=9), training_length=number)
    return part(model=model, subset=st.text(max_size=9), results=st.lists(one, max_size=4))


@settings(alike, max_examples=300)
@given(st.lists(anything | contents(likely, numbers) | contents(good, st.integers(0, 300)), min_size=1, max_size=2))
def test_any_json_is_a_report_or_one_line(files):
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{n}.json") for n in range(len(files))]
        for path, content in zip(paths, files):
            path.write_text(json.dumps(content))
        try:
            curves = read_curves(paths)
        except ValueError as error:
            names_one(error, paths)
            return
        for measure in ("perplexity", "tokens_per_second"):
            assert isinstance(length_table(curves, "github", measure), str)
        pooled = pool_positions(curves)
        if pooled:
            assert position_table(pooled).startswith("|")


@settings(alike, max_examples=200)
@given(st.binary(max_size=30))
def test_any_bytes_are_a_text_or_one_line(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text")
        path.write_bytes(content)
        try:
            lines = check_text(path).lines
        except ValueError as error:
            names_one(error, [path])
            return
        assert lines == len(content.removesuffix(b"\n").split(b"\n"))
        assert content.decode().strip()


# Everything that UTF-8 can say but zero bytes and line breaks; a return inside a line is refused later.
line = st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r"), max_size=20)
words = st.lists(st.text("abcdefgh", min_size=1, max_size=6), max_size=6).map(" ".join)


@settings(alike, max_examples=20)
@given(st.lists(words | line, min_size=1, max_size=30), st.integers(1, 20))
def test_any_text_is_encoded_line_by_line_as_a_prompt_is(lines, merges):
    """As many lines as before; tokens in a line are those of fairseq's encoders, and plain words come back."""
    text = ["ab ab cd", *lines]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for split in SPLITS:
            (folder / f"{split}.txt").write_bytes("\n".join(text).encode())
        moses = MosesTokenizer(MosesTokenizerConfig())
        tokenized = [moses.encode(one) for one in text]
        assert list(map(TextSettings().word_encoder(), text)) == tokenized
        (folder / "train.moses").write_bytes("".join(one + "\n" for one in tokenized).encode())
        assert check_text(folder / "train.txt")[0] == len(text) - (not text[-1])
        learn_codes(folder / "train.moses", folder / "bpe.codes", merges)
        bpe = SubwordNMTBPE(SubwordNMTBPEConfig(bpe_codes=str(folder / "bpe.codes")))
        dictionary = Dictionary()
        for before, after in zip(text, tokenized):
            assert len(after.splitlines()) <= 1
            encoded = bpe.encode(after)
            assert len(dictionary.encode_line(encoded)) == len(encoded.split()) + 1
            assert bpe.decode(encoded).split() == after.split()
            if before == " ".join(before.split()) and set(before) <= set("abcdefgh "):
                assert moses.decode(bpe.decode(encoded)) == before
