"""Lines that are longer than --max-tokens: each is a batch of its own."""

import logging
from collections.abc import Callable, Iterable
from typing import Any, Optional

import numpy

from .patch import original

logger = logging.getLogger(__name__)


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
