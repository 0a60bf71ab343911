"""Lines longer than --max-tokens, each of which is a batch of its own, and lines that a model cannot read."""

import logging
import sys
from collections.abc import Callable, Iterable
from typing import Any, Optional

import numpy
from fairseq import utils
from fairseq.data import FairseqDataset
from fairseq.tasks import FairseqTask
from fairseq.trainer import Trainer

from .patch import CommandError, original

logger = logging.getLogger(__name__)

#: With this option fairseq leaves out samples that are too long.
SKIP = "--skip-invalid-size-inputs-valid-test"


class SampleTooLongError(CommandError):
    """A sample is longer than the longest sequence of a model."""


def batch_by_size(
    indices: Iterable[int],
    num_tokens_fn: Callable[[int], int],
    num_tokens_vec: Optional[Iterable[int]] = None,
    max_tokens: Optional[int] = None,
    **options: Any,
) -> list[Any]:
    """Replaces `fairseq.data.data_utils.batch_by_size`, which fails at a sample longer than `max_tokens`.

    Such a sample counts as `max_tokens` tokens here, so nothing else fits into its batch.
    """
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
    """Replaces `FairseqTask.filter_indices_by_size`.

    Raises:
        SampleTooLongError: A sample is longer than `max_positions`, and `ignore_invalid_inputs` is not set.
    """
    if not ignore_invalid_inputs:
        ignored = dataset.filter_indices_by_size(indices, max_positions)[1]
        if len(ignored) > 0:
            raise SampleTooLongError(
                f"{len(ignored):,} of {len(indices):,} samples are longer than the longest sequence of the model, "
                f"{max_positions}; sample {ignored[0]} has {dataset.size(ignored[0])}: shorten them, raise the limit "
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


def check_validation_sizes(trainer: Trainer) -> None:
    """Checks the loaded subsets for validation, which fairseq does after the first epoch, before anything is saved.

    Raises:
        SampleTooLongError: See `filter_indices_by_size`.
    """
    options, task = trainer.cfg.dataset, trainer.task
    limit = utils.resolve_max_positions(task.max_positions(), trainer.model.max_positions())
    if limit is None or options.disable_validation or options.skip_invalid_size_inputs_valid_test:
        return
    for dataset in task.datasets.values():
        task.filter_indices_by_size(dataset.ordered_indices(), dataset, limit)
