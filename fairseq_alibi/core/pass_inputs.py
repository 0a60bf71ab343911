"""What transformers passes to a model, masks, positions and caches, as `AttentionInputs`.

Shapes: B batch, H heads, T new tokens, S keys. A cache may hold keys that are not written yet, behind the new tokens (a
static cache), or lack the oldest ones (a sliding cache); `KeyLayout` tells which positions the S keys have.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache as TransformersCache
from transformers import QuantizedCache

from .attention_inputs import AttentionInputs, FoldedMask, TokenSpan
from .attention_setup import AttentionSetup, compute_dtype
from .bounded_cache import BoundedCache
from .configuration_alibi import PADDING, VERSION
from .kept import in_transform
from .layers import CachedTensors

HIDDEN = -1e4  # numbers up to this one in a mask that is added to the scores hide a key


@dataclass(frozen=True)
class KeyLayout:
    """Positions of the new tokens and of the keys in a sequence."""

    queries: int  # T
    keys: int  # S
    first: Union[int, Tensor] = 0  # position of the first new token; a tensor for a static cache in compiled code
    offset: int = 0  # position of the first key

    @property
    def is_plain(self) -> bool:
        """Whether the keys are those of all tokens so far, the new ones last."""
        return not isinstance(self.first, Tensor) and self.offset == 0 and self.keys == self.first + self.queries

    def new_positions(self, device: torch.device) -> Tensor:
        """(T,) int64 positions of the new tokens."""
        return torch.arange(self.queries, device=device) + self.first

    def distances_to_keys(self, device: torch.device) -> Tensor:
        """(T, S) int64 distances from the new tokens to the keys, negative for keys after them."""
        return self.new_positions(device)[:, None] - (torch.arange(self.keys, device=device) + self.offset)


class GenerationCache(BoundedCache, TransformersCache):
    """A bounded cache that transformers takes for one of its own, which has no layers of theirs."""

    def __init__(self, find_excess: Callable[[], Tensor], epsilon: float):
        BoundedCache.__init__(self, find_excess, epsilon)
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No longest text."""
        return -1


class CacheWithPositions:
    """A cache of transformers' as attention uses it: version 4 wants the positions of the new tokens too."""

    def __init__(self, cache: TransformersCache, positions: Tensor):
        self.cache, self.positions = cache, positions

    def update(self, k: Tensor, v: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """See `layers.Cache.update`."""
        return self.cache.update(k, v, layer, {"cache_position": self.positions.to(k.device)})

    def extend(self, new: CachedTensors, layer: int) -> CachedTensors:
        """See `layers.Cache.extend`: in the cache the decays of a bias by key are a further dimension of the keys.

        The sums start from the first key.
        """
        k, v, sums = new
        assert sums is not None
        decays = torch.cat([sums[..., :1], sums.diff(dim=-1)], dim=-1).to(torch.promote_types(k.dtype, torch.float32))
        values = v if VERSION >= (5, 0) else F.pad(v, (0, 1)).to(decays)  # version 4: shape and dtype of the keys
        # The decays are float32 where k is less precise.
        keys, values = self.update(torch.cat([k, decays[..., None]], dim=-1), values, layer)
        sums = keys[..., -1].cumsum(2, dtype=torch.float64)
        return keys[..., :-1].to(k.dtype), values[..., : v.size(-1)].to(v.dtype), sums


def layout_of(cache: Any, x: Tensor, window: Optional[int]) -> KeyLayout:
    """The layout of a pass that reads (B, T, C) new tokens after those of a cache; ValueError for an unusable one."""
    length = x.size(1)
    if cache is None:
        return KeyLayout(length, length)
    if not hasattr(cache, "get_seq_length"):
        raise ValueError(f"past_key_values, cache: a {type(cache).__name__}; pass a DynamicCache or another Cache")
    first = cache.get_seq_length()
    if isinstance(first, Tensor) and not in_transform(first):
        first = int(first)
    if isinstance(cache, BoundedCache) or not isinstance(cache, TransformersCache):
        return KeyLayout(length, first + length, first)
    sliding = cache.is_sliding
    if any(sliding) and (window is None or not all(sliding)):
        raise ValueError(f"a sliding cache, but config.sliding_window is {window}: set it, or pass a DynamicCache")
    wanted: Any = length if VERSION >= (5, 0) else torch.arange(length)
    keys, offset = cache.get_mask_sizes(wanted, 0)
    for layer in cache.layers if any(sliding) else ():
        width: Any = getattr(layer, "sliding_window", None) or getattr(layer, "max_cache_len", window)
        if width != window and (width > window or first + length > width):
            raise ValueError(f"a cache that slides over {width} tokens, but config.sliding_window is {window}")
    return KeyLayout(length, keys, first, offset)


def key_padding(present: Tensor, layout: KeyLayout) -> Tensor:
    """(B, L) bool, False at padding, of all tokens so far -> (B, S) bool, True at keys that are padding or not written.

    ValueError: a mask of another length.
    """
    total = layout.first + layout.queries
    if not isinstance(total, Tensor) and present.size(1) != total:
        raise ValueError(f"attention_mask must have {total} columns, one for each token so far, not {present.size(1)}")
    missing = layout.offset + layout.keys - present.size(1)
    padding = F.pad(~present, (0, missing), value=True) if missing > 0 else ~present
    return padding[:, layout.offset :][:, : layout.keys]


def check_four_dimensions(mask: Tensor, x: Tensor, layout: KeyLayout) -> None:
    """Raises ValueError for a mask of queries and keys of another shape, or with which tokens see later ones."""
    batch, _, *sizes = mask.shape
    if batch not in (1, x.size(0)) or sizes != [layout.queries, layout.keys]:
        shape = (x.size(0), 1, layout.queries, layout.keys)
        raise ValueError(f"attention_mask of 4 dimensions must be (B, 1, T, S) = {shape}, not {tuple(mask.shape)}")
    if not in_transform(mask):
        future = layout.distances_to_keys(mask.device) < 0
        if (visible_keys(mask) & future).any():
            raise ValueError("attention_mask: tokens see later ones, and this model is causal")


def visible_keys(mask: Tensor) -> Tensor:
    """Where a mask of 4 dimensions lets a query see a key: bool as it is; numbers that are added, if not very low."""
    return mask if mask.dtype == torch.bool else mask > HIDDEN


def text_numbers(position_ids: Tensor, present: Optional[Tensor]) -> Optional[Tensor]:
    """Which text of its row each token belongs to, where several are packed into a row: (B, T); None for one each.

    `position_ids` (B or 1, T) begin each text with 0, and no tokens are before; `present` (B, T) is False at padding.
    ValueError: positions that are neither those of the tokens in their row nor in texts of their own.
    """
    starts = position_ids == 0
    if in_transform(position_ids):
        return starts.cumsum(1)
    present = torch.ones_like(starts) if present is None else present
    if ((present.cumsum(1) - 1 == position_ids) | ~present).all():
        return None
    follows = F.pad(position_ids.diff(dim=1) == 1, (1, 0), value=True)
    if not ((follows | starts) & (position_ids >= 0) | ~present).all():
        raise ValueError("position_ids: each must follow the one before it, or be 0 for the start of a text")
    return starts.cumsum(1) if bool(starts[:, 1:].any()) else None


@dataclass(frozen=True)
class PassInputs:
    """A pass as transformers describes it."""

    layout: KeyLayout
    padding: Optional[Tensor]  # (B, S) bool, True at padding
    present: Optional[Tensor]  # (B, L) bool, False at padding, of all tokens so far
    mask: Optional[Tensor]  # (B or 1, 1 or H, T, S) of queries and keys, see `visible_keys`
    texts: Optional[Tensor]  # (B or 1, T), see `text_numbers`
    position_ids: Optional[Tensor]  # (B or 1, T) from 0; None for those that padding tells
    window: Optional[int]  # see `AttentionInputs`

    @classmethod
    def read(
        cls, x: Tensor, attention_mask: Any, position_ids: Optional[Tensor], cache: Any, window: Optional[int]
    ) -> "PassInputs":
        """Checks the arguments of a pass over (B, T, C) new tokens; ValueError names one that cannot be followed."""
        layout = layout_of(cache, x, window)
        padding = present = mask = texts = None
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            kind = type(attention_mask).__name__
            raise ValueError(f"attention_mask: a {kind}; pass a tensor, (B, S) or (B, 1, T, S)")
        if attention_mask is not None and attention_mask.dim() == 4:
            mask = attention_mask.to(x.device)
            check_four_dimensions(mask, x, layout)
        elif attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.size(0) != x.size(0):
                raise ValueError(f"attention_mask must be (B, S) or (B, 1, T, S), not {tuple(attention_mask.shape)}")
            present = attention_mask.to(x.device) != 0
            padding = key_padding(present, layout)
        if position_ids is not None:
            if tuple(position_ids.shape) not in (tuple(x.shape[:2]), (1, x.size(1))):
                raise ValueError(f"position_ids must be (B, T) = {tuple(x.shape[:2])}, not {tuple(position_ids.shape)}")
            position_ids = position_ids.to(x.device)
        given = cls(layout, padding, present, mask, None, position_ids, window)
        begins = not isinstance(layout.first, Tensor) and layout.first == 0
        if position_ids is not None and mask is None and begins:
            texts = text_numbers(position_ids, present)
        elif position_ids is not None and not in_transform(x):
            given.check_positions(begins)
        return dataclasses.replace(given, texts=texts)

    def check_positions(self, begins: bool) -> None:
        """Raises ValueError for other positions than a mask of 4 dimensions, or the tokens so far, have.

        `begins` is whether there are no tokens before these.
        """
        assert self.position_ids is not None
        ids, device = self.position_ids, self.position_ids.device
        if self.mask is not None and begins:
            length = self.layout.queries
            agrees = ids[:, :, None] - ids[:, None, :] == self.layout.distances_to_keys(device)[:, :length]
            wrong = (visible_keys(self.mask)[..., :length] & ~agrees[:, None]).any()
        elif self.mask is not None:
            wrong = torch.zeros(())  # the mask does not tell the positions of the tokens before
        else:
            counted, present = self.counted_positions(device)
            wrong = ((counted != ids) & present).any()
        if wrong:
            raise ValueError(
                "position_ids: not the positions that attention_mask and the cache tell; leave them out, "
                "and pad texts to be continued on the left"
            )

    def counted_positions(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(B or 1, T) positions from 0 of the new tokens, and where they are tokens, by mask and cache."""
        layout = self.layout
        positions = layout.new_positions(device)
        if self.padding is None and self.mask is None:
            return positions[None], torch.ones_like(positions[None], dtype=torch.bool)
        if self.mask is not None:
            counted = visible_keys(self.mask).any(1).sum(-1)
            return counted - 1 + layout.offset, counted > 0
        assert self.present is not None
        return (self.present.cumsum(1) - 1)[:, positions], self.present[:, positions]

    def embedding_positions(self, x: Tensor) -> tuple[Tensor, int]:
        """Positions as fairseq counts them, (B or 1, T), and the length of a row, see `position_embedding`."""
        length = self.layout.offset + self.layout.keys
        counted, present = self.counted_positions(x.device)
        if self.position_ids is not None:
            counted = self.position_ids
            length = length if in_transform(x) else max(length, 1 + int(counted.max()))
        return PADDING + (counted + 1) * present, length

    def attention_inputs(
        self, setup: AttentionSetup, x: Tensor, cache: Any, training: bool, weights: bool = False
    ) -> AttentionInputs:
        """The attention inputs of the pass, of one that keeps the attention weights if `weights`."""
        layout = self.layout
        if isinstance(cache, TransformersCache) and not isinstance(cache, BoundedCache):
            sensitive = setup.method.bias_kind == "key" or setup.method.needs_wide_exponents
            if isinstance(cache, QuantizedCache) and sensitive:
                name = setup.method.name
                raise ValueError(f"a quantized cache is too coarse for position method {name}; use another")
            cache = CacheWithPositions(cache, layout.new_positions(x.device))
        if layout.is_plain and self.mask is None and self.texts is None:
            span = TokenSpan(layout.queries, layout.keys, int(layout.first))
            if weights:
                setup = AttentionSetup(setup.method, dataclasses.replace(setup.settings, kernel="mask"))
            inputs = setup.inputs(x, span, self.padding, self.window, cache, training)
            return dataclasses.replace(inputs, weights=[] if weights else None)
        visible, mask = explicit_mask(self, setup, x)
        method, plain = setup.method, setup.plain
        if method.needs_wide_exponents and compute_dtype(x) == torch.float16:
            raise ValueError(f"position method {method.name}: float16 cannot hold its factors; use another precision")
        rotation = method.rotation(0, layout.offset + layout.keys, x.device)
        if rotation is not None:
            rotation = rotation[:, layout.new_positions(x.device)]
        return AttentionInputs(
            bias=FoldedMask(mask),
            rotation=rotation,
            query_scale=setup.scale_of_counts(visible.any(1).sum(-1)),
            cache=cache,
            plain=None if plain is None else self.attention_inputs(plain, x, cache, training),
            weights=[] if weights else None,
        )


def explicit_mask(given: PassInputs, setup: AttentionSetup, x: Tensor) -> tuple[Tensor, Tensor]:
    """(B or 1, 1 or H, T, S) bool, where queries see keys, and (B or 1, H or 1, T, S) what is added to the scores.

    ValueError: the bias of the position method cannot be made for these keys.
    """
    layout, method = given.layout, setup.method
    distance = layout.distances_to_keys(x.device)
    visible = ((distance >= 0) & (distance < given.window) if given.window else distance >= 0)[None, None]
    if given.padding is not None:
        visible = visible & ~given.padding[:, None, None]
    if given.texts is not None:
        same = given.texts[:, None, :, None] == given.texts[:, None, None, :]
        visible = visible & F.pad(same, (0, layout.keys - layout.queries))
    if given.mask is not None:
        visible = visible & visible_keys(given.mask)
    bias = torch.zeros(1, *distance.shape, device=x.device)
    if method.has_distance_bias:
        bias = method.distance_bias(distance.flatten()).unflatten(-1, distance.shape)
    elif method.gives_bias_of_tiles:
        positions = given.counted_positions(x.device)[0] if given.position_ids is None else given.position_ids
        bias = method.bias_of_tile(positions, distance)
    elif method.bias_kind == "pair":
        if isinstance(layout.first, Tensor) or layout.offset:
            raise ValueError(f"position method {method.name} needs a cache that does not slide, and no compilation")
        written = layout.first + layout.queries
        pairs = method.pair_bias(layout.queries, written, x.device)
        bias = bias if pairs is None else F.pad(pairs, (0, layout.keys - written))
    if given.mask is not None and given.mask.dtype != torch.bool:
        bias = bias + given.mask
    # A very low number, not -inf: a row of padding, which sees nothing, must stay finite.
    mask = torch.where(visible, bias, torch.finfo(x.dtype).min / 2)
    return visible, mask.to(x.dtype if x.device.type != "cpu" else torch.promote_types(x.dtype, torch.float32))
