"""The text that is evaluated, and the numbers its loss is divided by: tokens, words, characters, bytes."""

import math
from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from torch import Tensor

from ..files.data_folders import first_folder, read_dictionary, read_preparation, read_subset


class EvaluationText:
    """A subset of a data folder, with the numbers that its loss is divided by.

    `stream` is (N,) int32. `marker` is how subword units are marked, as fairseq's --remove-bpe has it: "@@ " at the end
    of every unit of a word but its last, "sentencepiece" for U+2581 at the start of a word, None where tokens are
    words. `original` is the `lines`, `words`, `characters` and `bytes` of the text as it was given, if they are known.
    """

    def __init__(
        self, stream: Tensor, dictionary: Dictionary, marker: Optional[str], original: Optional[dict[str, int]] = None
    ) -> None:
        self.stream, self.tokens, self.original = stream, len(stream), original
        self.first_token: Optional[int] = None  # a token in front of each window, or of the stream; None for none
        self.has_subwords = marker is not None
        self.unknown = int((stream == dictionary.unk()).sum())
        symbols = [dictionary[n] for n in range(len(dictionary))]
        eos = stream == dictionary.eos()
        lengths = [len(symbol) for symbol in symbols]
        self.inside_word = torch.zeros_like(eos)
        if marker == "sentencepiece":
            begins = torch.tensor([symbol.startswith("\u2581") for symbol in symbols])[stream] | eos
            self.inside_word = torch.cat([~begins[1:], begins.new_tensor([False])])
            lengths = [len(symbol) - symbol.startswith("\u2581") for symbol in symbols]
        elif marker is not None:
            end = marker.rstrip()
            self.inside_word = torch.tensor([symbol.endswith(end) for symbol in symbols])[stream]
            lengths = [len(symbol) - len(end) * symbol.endswith(end) for symbol in symbols]
        self.tokenized_words = int((~self.inside_word).sum())  # words after tokenization; a line end is one of them
        # Each word is followed by a space or by the end of its line. An empty line has a line end too.
        empty_lines = eos & torch.cat([eos.new_tensor([True]), eos[:-1]])
        in_words = torch.tensor(lengths)[stream[~eos]].sum()
        self.tokenized_characters = int(in_words + self.tokenized_words - eos.sum() + empty_lines.sum())

    def measures(self, bits: float, stride: Optional[int]) -> dict[str, Any]:
        """Losses and perplexities of the whole text, whose tokens lose `bits`; a line end counts as a word."""
        measures = token_measures(bits, self.tokens)
        if self.has_subwords and stride is not None:
            # fairseq-eval-lm --remove-bpe counts words that are cut by windows twice.
            ends = torch.arange(stride - 1, self.tokens + stride - 1, stride).clamp(max=self.tokens - 1)
            measures["fairseq_remove_bpe_loss"] = bits / (self.tokenized_words + int(self.inside_word[ends].sum()))
        if text := self.original:
            loss = bits / (text["words"] + text["lines"])
            measures.update(text, word_loss=loss, word_perplexity=perplexity(loss))
            return {**measures, "bits_per_character": bits / text["characters"], "bits_per_byte": bits / text["bytes"]}
        if self.unknown:  # of which neither the characters are known nor whether a word ends with them
            return measures
        if self.has_subwords:
            loss = bits / self.tokenized_words
            measures.update(tokenized_words=self.tokenized_words, tokenized_word_perplexity=perplexity(loss))
        return {
            **measures,
            "tokenized_characters": self.tokenized_characters,
            "bits_per_tokenized_character": bits / self.tokenized_characters,
        }


def token_measures(bits: float, tokens: int) -> dict[str, Any]:
    """Loss in bits per token, and perplexity, of the sum of the losses of all tokens."""
    return {"tokens": tokens, "loss": bits / tokens, "perplexity": perplexity(bits / tokens)}


def perplexity(bits: float) -> float:
    """2 ** bits; infinity where that is too large for a float."""
    return 2**bits if bits < 1024 else math.inf


def read_evaluation_text(data: str, subset: str, marker: Optional[str]) -> EvaluationText:
    """Reads a subset of a data folder as text; ValueError if it or the dictionary is missing or broken."""
    dictionary, stream = read_dictionary(data), read_subset(data, subset)
    if int(stream.max()) >= len(dictionary):
        raise ValueError(
            f"{data}/{subset}.bin holds type {int(stream.max()):,}, but dict.txt {len(dictionary):,} types: "
            "they are not of one preparation, prepare the folder anew"
        )
    counts = read_preparation(first_folder(data))["counts"].get(subset, {})
    names = ("lines", "words", "characters", "bytes")
    # Another text may have taken the place of the one that was counted.
    is_known = isinstance(counts, dict) and counts.get("tokens") == len(stream)
    is_known = is_known and all(type(counts.get(name)) is int and counts[name] > 0 for name in names)
    return EvaluationText(stream, dictionary, marker, {name: counts[name] for name in names} if is_known else None)
