"""Data as fairseq's commands read it: lines too long for a batch or a model, older formats, --mask-whole-words."""

import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy
import torch
from fairseq import utils
from fairseq.data import Dictionary, FairseqDataset
from fairseq.data.indexed_dataset import IndexedDataset, IndexedRawTextDataset, MMapIndexedDataset
from fairseq.data.iterators import BackgroundConsumer, CountingIterator, EpochBatchIterator
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from ..files.errors import one_line
from .patch import CommandError, original

logger = logging.getLogger(__name__)

SKIP = "--skip-invalid-size-inputs-valid-test"  # with this option fairseq leaves out samples that are too long
RAW_SUFFIX = ".None-None"  # what `fairseq-preprocess --only-source --dataset-impl raw` appends to the name of a subset


class SampleTooLongError(CommandError):
    """A sample is longer than the longest sequence of a model."""


def batch_by_size(
    indices: Iterable[int],
    num_tokens_fn: Callable[[int], int],
    num_tokens_vec: Optional[Iterable[int]] = None,
    max_tokens: Optional[int] = None,
    **options: Any,
) -> list[Any]:
    """Replaces fairseq's function, which fails at a sample longer than `max_tokens`: it is a batch of its own here."""
    if max_tokens is not None and max_tokens > 0:
        indices = numpy.fromiter(indices, dtype=numpy.int64)
        sizes = (num_tokens_fn(index) for index in indices) if num_tokens_vec is None else num_tokens_vec
        lengths = numpy.fromiter(sizes, dtype=numpy.int64)
        longer = int((lengths > max_tokens).sum())
        if longer:
            logger.warning(
                "%s of %s samples are longer than --max-tokens %s, up to %s tokens: each is a batch of its own",
                *(f"{number:,}" for number in (longer, len(lengths), max_tokens, lengths.max())),
            )
        num_tokens_vec = numpy.minimum(lengths, int(max_tokens))
    function = original("fairseq.data.data_utils:batch_by_size")
    return function(indices, num_tokens_fn, num_tokens_vec=num_tokens_vec, max_tokens=max_tokens, **options)


def filter_indices_by_size(
    self: FairseqTask,
    indices: numpy.ndarray,
    dataset: FairseqDataset,
    max_positions: Any = None,
    ignore_invalid_inputs: bool = False,
) -> numpy.ndarray:
    """Replaces fairseq's method; SampleTooLongError for samples past `max_positions` unless they are to be ignored."""
    if not ignore_invalid_inputs:
        ignored = dataset.filter_indices_by_size(indices, max_positions)[1]
        if len(ignored) > 0:
            size = numpy.array(dataset.size(ignored[0])).tolist()
            raise SampleTooLongError(
                f"{len(ignored):,} of {len(indices):,} samples are longer than the longest sequence of the model, "
                f"{max_positions}; sample {ignored[0]} has {size}: shorten them, raise the limit "
                "(of a language model's checkpoint with --model-overrides \"{'max_target_positions': N}\"), or leave "
                f"them out with {SKIP}"
            )
    function = original("fairseq.tasks.fairseq_task:FairseqTask.filter_indices_by_size")
    return function(self, indices, dataset, max_positions, ignore_invalid_inputs)


def eval_lm_dataloader(self: FairseqTask, dataset: FairseqDataset, **options: Any) -> Iterable[Any]:
    """Replaces `LanguageModelingTask.eval_lm_dataloader`; fairseq-eval-lm does not pass on the option `SKIP`."""
    if options.get("max_positions") is not None and SKIP not in sys.argv:
        self.filter_indices_by_size(dataset.ordered_indices(), dataset, options["max_positions"])
    function = original("fairseq.tasks.language_modeling:LanguageModelingTask.eval_lm_dataloader")
    return function(self, dataset=dataset, **options)


def consume_batches(self: BackgroundConsumer) -> None:
    """Replaces `BackgroundConsumer.run`: the workers of its loader, whose last reference goes here, end after it."""
    original("fairseq.data.iterators:BackgroundConsumer.run")(self)
    if isinstance(self._source, DataLoader):
        self._source._iterator = None


def check_validation_sizes(trainer: Trainer) -> None:
    """Checks the loaded subsets for validation, which fairseq does after the first epoch, before anything is saved."""
    options, task = trainer.cfg.dataset, trainer.task
    limit = utils.resolve_max_positions(task.max_positions(), trainer.model.max_positions())
    if limit is None or options.disable_validation or options.skip_invalid_size_inputs_valid_test:
        return
    for dataset in task.datasets.values():
        task.filter_indices_by_size(dataset.ordered_indices(), dataset, limit)


def get_buckets(sizes: numpy.ndarray, num_buckets: int) -> numpy.ndarray:
    """Replaces fairseq's function of this name: the lengths to which --num-batch-buckets pads."""
    return numpy.unique(numpy.percentile(sizes, numpy.linspace(0, 100, num_buckets + 1), method="lower")[1:])


def infer_dataset_impl(path: str) -> Optional[str]:
    """Replaces fairseq's function of this name: "lazy" and "cached" are one format, read lazily."""
    implementation = original("fairseq.data.indexed_dataset:infer_dataset_impl")(path)
    return "lazy" if implementation == "cached" else implementation


def get_indexed_dataset_to_local(path: str) -> str:
    """Replaces fairseq's function of this name: finds raw text under its full name too."""
    path = original("fairseq.data.indexed_dataset:get_indexed_dataset_to_local")(path)
    exists = IndexedDataset.exists(path) or IndexedRawTextDataset.exists(path)
    return path if exists or not IndexedRawTextDataset.exists(path + RAW_SUFFIX) else path + RAW_SUFFIX


def check_index(path: str) -> None:
    """Checks that the index of a subset is whole and its text not empty; CommandError."""
    index, text = Path(f"{path}.idx"), Path(f"{path}.bin")
    if not index.is_file():
        return
    with index.open("rb") as file:
        head = file.read(26)  # mapped format: 9 bytes of magic, version, type, number of sentences
    if head and not MMapIndexedDataset.Index._HDR_MAGIC.startswith(head[:9]):
        return  # an older format of fairseq
    sentences = int.from_bytes(head[18:], "little")
    if len(head) < 26 or index.stat().st_size < 26 + 12 * sentences:  # 4 bytes of size and 8 of offset for each
        raise CommandError(f"{index} is cut short: prepare the folder anew")
    if not text.is_file() or not text.stat().st_size:
        raise CommandError(f"{text} is missing or empty: prepare the folder anew")


def make_dataset(path: str, impl: str, *args: Any, **kwargs: Any) -> Any:
    """Replaces fairseq's function of this name: CommandError for files that are broken or hold no text."""
    check_index(path)
    try:
        dataset = original("fairseq.data.indexed_dataset:make_dataset")(path, impl, *args, **kwargs)
    except Exception as error:  # such as an .idx that holds something else
        raise CommandError(
            f"{path}.bin and .idx cannot be read ({one_line(error)}): prepare the folder anew"
        ) from error
    if dataset is not None and not len(dataset):
        raise CommandError(f"{path} holds no text: prepare the folder anew")
    try:
        if dataset is not None and not dataset.supports_prefetch:
            dataset[len(dataset) - 1]
    except Exception as error:  # numpy raises it for a .bin that is too short
        tokens = int(dataset.sizes.sum())
        raise CommandError(
            f"{path}.bin does not hold the {tokens:,} tokens of its .idx: prepare the folder anew"
        ) from error
    return dataset


@dataclass(frozen=True)
class WordBeginnings:
    """Where words begin in a line, in the place of fairseq's tensor with one number for each type.

    subword-nmt marks a piece that the next piece continues, so the type alone does not say whether it begins a word:
    `begins` (V,) is whether a type can begin one, `continues` (V,) whether the piece after it continues its word.
    """

    begins: Tensor
    continues: Tensor

    def gather(self, dim: int, tokens: Tensor) -> Tensor:
        """Returns (N,) 1 for each of the (N,) tokens that begins a word, else 0. See `torch.Tensor.gather`."""
        begins = self.begins[tokens].clone()
        begins[1:] &= ~self.continues[tokens[:-1]]
        return begins.byte()


def get_whole_word_mask(args: Any, dictionary: Dictionary) -> Optional[WordBeginnings]:
    """Replaces fairseq's function for the task masked_lm, whose options no longer name the BPE.

    The marks of the types say it: of subword-nmt ("lo@@ west"), of SentencePiece ("▁lo west") or none. Numbers have no
    words: CommandError.
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


def get_iterator_for_epoch(
    self: EpochBatchIterator, epoch: int, shuffle: bool, fix_batches_to_gpus: bool = False, offset: int = 0
) -> Optional[CountingIterator]:
    """Replaces `EpochBatchIterator._get_iterator_for_epoch`; `offset` is the number of batches read before."""
    skip, self.skip_remainder_batch = self.skip_remainder_batch, False
    make = original("fairseq.data.iterators:EpochBatchIterator._get_iterator_for_epoch")
    batches = make(self, epoch, shuffle, fix_batches_to_gpus, offset)
    self.skip_remainder_batch = skip
    return batches.take(offset + len(self.batch_sampler) - 1) if skip and batches is not None else batches
