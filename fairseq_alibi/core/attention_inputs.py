"""What attention needs in every layer of a stack, made once before the layer loop and passed as one argument.

Shapes: B batch, H heads, T queries, S keys (the last T of the S positions are the queries), D head_dim.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

from torch import Tensor

#: Weight that the keys which attention skips for their distance may have together, of 1 for all keys of a query.
EPSILON = 1e-7

#: Keyword-only arguments, which Python 3.9 does not have.
KEYWORD_ONLY: dict[str, bool] = {"kw_only": True} if sys.version_info >= (3, 10) else {}


@dataclass(frozen=True)
class NoBias:
    """Nothing is added to the scores."""


@dataclass(frozen=True)
class LinearBias:
    """The bias -before * distance for keys before a query, after * distance for keys after it, without gradients."""

    before: Tensor  # (H,) float32 slopes, infinite where a head sees nothing
    after: Optional[Tensor] = None  # the same; None in causal attention


@dataclass(frozen=True)
class DistanceBias:
    """A bias that is any function of the distance; gradients flow through it."""

    #: (H, T + S - 1) or (1, T + S - 1) float32, of the distances 1 - T, ..., S - 1, -inf where a head sees nothing.
    values: Tensor


@dataclass(frozen=True)
class KeyBias:
    """The bias c_i - c_j for query i and key j, c the running sum of decays; gradients flow through it."""

    sums: Tensor  # (B, H, S) float64, c of each key, which does not rise along a row


@dataclass(frozen=True)
class PairBias:
    """A bias that is computed when its tile is; gradients flow through it."""

    of_tile: Callable[[Tensor, Tensor], Tensor]  # see `PositionMethod.bias_of_tile`
    positions: Tensor  # (T,) or (B, T), of the queries


@dataclass(frozen=True)
class FoldedMask:
    """The bias and what is not seen as one mask, see `PositionMethod.future_mask`."""

    #: (H, T, S) or (1, T, S), T = 1 for a mask that all queries share; (B, H, T, S) where rows differ; float32 or the
    #: dtype of the attention.
    mask: Tensor


Bias = Union[NoBias, LinearBias, DistanceBias, KeyBias, PairBias, FoldedMask]


@dataclass(frozen=True, **KEYWORD_ONLY)
class AttentionInputs:
    """The one argument that attention gets beside the layer's input; None is for no such thing, or all.

    ValueError: a window or a cache where queries see the keys after them, or a linear bias of the other kind.
    """

    bias: Bias = dataclasses.field(default_factory=NoBias)  # what is added to the scores
    causal: bool = True  # a query sees no key after it; a `FoldedMask` says so by itself
    padding: Optional[Tensor] = None  # (B, S) bool, True at keys that are hidden because they are padding
    window: Optional[int] = None  # number of keys that a query sees, the last ones, itself included
    queries: Optional[int] = None  # number of queries, the last ones, that the layer computes
    rotation: Optional[Tensor] = None  # (2 or 4, T, D / 2) of the new tokens, see `PositionMethod.rotation`
    query_scale: Optional[Tensor] = None  # (B or 1, H or 1, T) factors, see `PositionMethod.query_scale`
    cache: Any = None  # holds keys and values of the tokens before these and gets those of these
    epsilon: float = EPSILON  # weight of 1 that keys skipped for their distance may have, see `reach`; 0 skips none
    plain: Optional["AttentionInputs"] = None  # of layers without the position method, where there are such layers
    weights: Optional[list[Tensor]] = None  # each layer appends its attention weights to it, under a mask only

    def __post_init__(self) -> None:
        """Checks the inputs against each other."""
        for name in ("window", "cache"):
            if getattr(self, name) is not None and not self.causal:
                raise ValueError(f"a {name} needs causal=True: without it earlier tokens would see the new ones")
        if isinstance(self.bias, LinearBias) and self.causal != (self.bias.after is None):
            kind = "has none" if self.causal else "needs one"
            raise ValueError(f"causal={self.causal}: a linear bias then {kind} for the keys after a query")

    def with_decay(self, sums: Tensor, queries: int) -> "AttentionInputs":
        """The same with the bias by key of a layer, see `KeyBias`, folded into the mask if there is one.

        Where the `queries` that the layer computes are not the last keys, as in a cache of a fixed size, a constant is
        added to their scores, which softmax ignores.
        """
        bias: Bias = KeyBias(sums)
        if isinstance(self.bias, FoldedMask):
            mask = self.bias.mask if self.bias.mask.dim() == 4 else self.bias.mask[None]
            decay = sums[:, :, -queries:, None] - sums[:, :, None]
            bias = FoldedMask(mask[:, :, -queries:] + decay.to(mask.dtype))
        return dataclasses.replace(self, bias=bias)

    def to(self, device: Any, non_blocking: bool = False) -> "AttentionInputs":
        """The same on another device; accelerate calls it in front of a layer that is on another one."""

        def moved(item: Any) -> Any:
            tensors = {name: value for name, value in vars(item).items() if isinstance(value, Tensor)}
            return dataclasses.replace(item, **{name: x.to(device, None, non_blocking) for name, x in tensors.items()})

        plain = None if self.plain is None else self.plain.to(device, non_blocking)
        return dataclasses.replace(moved(self), bias=moved(self.bias), plain=plain)


class TokenSpan(NamedTuple):
    """The new tokens of a pass among all tokens."""

    queries: int  # T
    keys: int  # S, those that they may see, themselves included
    first: int  # position of the first new token; more than S - T where older keys were dropped
