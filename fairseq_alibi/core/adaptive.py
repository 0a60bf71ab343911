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

from .kept import in_transform

SCORES = 1 << 22  # scores of types that are made at once


class TokenEmbedding(nn.Embedding):
    """Token embeddings that read another token where a text has `<s>`, token 0; see `nn.Embedding`."""

    def __init__(self, types: int, dim: int, padding: int, begin: int = 0):
        super().__init__(types, dim, padding)
        self.begin = begin

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> (..., C)."""
        return super().forward(tokens.masked_fill(tokens == 0, self.begin))


class AdaptiveEmbedding(nn.Module):
    """Token embeddings of a width for each band, `dim` for the first, projected to `output_dim` = C.

    `cutoffs` are the ends of the bands, the last one V; `factor` divides the width from band to band. `begin` is read
    where a text has `<s>`, token 0.
    """

    def __init__(self, cutoffs: Sequence[int], dim: int, factor: float, output_dim: int, padding: int, begin: int = 0):
        super().__init__()
        self.cutoff, self.output_dim, self.begin = list(cutoffs), output_dim, begin
        self.embeddings = nn.ModuleList()
        for band, (first, last) in enumerate(zip([0, *cutoffs], cutoffs)):
            width = int(dim // factor**band)
            table = nn.Embedding(last - first, width, None if band else padding)
            self.embeddings.append(nn.Sequential(table, nn.Linear(width, output_dim, bias=False)))

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) int64 -> (..., C); IndexError for a token that is in no band, as of `nn.Embedding`."""
        tokens = tokens.masked_fill(tokens == 0, self.begin)
        x: Any = None
        read, transformed = 0, in_transform(tokens)
        for first, last, embedding in zip([0, *self.cutoff], self.cutoff, self.embeddings):
            which = (first <= tokens) & (tokens < last)
            if transformed:  # the number of tokens in a band is a value, so all tokens run through each band
                vectors = embedding((tokens - first).clamp(0, last - first - 1)) * which[..., None]
                x = vectors if x is None else x + vectors
                continue
            own = tokens[which] - first
            # Quantized layers of torchao and bitsandbytes cannot read no tokens, so a band without any reads its first.
            vectors = embedding(own if len(own) else own.new_zeros(1))[: len(own)]
            if x is None:  # parameters may be packed, or on another device until they are used; what they give is not
                x = vectors.new_zeros(*tokens.shape, self.output_dim)
            x[which] = vectors.to(x.dtype)
            read += len(own)
        if not transformed and read < tokens.numel():
            raise IndexError(f"tokens must be numbers from 0 to {self.cutoff[-1] - 1}, one for each type")
        return x

    def last_band(self) -> Any:
        """The table of the rarest types."""
        return self.embeddings[-1][0]  # type: ignore[index]


def resize_rows(module: Any, rows: int) -> None:
    """Gives an `nn.Embedding` or `nn.Linear` without bias other rows: the last ones go, or new ones are the mean."""
    old = module.weight
    added = old.detach().float().mean(0, keepdim=True).to(old.dtype).expand(max(0, rows - len(old)), -1)
    module.weight = nn.Parameter(torch.cat([old.detach()[:rows], added]), requires_grad=old.requires_grad)
    setattr(module, "num_embeddings" if isinstance(module, nn.Embedding) else "out_features", rows)


class TiedLinear(nn.Module):
    """A linear layer without bias whose weight, (outputs, inputs) or transposed, another module has too.

    It is no `nn.Linear`, or peft would train and merge one of the two uses alone.
    """

    def __init__(self, weight: nn.Parameter, transposed: bool = False):
        super().__init__()
        self.weight, self.transposed = weight, transposed

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return F.linear(x, self.weight.t() if self.transposed else self.weight)


class TiedHead(nn.Module):
    """The head of an adaptive softmax whose first band has the vectors, (types, C), of an adaptive input."""

    def __init__(self, table: nn.Parameter, tails: int):
        super().__init__()
        self.word_proj, self.class_proj = TiedLinear(table), nn.Linear(table.size(1), tails, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, C) -> (n, types and bands)."""
        return torch.cat([self.word_proj(x), self.class_proj(x)], dim=-1)


class AdaptiveSoftmax(nn.Module):
    """Log-probabilities of types in bands, see `AdaptiveEmbedding`.

    `dropout` is of what is read and of the hidden units of the tails, in training. The tables of `tied` are the
    output's too and, with `tie_projections`, its projections, transposed.
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
            self.head = TiedHead(tied.embeddings[0][0].weight, tails)  # type: ignore[index, union-attr]
        self.tail = nn.ModuleList()
        for band in range(1, len(cutoffs)):
            table, projection = (None, None) if tied is None else tied.embeddings[band]  # type: ignore[misc]
            width = int(dim // factor**band) if table is None else table.embedding_dim
            narrow: nn.Module = nn.Linear(dim, width, bias=False)
            if projection is not None and tie_projections:
                narrow = TiedLinear(projection.weight, transposed=True)
                tied.embeddings[band][1] = TiedLinear(projection.weight)  # type: ignore[index, union-attr, operator]
            types = cutoffs[band] - cutoffs[band - 1]
            out = nn.Linear(width, types, bias=False) if table is None else TiedLinear(table.weight)
            self.tail.append(nn.Sequential(narrow, nn.Dropout(dropout), out))

    def __getattr__(self, name: str) -> Any:
        """Says what is missing to those who take this for a linear layer."""
        if name in ("weight", "bias"):
            raise AttributeError(
                f"an adaptive softmax has no {name}: its log-probabilities are not linear in the hidden states; "
                "call the model for logits, or train a model with a plain softmax"
            )
        return super().__getattr__(name)

    def forward(self, features: Tensor) -> Tensor:
        """(..., C) -> (..., V) log-probabilities of all types, float32."""
        bands = [F.log_softmax(project(features), dim=-1, dtype=torch.float32) for project in (self.head, *self.tail)]
        types, priors = bands[0].split([self.cutoff[0], len(self.tail)], dim=-1)
        return torch.cat([types, *(tail + priors[..., n : n + 1] for n, tail in enumerate(bands[1:]))], dim=-1)

    def last_band(self) -> Any:
        """The output layer of the rarest types; ValueError for a softmax of one band, which is the head."""
        if not self.tail:
            raise ValueError("an adaptive softmax with one band cannot be resized")
        return self.tail[-1][2]  # type: ignore[index]

    def losses(self, features: Tensor, targets: Tensor) -> Tensor:
        """See `target_losses`."""
        return target_losses(self, self.dropout(features), targets)


def cross_entropies(project: Callable[[Tensor], Tensor], features: Tensor, targets: Tensor, types: int) -> Tensor:
    """-log softmax(project(features)) at the targets, some rows at a time: (n,) float32, nats.

    (n, C) `features`, (n,) int64 `targets`, `project` maps (n, C) to (n, V) scores; V = `types`.
    """
    rows = max(1, SCORES // types)
    chunks = zip(features.split(rows), targets.split(rows))
    return torch.cat([F.cross_entropy(project(x).float(), wanted, reduction="none") for x, wanted in chunks])


def target_losses(softmax: Any, features: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) of an adaptive softmax, without a tensor of n x V elements: the head's loss and the own tail's.

    `softmax` has `head`, `tail` and `cutoff`, as fairseq's. (n, C) features, (n,) int64 targets -> (n,) float32, nats.
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
