"""Which tokens a window scores, and with which context. Standard library only.

The text is one stream of N tokens, numbered from 0. Token n is predicted from tokens before it: a window that begins at
token `begin` gives it the n - begin tokens from there on and, before them, the one token in front of the window
(the end of a sentence in front of the stream), as fairseq does. So a window of L tokens has L inputs and L targets.
"""

from collections.abc import Iterator
from itertools import groupby, islice
from typing import NamedTuple


class Window(NamedTuple):
    """Tokens begin, ..., end - 1, of which those from `scored` on are scored; those before are context."""

    begin: int
    scored: int
    end: int

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens, and scored tokens."""
        return self.end - self.begin, self.end - self.scored


def windows(tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Cuts a stream into windows that together score every token exactly once (Press et al. 2022, appendix B).

    With stride = length they do not overlap. Else a window scores its last `stride` tokens, each with at least length -
    stride tokens of context, and is as long as fairseq-eval-lm makes it with --tokens-per-sample `length`
    --context-window `length - stride`. fairseq's windows at the beginning of the stream, which there reach back to its
    first token, are one window here: in a causal model their tokens have the same context in it.
    """
    if length < 1 or stride < 1:
        raise ValueError(f"length {length}, stride {stride}: both must be at least 1")
    if stride > length:
        raise ValueError(f"stride {stride} is longer than the length {length} and would skip tokens")
    first = min(length // stride * stride, tokens)
    if first:
        yield Window(0, 0, first)
    for scored in range(first, tokens, stride):
        yield Window(scored + stride - length, scored, min(scored + stride, tokens))


def batches(cut: Iterator[Window], positions: int) -> Iterator[list[Window]]:
    """Consecutive windows of one shape, as many as hold at most `positions` tokens with their context, at least one."""
    for (length, _), alike in groupby(cut, key=lambda window: window.shape):
        alike = iter(alike)
        while batch := list(islice(alike, max(1, positions // length))):
            yield batch
