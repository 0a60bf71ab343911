"""The tokenizer of a data folder for Hugging Face's transformers. Needs sacremoses and subword-nmt, no fairseq.

`fairseq-alibi export-hf` puts it beside the model:

    tokenizer = AutoTokenizer.from_pretrained(OUT, trust_remote_code=True)

It gives the ids that the text has in fairseq. A line break is a `</s>`, the end of a line. `<s>` stands in front of the
text, for what the model reads first; `add_special_tokens=False` leaves it out. fairseq reads `</s>` there, which nobody
could tell from a line break, so the model reads `<s>` as `</s>` (`begin_token` of its configuration).
"""

import re
import shutil
from pathlib import Path
from typing import Any, Optional, Union

from sacremoses import MosesDetokenizer, MosesTokenizer
from subword_nmt.apply_bpe import BPE
from transformers import PreTrainedTokenizer

#: The first types of a dictionary of fairseq's, with the ids 0 to 3.
BEGIN, PADDING, END, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"
SEPARATOR = "@@"  # what subword-nmt puts behind a part of a word that goes on


class AlibiTokenizer(PreTrainedTokenizer):
    """Words, or parts of words, of a dictionary, as scripts/prepare_text.sh and prepare_wikitext103.sh make them.

    Args:
        vocab_file: the types, a line each, by id.
        codes_file: BPE codes of subword-nmt; None for whole words.
        moses: whether lines are split into words by the Moses tokenizer; else at white space.
        add_bos_token: False to leave out `<s>` in front of every text.
        kwargs: those of transformers' tokenizers, and of Moses': `language`, `escape` and `dash_splits`, as
            `prepare_text.sh` has them, and `word_by_word`, True to give it one word between spaces at a time. It splits
            off a full stop by what follows, so the tokens of a text are not the first ones of a longer text. Word by
            word they are, but "No. 5" is "No . 5".
    """

    vocab_files_names = {"vocab_file": "vocab.txt", "codes_file": "bpe.codes"}  # noqa: RUF012
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(
        self,
        vocab_file: str,
        codes_file: Optional[str] = None,
        moses: bool = False,
        add_bos_token: bool = True,
        **kwargs: Any,
    ):
        self.vocab_file, self.codes_file = vocab_file, codes_file
        self.types = Path(vocab_file).read_bytes().decode().split("\n")  # no other line break than this one
        self.ids = {word: number for number, word in enumerate(self.types)}
        self.moses, self.adds_begin = moses, add_bos_token
        kwargs = {"language": "en", "escape": True, "dash_splits": True, "word_by_word": False, **kwargs}
        self.word_by_word = kwargs["word_by_word"]
        self.tokenizer, self.detokenizer = (kind(kwargs["language"]) for kind in (MosesTokenizer, MosesDetokenizer))
        self.rules = {"escape": kwargs["escape"], "aggressive_dash_splits": kwargs["dash_splits"]}
        self.bpe = None
        if codes_file:
            with open(codes_file, encoding="utf-8") as codes:
                self.bpe = BPE(codes, separator=SEPARATOR)
        names = {"bos_token": BEGIN, "eos_token": END, "unk_token": UNKNOWN, "pad_token": PADDING}
        # not split at what looks like special tokens: in fairseq a text has none
        options = {"padding_side": "left", "split_special_tokens": True, **names, **kwargs}
        super().__init__(moses=moses, add_bos_token=add_bos_token, **options)  # which transformers saves

    def __call__(self, *args: Any, return_offsets_mapping: bool = False, **kwargs: Any) -> Any:
        """See transformers; NotImplementedError for offsets, which the tokens of Moses do not have."""
        if return_offsets_mapping:
            raise NotImplementedError("return_offsets_mapping: this tokenizer knows no offsets; leave it out")
        return super().__call__(*args, **kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of types."""
        return len(self.types)

    @property
    def hidden_tokens(self) -> set[str]:
        """The special tokens that are no text; a line end and an unknown word are."""
        return {*self.all_special_tokens} - {END, UNKNOWN}

    def get_vocab(self) -> dict[str, int]:
        """Id of each type."""
        return {**self.ids, **self.added_tokens_encoder}

    def words(self, line: str) -> list[str]:
        """The types of a line; `<s>` and `<pad>`, which are not fairseq's in a text, are unknown."""
        line = re.sub(r"\s", " ", line)  # as in the preparation: as a part of units it would glue words together
        if self.moses:
            parts = line.split() if self.word_by_word else [line]
            line = " ".join(self.tokenizer.tokenize(part, return_str=True, **self.rules) for part in parts)
        if self.bpe:
            line = self.bpe.process_line(line)
        return [UNKNOWN if word in (BEGIN, PADDING) else word for word in line.split()]

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        first, *others = (self.words(line) for line in text.split("\n"))
        return first + [word for line in others for word in (END, *line)]

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.get(token, self.ids[UNKNOWN])

    def _convert_id_to_token(self, index: int) -> str:
        return self.types[index] if 0 <= index < len(self.types) else UNKNOWN  # a resized model writes other ids too

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Types -> text, with a line break for each `</s>`."""
        lines: list[list[str]] = [[]]
        for token in tokens:
            if token == END:
                lines.append([])
            else:
                lines[-1].append(token)
        return "\n".join(map(self.line_of, lines))

    def line_of(self, words: list[str]) -> str:
        """The reverse of `words`, as far as there is one."""
        line = " ".join(words)
        if self.bpe:
            line = f"{line} ".replace(f"{SEPARATOR} ", "").rstrip()
        return self.detokenizer.detokenize(line.split()) if self.moses else line

    def _decode(  # type: ignore[override]
        self, token_ids: Union[int, list[int]], skip_special_tokens: bool = False, **kwargs: Any
    ) -> str:
        tokens = self.convert_ids_to_tokens([token_ids] if isinstance(token_ids, int) else token_ids)
        if skip_special_tokens:
            tokens = [token for token in tokens if token not in self.hidden_tokens]
        return self.convert_tokens_to_string(tokens)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: Optional[list[int]] = None
    ) -> list[int]:
        """The first token in front of a text, and in front of the second one."""
        begin = [self.ids[BEGIN]] if self.adds_begin else []
        return begin + token_ids_0 + ([] if token_ids_1 is None else begin + token_ids_1)

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: Optional[list[int]] = None
    ) -> list[int]:
        """0 at the tokens of a text, its first one included, and 1 at those of the second one."""
        first, both = (len(self.build_inputs_with_special_tokens(token_ids_0, more)) for more in (None, token_ids_1))
        return [0] * first + [1] * (both - first)

    def get_special_tokens_mask(
        self, token_ids_0: list[int], token_ids_1: Optional[list[int]] = None, already_has_special_tokens: bool = False
    ) -> list[int]:
        """1 at tokens that are no text, of ids as they are or of those to come in front of which there will be one."""
        if not already_has_special_tokens:
            token_ids_0 = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        elif token_ids_1 is not None:
            token_ids_0 = token_ids_0 + token_ids_1
        return [int(token in self.hidden_tokens) for token in self.convert_ids_to_tokens(token_ids_0)]

    def save_vocabulary(self, save_directory: str, filename_prefix: Optional[str] = None) -> tuple[str, ...]:
        """Copies dictionary and codes into a folder; returns their paths there."""
        files = {"vocab_file": self.vocab_file, "codes_file": self.codes_file}
        paths = []
        for name, file in files.items():
            if file:
                prefix = f"{filename_prefix}-" if filename_prefix else ""
                target = Path(save_directory) / f"{prefix}{self.vocab_files_names[name]}"
                if not target.exists() or not target.samefile(file):
                    shutil.copyfile(file, target)
                paths.append(str(target))
        return tuple(paths)


AlibiTokenizer.register_for_auto_class()
