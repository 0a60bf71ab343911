"""The result of one model on one text with one windowing.

Three windowings give the tokens of a text their context; L is the length of a window in tokens:

non-overlapping   Blocks of L tokens. A token sees its own block only, so tokens early in a block see little context.
sliding window    Windows of L tokens, each `stride` tokens after the one before. A window scores its last `stride`
                  tokens.
streaming         No windows. In every layer a token attends to the last L tokens, itself included; L may be that of
                  the text.

The first two are those of the paper (Press et al. 2022, section 4 and appendix B) and give the loss of fairseq-eval-lm.
A masked language model has the first only: it predicts the masked tokens, the same 15% at any length, in blocks that
begin with <s>, as fairseq's task masked_lm makes them.
"""

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import numpy
import torch
from fairseq.models import BaseFairseqModel
from fairseq.models.roberta import RobertaModel
from torch import Tensor
from tqdm import tqdm

from ..files.results import now
from . import processes
from .scoring import ScoredTokens, masked_tokens, score_masked, score_stream, score_windows
from .text import EvaluationText, token_measures
from .windows import batches, windows


class Windowing(NamedTuple):
    """How a text is cut: windows of `length` tokens every `stride` tokens; stride None is streaming."""

    length: int
    stride: Optional[int]

    @property
    def name(self) -> str:
        """The name in messages and in files of token losses."""
        return f"length {self.length}, " + ("streaming" if self.stride is None else f"stride {self.stride}")


def position_bins(length: int) -> list[int]:
    """First positions of the bins over which losses are averaged: single positions up to 8, then four per octave."""
    edges = [*range(8), *(round(2 ** (n / 4)) for n in range(12, 4 * length.bit_length() + 1))]
    return [edge for edge in dict.fromkeys(edges) if edge < length]


def losses_by_position(losses: Tensor, windowing: Windowing, positions: int) -> list[dict[str, Any]]:
    """Mean loss by position in the window, of the (N,) losses of all tokens in bits, not streaming.

    Returns for each bin in which tokens were scored: first and last position, tokens, loss in bits. Positions count
    from the window's start, 0; a token at position p has p tokens of its window before it.
    """
    longest = min(windowing.length, len(losses))
    sums, counts = numpy.zeros(longest), numpy.zeros(longest, dtype=int)
    for batch in batches(windows(len(losses), windowing.length, windowing.stride or 0), positions):
        tokens, scored = batch[0].shape
        batch_losses = losses[batch[0].scored : batch[-1].end].view(len(batch), scored)
        sums[tokens - scored : tokens] += batch_losses.double().sum(0).numpy()
        counts[tokens - scored : tokens] += len(batch)
    edges = position_bins(windowing.length)
    bins = []
    for first, end in zip(edges, [*edges[1:], windowing.length]):
        tokens = int(counts[first:end].sum())
        if tokens:
            mean = float(sums[first:end].sum()) / tokens
            bins.append({"first": first, "last": end - 1, "tokens": tokens, "loss": mean})
    return bins


def score_share(
    model: BaseFairseqModel, text: EvaluationText, windowing: Windowing, positions: int
) -> Iterator[ScoredTokens]:
    """Scores this process' share of a text, in the order of the text."""
    share = (processes.rank(), processes.count())
    if isinstance(model, RobertaModel):
        return score_masked(model, text.stream, windowing.length, positions, share)
    if windowing.stride is None:
        return score_stream(model, text.stream, windowing.length, text.first_token)
    return score_windows(model, text.stream, windowing.length, windowing.stride, positions, share, text.first_token)


def score_text(
    model: BaseFairseqModel, text: EvaluationText, windowing: Windowing, positions: int, title: str = ""
) -> Tensor:
    """Scores a text with a progress bar: (N,) float32 losses of all tokens, bits, in every process.

    `positions` is of a batch, in tokens, context included. ValueError: a loss is not finite, or the model does not
    support the windowing.
    """
    losses = torch.full((text.tokens,), math.inf)
    hidden = None if processes.is_first() else True
    with tqdm(total=text.tokens, desc=title, unit=" tokens", unit_scale=True, disable=hidden) as bar:
        with processes.fail_together():
            for first, nats in score_share(model, text, windowing, positions):
                bits = nats.flatten() / math.log(2)
                if len(wrong := bits[~bits.isfinite()]):
                    raise ValueError(f"{windowing.name}: a loss is {wrong[0]:g}; the model has diverged")
                losses[first : first + len(bits)] = bits
                bar.update(first + len(bits) - bar.n)
        processes.merge_minimum(losses)  # tokens outside of this process' share are still infinite
        bar.update(text.tokens - bar.n)
    return losses


def evaluate_model(
    model: BaseFairseqModel,
    text: EvaluationText,
    windowing: Windowing,
    positions: int = 4096,
    by_position: bool = False,
    title: str = "",
) -> tuple[dict[str, Any], Tensor]:
    """Evaluates a model on a text with one windowing; see `score_text`.

    Returns the result (length, stride, tokens, loss, perplexity, ...), and the (N,) float32 losses of all tokens in
    bits. A masked language model scores masked tokens only; the others are NaN.
    """
    is_masked_model = isinstance(model, RobertaModel)
    if is_masked_model and (windowing.stride != windowing.length or by_position):
        raise ValueError(
            "a masked language model reads what is after a token too: it has no sliding window, stream or loss by "
            "position; drop the option"
        )
    started = time.perf_counter()
    losses = score_text(model, text, windowing, positions, title)
    seconds = time.perf_counter() - started
    bits = losses.double().sum().item()
    if is_masked_model:
        masked = masked_tokens(text.tokens)
        measures = {**token_measures(bits, int(masked.sum())), "of_tokens": text.tokens}
        losses[~masked] = math.nan
    else:
        measures = text.measures(bits, windowing.stride)
    result = {
        "length": windowing.length,
        "stride": windowing.stride,
        "context_window": None if windowing.stride is None else windowing.length - windowing.stride,
        **measures,
        "seconds": round(seconds, 2),
        "tokens_per_second": round(text.tokens / seconds, 1),
        "finished": now(),
    }
    if by_position:
        result["by_position"] = losses_by_position(losses, windowing, positions)
    return result, losses
