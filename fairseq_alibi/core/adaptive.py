"""Adaptive input and softmax, and the loss of targets without the scores of all types. Pure torch, no fairseq.

Frequent types come first. Bands of rarer ones have narrower vectors (Grave et al. 2017; Baevski and Auli 2019): of the
output, the head tells the types of the first band and the other bands, and a band's tail tells the types in it.
Parameters have the names of fairseq's, and `target_losses` takes fairseq's adaptive softmax as well as this one.

Shapes: n tokens, C model width, V types.
"""

from collections.abc import Sequence
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Scores of types that are made at once.
SCORES = 1 << 22


class AdaptiveEmbedding(nn.Module):
    """Token embeddings, of a width for each band, projected to one width.

    Args:
        cutoffs: the end of each band, the last one V.
        dim: width of the first band.
        factor: what the width is divided by from band to band.
        output_dim: C.
        padding: the token that is padding.
    """

    def __init__(self, cutoffs: Sequence[int], dim: int, factor: float, output_dim: int, padding: int):
        super().__init__()
        self.cutoffs, self.output_dim = list(cutoffs), output_dim
        self.embeddings = nn.ModuleList()
        for band, (first, last) in enumerate(zip([0, *cutoffs], cutoffs)):
            width = int(dim // factor**band)
            table = nn.Embedding(last - first, width, None if band else padding)
            self.embeddings.append(nn.Sequential(table, nn.Linear(width, output_dim, bias=False)))

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> (..., C)."""
        x = next(self.parameters()).new_zeros(*tokens.shape, self.output_dim)
        for first, last, embedding in zip([0, *self.cutoffs], self.cutoffs, self.embeddings):
            which = (first <= tokens) & (tokens < last)
            x[which] = embedding(tokens[which] - first).to(x.dtype)  # autocast has another
        return x


class BorrowedLinear(nn.Module):
    """A linear layer without bias that uses the weight of another module, which alone names it in a state dict.

    Args:
        owner: has the `weight`, (outputs, inputs).
        transposed: whether that is (inputs, outputs).
    """

    def __init__(self, owner: nn.Module, transposed: bool = False):
        super().__init__()
        self.owner, self.transposed = (owner,), transposed  # in a tuple, or it would be registered here too

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        weight: Any = self.owner[0].weight
        return F.linear(x, weight.t() if self.transposed else weight)


class BorrowedHead(nn.Module):
    """The head of an adaptive softmax that has the types of the first band from an adaptive input.

    Args:
        owner: table of the first band, (types, C).
        dim: C.
        tails: number of the other bands.
    """

    def __init__(self, owner: nn.Module, dim: int, tails: int):
        super().__init__()
        self.word_proj, self.class_proj = BorrowedLinear(owner), nn.Linear(dim, tails, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, C) -> (n, types and bands)."""
        return torch.cat([self.word_proj(x), self.class_proj(x)], dim=-1)


class AdaptiveSoftmax(nn.Module):
    """Log-probabilities of types in bands.

    Args:
        cutoffs: the end of each band, the last one V.
        dim: C.
        factor: what the width of a tail is divided by from band to band.
        dropout: of what is read and of the hidden units of the tails, in training.
        tied: adaptive input with the same bands, whose tables are the output's too; None for own ones.
        tie_projections: whether its projections are the output's too, transposed.
    """

    def __init__(
        self,
        cutoffs: Sequence[int],
        dim: int,
        factor: float,
        dropout: float = 0.0,
        tied: Optional[AdaptiveEmbedding] = None,
        tie_projections: bool = False,
    ):
        super().__init__()
        self.cutoff, tails = list(cutoffs), len(cutoffs) - 1
        self.dropout = nn.Dropout(dropout)
        self.head: nn.Module = nn.Linear(dim, cutoffs[0] + tails, bias=False)
        if tied is not None:
            first_band: Any = tied.embeddings[0]
            self.head = BorrowedHead(first_band[0], dim, tails)
        self.tail = nn.ModuleList()
        for band in range(1, len(cutoffs)):
            pair: Any = (None, None) if tied is None else tied.embeddings[band]
            table, projection = pair
            width = int(dim // factor**band) if table is None else table.embedding_dim
            types = cutoffs[band] - cutoffs[band - 1]
            borrowed = projection is not None and tie_projections
            narrow = BorrowedLinear(projection, transposed=True) if borrowed else nn.Linear(dim, width, bias=False)
            out = nn.Linear(width, types, bias=False) if table is None else BorrowedLinear(table)
            self.tail.append(nn.Sequential(narrow, nn.Dropout(dropout), out))

    def forward(self, features: Tensor) -> Tensor:
        """(..., C) -> (..., V) log-probabilities of all types, float32."""
        bands = [F.log_softmax(project(features), dim=-1, dtype=torch.float32) for project in (self.head, *self.tail)]
        types, priors = bands[0].split([self.cutoff[0], len(self.tail)], dim=-1)
        return torch.cat([types, *(tail + priors[..., n : n + 1] for n, tail in enumerate(bands[1:]))], dim=-1)

    def losses(self, features: Tensor, targets: Tensor) -> Tensor:
        """See `target_losses`."""
        return target_losses(self, self.dropout(features), targets)


def cross_entropies(project: Callable[[Tensor], Tensor], features: Tensor, targets: Tensor, types: int) -> Tensor:
    """-log softmax(project(features)) at the targets, some rows at a time: (n,) float32, nats.

    Args:
        project: (n, C) -> (n, V) scores.
        features: (n, C).
        targets: (n,) int64.
        types: V.
    """
    rows = max(1, SCORES // types)
    chunks = zip(features.split(rows), targets.split(rows))
    return torch.cat([F.cross_entropy(project(x).float(), wanted, reduction="none") for x, wanted in chunks])


def target_losses(softmax: Any, features: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of an adaptive softmax, without a tensor of n x V elements: the head's loss and the own tail's.

    Args:
        softmax: has `head`, `tail` and `cutoff`: `AdaptiveSoftmax`, or fairseq's.
        features: (n, C).
        targets: (n,) int64.

    Returns:
        (n,) float32, nats.
    """
    frequent, in_head, own = softmax.cutoff[0], targets, []
    for band, (tail, first, last) in enumerate(zip(softmax.tail, softmax.cutoff, softmax.cutoff[1:])):
        which = ((first <= targets) & (targets < last)).nonzero()[:, 0]
        if len(which):
            in_head = in_head.index_fill(0, which, frequent + band)
            own.append((which, cross_entropies(tail, features[which], targets[which] - first, last - first)))
    losses = cross_entropies(softmax.head, features, in_head, frequent + len(softmax.tail))
    for which, more in own:
        losses = losses.index_add(0, which, more)
    return losses
