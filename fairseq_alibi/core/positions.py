"""Position methods: how a model knows where its tokens are. Pure torch, usable without fairseq.

A position method is a subclass of `PositionMethod` in a file of its own. `register_position_method` gives it the name
that `--position-method` takes. The built-in methods are listed in `methods.py`; the bias of ALiBi is in `alibi.py`.
Shapes: H heads, T queries, S keys (the last T of the S positions are the queries), D head_dim, C width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import field
from typing import Any, ClassVar, Optional, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DECODER, ENCODER = "decoder", "encoder"  # the stacks in which a position method can work

#: What the bias of a method depends on, see `PositionMethod.bias_kind`.
BIAS_KINDS = ("none", "linear", "distance", "key", "pair")


def distances(query_length: int, key_length: int, device: Optional[torch.device] = None) -> Tensor:
    """(T, S) int64 i - j from each query to each key: 0 for a token itself, negative for keys in the future."""
    positions = torch.arange(key_length, device=device)
    return positions[key_length - query_length :, None] - positions[None, :]


def option_field(default: Any, help: str, choices: Sequence[str] = ()) -> Any:
    """An option of a command line as a field of a dataclass; see `PositionMethod.options`."""
    return field(default=default, metadata={"help": help, **({"choices": choices} if choices else {})})


class PositionMethod(nn.Module):
    """Base of all position methods, of H = `num_heads` heads. Class attributes say what a method does, methods say how.

    A method overrides what its attributes announce and nothing else; `register_position_method` checks that. It is a
    module, so it may have parameters, which all layers share.
    """

    name: ClassVar[str] = ""  # name in `--position-method`; `register_position_method` sets it
    #: A dataclass with the method's own options, or None. `fairseq-train --help` shows them. A field's metadata has
    #: "help" and, where only some values are allowed, "choices".
    options: ClassVar[Optional[type]] = None
    adds_embedding: ClassVar[bool] = False  # whether `position_embedding` is added to the token embeddings
    #: Whether token embeddings need their usual factor sqrt(C) beside the position embedding, even in RoBERTa.
    needs_scaled_tokens: ClassVar[bool] = False
    rotates: ClassVar[bool] = False  # whether `rotation` turns queries and keys
    needs_wide_exponents: ClassVar[bool] = False  # whether float16 is too narrow for what `rotation` returns
    scales_queries: ClassVar[bool] = False  # whether `query_scale` multiplies queries, and so the scores
    #: What is added to the scores: "none"; "linear": a slope per head times the distance (`slopes`); "distance": any
    #: function of the distance (`distance_bias`); "key": a decay per token and head that a module in each layer reads
    #: from the layer's input (`make_gate`), decoders only; "pair": anything else, which needs a mask (`pair_bias`).
    bias_kind: str = "none"
    #: Whether a "pair" bias is also given tile by tile (`bias_of_tile`), so that attention needs no mask.
    gives_bias_of_tiles: ClassVar[bool] = False
    #: Whether sequences longer than those of the training have no positions.
    limited_to_training_length: ClassVar[bool] = False
    #: Place in the paper's comparison past the training length, the best first (Press et al. 2022, figures 1 and 4).
    paper_rank: ClassVar[Optional[int]] = None

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    @classmethod
    def from_options(cls, num_heads: int, embed_dim: int, options: Any) -> "PositionMethod":
        """Builds the method for a model of width `embed_dim` from its options, those of the method among them."""
        return cls(num_heads)

    @property
    def has_distance_bias(self) -> bool:
        """Whether there is a bias and it depends on the distance alone, so that attention needs no mask."""
        return self.bias_kind in ("linear", "distance")

    def forward(self, make: Callable[..., Any], *arguments: Any) -> Any:
        """Calls what makes attention inputs of this method, so that hooks load and move its parameters before."""
        return make(*arguments)

    def set_evaluation_length(self, length: int) -> None:
        """Adapts the method to the length of the windows, in tokens, that are evaluated next."""

    def position_embedding(self, embed_dim: int, length: int, padding_idx: int) -> Optional[nn.Module]:
        """The module that is added to the token embeddings if `adds_embedding`, else None.

        Its forward takes (B, T) int64 positions and the number of tokens in a row, earlier ones too, and returns (B, T,
        C). A table ends at `length` tokens. As in fairseq the first token has the position after that of padding.
        """
        return None

    def rotation(self, first: int, last: int, device: Optional[torch.device] = None) -> Optional[Tensor]:
        """Cosines and sines by which queries and keys are turned if `rotates`, see `rotary.rotate`.

        (2, last - first, D / 2) float32 for the positions first, ..., last - 1; or (4, last - first, D / 2), those of
        queries and those of keys.
        """
        return None

    def query_scale(self, visible: Tensor) -> Optional[Tensor]:
        """Factors of the queries if `scales_queries`, from the number of keys that each sees, itself included.

        (B or 1, T) int64 -> (B or 1, H or 1, T) float32.
        """
        return None

    def slopes(self, device: Optional[torch.device] = None) -> tuple[Tensor, Optional[Tensor]]:
        """Slopes of a "linear" bias for keys before and after the query, at least 0.

        Two (H,) float32, infinite where a head sees nothing. The second is None for a causal bias.
        """
        raise NotImplementedError

    def distance_bias(self, distance: Tensor) -> Tensor:
        """Bias by distance, added to the scores after their division by sqrt(D), for the kinds "linear" and "distance".

        (N,) int64 distances i - j from query i to key j -> (H, N) float32, -inf where a head sees nothing. A causal
        model does not see keys at negative distances, whatever is returned.
        """
        return linear_bias(*self.slopes(distance.device), distance)

    def make_gate(self, embed_dim: int) -> Optional[nn.Module]:
        """The module, with parameters, that gives the decays of a "key" bias in one layer; else None.

        It maps the layer's input (..., C) to (..., H) float32, at most 0: f_l. The bias of query i and key j <= i is
        the sum of f_l over j < l <= i.
        """
        return None

    def bias_of_tile(self, positions: Tensor, distance: Tensor) -> Tensor:
        """A "pair" bias (H, T, S), of queries at positions (T,) in their row; (B, H, T, S) of (B, T) if rows differ."""
        raise NotImplementedError

    def early_bias(self, distance: Tensor, positions: int) -> Optional[Tensor]:
        """`distance_bias` of a "pair" bias that depends on the distance alone up to so many positions; else None."""
        return None

    def pair_bias(self, query_length: int, key_length: int, device: Optional[torch.device] = None) -> Optional[Tensor]:
        """Bias of each query and key: (H, T, S) float32, or None without a bias. Overridden for the kind "pair"."""
        if not self.has_distance_bias:
            return None
        if torch.compiler.is_compiling():  # unfold fixes the length of a graph
            values = self.distance_bias(torch.arange(key_length - 1, -query_length, -1, device=device))
            return values[:, key_length - 1 - distances(query_length, key_length, device)]
        return by_distance(self.distance_bias, query_length, key_length, device)

    def future_mask(
        self,
        query_length: int,
        key_length: int,
        window: Optional[int] = None,
        device: Optional[torch.device] = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """The bias folded into the causal mask, computed in float32: -inf where a key lies in a query's future.

        (H, T, S), or (1, T, S) for a method without bias, added to the scores of every batch row. `window` is the
        number of keys that a query sees, the last ones, itself included; None for all.
        """
        window = key_length if window is None else window

        def hidden(distance: Tensor) -> Tensor:
            return (distance < 0) | (distance >= window)

        def seen(distance: Tensor) -> Tensor:
            bias = self.distance_bias(distance) if self.has_distance_bias else torch.zeros_like(distance).float()[None]
            return bias.masked_fill(hidden(distance), -math.inf).to(dtype)

        if self.bias_kind != "pair" and not torch.compiler.is_compiling():
            return by_distance(seen, query_length, key_length, device)
        bias = self.pair_bias(query_length, key_length, device)
        bias = torch.zeros(1, query_length, key_length, device=device) if bias is None else bias
        # The mask is the largest tensor at long lengths, so it is changed in place unless autograd may need the bias.
        fill = bias.masked_fill if bias.requires_grad else bias.masked_fill_
        return aligned(fill(hidden(distances(query_length, key_length, device)), -math.inf).to(dtype))

    def full_mask(
        self, length: int, device: Optional[torch.device] = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """The mask of an encoder, whose queries see the keys after them too: the bias (H, S, S), or zeros (1, 1, S)."""
        if self.has_distance_bias and not torch.compiler.is_compiling():
            return by_distance(lambda distance: self.distance_bias(distance).to(dtype), length, length, device)
        bias = self.pair_bias(length, length, device)
        return torch.zeros(1, 1, length, device=device, dtype=dtype) if bias is None else bias.to(dtype)


def aligned(mask: Tensor) -> Tensor:
    """A mask whose rows lie a multiple of 16 numbers apart on a GPU, or its kernels would copy it in every layer."""
    keys = mask.size(-1)
    if mask.device.type == "cpu" or mask.size(-2) == 1 or mask.stride(-2) % 16 == 0:
        return mask
    return F.pad(mask, (0, -keys % 16))[..., :keys]


def by_distance(
    values: Callable[[Tensor], Tensor], query_length: int, key_length: int, device: Optional[torch.device] = None
) -> Tensor:
    """(H, T, S) numbers that depend on the distance alone, (N,) -> (H, N) `values`, with no larger tensor on the way.

    The rows of the result lie as those of `aligned`.
    """
    width = key_length + (0 if device is None or torch.device(device).type == "cpu" else -key_length % 16)
    # From the longest distance down; row t of the result is the part that ends at its own distance.
    distance = torch.arange(key_length - 1, key_length - query_length - width, -1, device=device)
    rows = values(distance).unfold(1, width, 1)
    if query_length >= width:
        return rows.flip(1)[..., :key_length]
    # Here flip would lay columns, not rows, side by side.
    return rows.index_select(1, torch.arange(query_length - 1, -1, -1, device=device))[..., :key_length]


def linear_bias(before: Tensor, after: Optional[Tensor], distance: Tensor) -> Tensor:
    """The bias -before * distance for keys before a query, after * distance for keys after it, 0 for its own key.

    (H,) slopes, infinite for a head that sees nothing there, None where none does; (N,) i - j -> (H, N).
    """
    ahead = -math.inf if after is None else after[:, None] * distance
    others = torch.where(distance < 0, ahead, 0.0).to(before.dtype)  # of two numbers it is of torch's default dtype
    return torch.where(distance > 0, -before[:, None] * distance, others)


#: Registered methods by stack and name.
_METHODS: dict[str, dict[str, type[PositionMethod]]] = {DECODER: {}, ENCODER: {}}

#: Functions that are called after each registration, so that the options of models stay complete.
_LISTENERS: list[Callable[[], None]] = []

Method = TypeVar("Method", bound=type[PositionMethod])

#: What a method has to override where an attribute announces it.
_HOOKS = {
    "adds_embedding": "position_embedding",
    "rotates": "rotation",
    "scales_queries": "query_scale",
    "gives_bias_of_tiles": "bias_of_tile",
}
_BIAS_HOOKS = {"linear": "slopes", "distance": "distance_bias", "key": "make_gate", "pair": "pair_bias"}


def register_position_method(name: str, stacks: Sequence[str] = (DECODER,)) -> Callable[[Method], Method]:
    """Decorator that makes a subclass of `PositionMethod` a value of `--position-method`, from any package.

    It may run before or after the models of fairseq are registered. For an encoder the bias has to serve negative
    distances too. ValueError: the name is taken, or attributes and methods of the class contradict each other.
    """

    def register(method: Method) -> Method:
        check_announcements(name, method)
        for stack in stacks:
            other = _METHODS[stack].get(name)
            if other is not None and (other.__module__, other.__qualname__) != (method.__module__, method.__qualname__):
                raise ValueError(
                    f"position method '{name}' is taken by {other.__module__}.{other.__qualname__}: choose another name"
                )
            _METHODS[stack][name] = method
        method.name = name
        for listener in _LISTENERS:
            listener()
        return method

    return register


def check_announcements(name: str, method: type[PositionMethod]) -> None:
    """Raises ValueError unless a class overrides just what its attributes announce."""
    if method.bias_kind not in BIAS_KINDS:
        raise ValueError(f"position method '{name}': bias_kind '{method.bias_kind}' is none of {', '.join(BIAS_KINDS)}")
    announced = {hook: bool(getattr(method, attribute)) for attribute, hook in _HOOKS.items()}
    announced.update({hook: method.bias_kind == kind for kind, hook in _BIAS_HOOKS.items()})
    for hook, wanted in announced.items():
        overridden = getattr(method, hook) is not getattr(PositionMethod, hook)
        if wanted and not overridden:
            raise ValueError(f"position method '{name}' announces what {hook}() returns, but does not define {hook}()")
        if overridden and not wanted:
            attribute = next((key for key, value in _HOOKS.items() if value == hook), "bias_kind")
            raise ValueError(f"position method '{name}' defines {hook}(), but its attribute {attribute} says otherwise")


def add_registration_listener(listener: Callable[[], None]) -> None:
    """Has a function called after each later registration of a position method."""
    _LISTENERS.append(listener)


def position_methods(stack: str = DECODER) -> dict[str, type[PositionMethod]]:
    """The registered position methods of a stack, by name, in the order of their registration."""
    return dict(_METHODS[stack])
