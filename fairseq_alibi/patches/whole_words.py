"""--mask-whole-words for masked models, by the marks that subwords carry in the dictionary."""

from dataclasses import dataclass
from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from torch import Tensor

from .patch import CommandError


@dataclass(frozen=True)
class WordBeginnings:
    """Where words begin in a line, in the place of fairseq's tensor with one number for each type.

    subword-nmt marks a piece that the next piece continues, so the type alone does not say whether it begins a word.

    Args:
        begins: (V,) whether a type can begin a word.
        continues: (V,) whether the piece after a type continues its word.
    """

    begins: Tensor
    continues: Tensor

    def gather(self, dim: int, tokens: Tensor) -> Tensor:
        """Returns (N,) 1 for each of the (N,) tokens that begins a word, else 0. See `torch.Tensor.gather`."""
        begins = self.begins[tokens].clone()
        begins[1:] &= ~self.continues[tokens[:-1]]
        return begins.byte()


def get_whole_word_mask(args: Any, dictionary: Dictionary) -> Optional[WordBeginnings]:
    """Replaces `fairseq.data.encoders.utils.get_whole_word_mask` for the task masked_lm.

    Args:
        args: Ignored: the options of a task no longer name the BPE.
        dictionary: The dictionary, with marks of subword-nmt ("lo@@ west"), of SentencePiece ("▁lo west") or none.

    Raises:
        CommandError: The types are numbers, so the words cannot be told apart.
    """
    special = dictionary.nspecial
    types = [symbol for symbol in dictionary.symbols[special:] if not symbol.startswith("madeupword")]
    if types and sum(symbol.isdecimal() for symbol in types) > len(types) / 2:
        raise CommandError(
            "--mask-whole-words: the types of dict.txt are numbers of GPT-2's BPE, which carry no marks of words; "
            "drop it, or prepare the data with SentencePiece or subword-nmt"
        )
    sentencepiece = any(symbol.startswith("\u2581") for symbol in types)
    begins = torch.tensor([not sentencepiece or symbol.startswith("\u2581") for symbol in dictionary.symbols])
    begins[:special] = True
    begins |= torch.tensor([symbol.startswith(("madeupword", "<mask>")) for symbol in dictionary.symbols])
    return WordBeginnings(begins, torch.tensor([symbol.endswith("@@") for symbol in dictionary.symbols]))
