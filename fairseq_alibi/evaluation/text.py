"""The text that is evaluated, and the numbers its loss is divided by: tokens, words, characters."""

import copy
import math
from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from torch import Tensor

from ..files.data_folders import read_dictionary, read_subset


class EvaluationText:
    """A subset of a data folder, with its numbers of tokens, words and characters.

    Args:
        stream: (N,) tokens, int32.
        dictionary: of the data folder.
        marker: how subword units are marked, as fairseq's --remove-bpe has it: "@@ " at the end of every unit of a
            word but its last, "sentencepiece" for U+2581 at the start of a word; None where tokens are words.
    """

    def __init__(self, stream: Tensor, dictionary: Dictionary, marker: Optional[str]) -> None:
        self.stream = stream
        #: A token in front of each window, or of the stream; None for none.
        self.first_token: Optional[int] = None
        self.has_subwords = marker is not None
        symbols = [dictionary[n] for n in range(len(dictionary))]
        eos = stream == dictionary.eos()
        if marker == "sentencepiece":
            begins = torch.tensor([symbol.startswith("\u2581") for symbol in symbols])[stream] | eos
            self.inside_word = torch.cat([~begins[1:], begins.new_tensor([False])])
            lengths = [len(symbol) - symbol.startswith("\u2581") for symbol in symbols]
        elif marker is not None:
            end = marker.rstrip()
            self.inside_word = torch.tensor([symbol.endswith(end) for symbol in symbols])[stream]
            lengths = [len(symbol) - len(end) * symbol.endswith(end) for symbol in symbols]
        else:
            self.inside_word = torch.zeros_like(eos)
            lengths = [len(symbol) for symbol in symbols]
        self.tokens, self.words = len(stream), int((~self.inside_word).sum())
        # Each word is followed by a space or by the end of its line. An empty line has a line end too.
        empty_lines = eos & torch.cat([eos.new_tensor([True]), eos[:-1]])
        in_words = torch.tensor(lengths)[stream[~eos]].sum()
        self.characters = int(in_words) + self.words - int(eos.sum()) + int(empty_lines.sum())

    def with_first_token(self, token: Optional[int]) -> "EvaluationText":
        """The same text, whose windows, or stream, begin with a token: <s> for models with --add-bos-token."""
        text = copy.copy(self)
        text.first_token = token
        return text

    def words_of_fairseq(self, stride: int) -> int:
        """The number of words by which fairseq-eval-lm --remove-bpe divides.

        fairseq counts a word twice if the end of a window's scored tokens cuts it.
        """
        ends = torch.arange(stride - 1, self.tokens + stride - 1, stride).clamp(max=self.tokens - 1)
        return self.words + int(self.inside_word[ends].sum())

    def measures(self, bits: float, stride: Optional[int]) -> dict[str, Any]:
        """Losses and perplexities of the whole text.

        Args:
            bits: sum of the losses of all tokens.
            stride: tokens from one window to the next; None for streaming.
        """
        measures = token_measures(bits, self.tokens)
        if self.has_subwords:
            word_loss = bits / self.words
            measures.update(words=self.words, word_loss=word_loss, word_perplexity=perplexity(word_loss))
            if stride is not None:
                measures["fairseq_remove_bpe_loss"] = bits / self.words_of_fairseq(stride)
        return {**measures, "characters": self.characters, "bits_per_character": bits / self.characters}


def token_measures(bits: float, tokens: int) -> dict[str, Any]:
    """Loss in bits per token, and perplexity.

    Args:
        bits: sum of the losses of all tokens.
        tokens: their number.
    """
    return {"tokens": tokens, "loss": bits / tokens, "perplexity": perplexity(bits / tokens)}


def perplexity(bits: float) -> float:
    """2 ** bits; infinity where that is too large for a float."""
    return 2**bits if bits < 1024 else math.inf


def read_evaluation_text(data: str, subset: str, marker: Optional[str]) -> EvaluationText:
    """Reads a subset of a fairseq data folder.

    Args:
        data: the folder.
        subset: valid, test, ...
        marker: see `EvaluationText`.

    Raises:
        ValueError: the folder, its dictionary or the subset is missing or broken.
    """
    dictionary, stream = read_dictionary(data), read_subset(data, subset)
    if int(stream.max()) >= len(dictionary):
        raise ValueError(
            f"{data}/{subset}.bin holds type {int(stream.max()):,}, but dict.txt {len(dictionary):,} types: "
            "they are not of one preparation, prepare the folder anew"
        )
    return EvaluationText(stream, dictionary, marker)
