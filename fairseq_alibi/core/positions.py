"""Position methods: how a language model knows where its tokens are. Pure torch, usable without fairseq.

Shapes: H heads, T queries, S keys (the last T of the S positions are the queries), D head_dim.

This is the one place where a position method lives: a subclass of `PositionMethod` and its line in `POSITION_METHODS`.
"""

import math
from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def alibi_slopes(num_heads: int, max_bias: float = 8.0) -> Tensor:
    """Slopes m_h of ALiBi, one per head, steepest first (Press et al. 2022, section 3).

    For a power of two they are `2 ** (-max_bias * h / num_heads)`, h = 1..H. For any other number of heads they are the
    slopes of the nearest lower power of two P, followed by the 1st, 3rd, 5th, ... of the 2P slopes.

    Args:
        num_heads: H, at least 1.
        max_bias: exponent range of the slopes, 8 in the paper; larger values reach further.

    Returns:
        (H,) float64.

    Raises:
        ValueError: for fewer than one head or an exponent range that is not a positive, finite number.
    """
    if num_heads < 1:
        raise ValueError(f"the number of heads must be at least 1, not {num_heads}")
    if not 0 < max_bias < math.inf:
        raise ValueError(f"alibi_max_bias must be a positive number (the paper's is 8), not {max_bias}")
    power = 1 << (num_heads.bit_length() - 1)

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-max_bias * h / count) for h in range(1, count + 1)]

    slopes = geometric(power) + geometric(2 * power)[::2]
    return torch.tensor(slopes[:num_heads], dtype=torch.float64)


def distances(query_length: int, key_length: int, device: Optional[torch.device] = None) -> Tensor:
    """Distance i - j from each query to each key: 0 for a token itself, negative for keys in the future.

    Args:
        query_length: T; the queries are the last T of the S positions.
        key_length: S, at least T.

    Returns:
        (T, S) int64.
    """
    positions = torch.arange(key_length, device=device)
    return positions[key_length - query_length :, None] - positions[None, :]


def linear_bias(before: Tensor, after: Tensor, distance: Tensor) -> Tensor:
    """The bias -before * distance for keys before a query, after * distance for keys after it, 0 for its own.

    Args:
        before, after: (H,) slopes, infinite for a head that sees nothing there.
        distance: (N,) i - j, see `distances`.

    Returns:
        (H, N) in the dtype of the slopes.
    """
    before, after = before[:, None], after[:, None]
    return torch.where(distance > 0, -before * distance, torch.where(distance < 0, after * distance, 0.0))


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns pairs of dimensions, in float32 at least: (..., T, D), by (2, T, D / 2) cosines and sines; x's dtype."""
    cos, sin = rotation
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def sinusoids(positions: Tensor, dim: int) -> Tensor:
    """Sinusoidal embeddings of positions (Vaswani et al. 2017, section 3.5), in fairseq's order: sines, then cosines.

    Args:
        positions: (...); fairseq's first token has the position 2, one more than the number of its padding token.
        dim: C.

    Returns:
        (..., C) float32.
    """
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
    angles = positions[..., None].float() * frequencies.to(positions.device)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, dim % 2))


class PositionMethod(nn.Module):
    """What a position method may do; this base does nothing, which is the method `none` (NoPE).

    Subclasses override the hooks they need. A module, so that a method may have parameters of its own.

    Args:
        num_heads: H.
    """

    #: What is added to the token embeddings: None, "sinusoidal" or "learned".
    embedding: Optional[str] = None

    #: (H,) slopes of a bias -slopes * (i - j), which attention can run without a mask, or (2, H) for keys before and
    #: after the query; None for any other bias or none.
    slopes: Optional[Tensor] = None

    def __init__(self, num_heads: int):
        super().__init__()
        self.num_heads = num_heads

    @classmethod
    def from_options(cls, num_heads: int, embed_dim: int, args) -> "PositionMethod":
        """The method as a model's options `args`, a namespace, want it; overridden where there are options.

        `embed_dim` is C, the width of the stack.
        """
        return cls(num_heads)

    @property
    def has_relative_bias(self) -> bool:
        """Whether there is a bias that depends on distance alone."""
        return type(self).relative_bias is not PositionMethod.relative_bias

    @property
    def needs_mask(self) -> bool:
        """Whether the bias is of a kind that attention can only have from a mask."""
        return type(self).bias is not PositionMethod.bias

    def set_evaluation_length(self, length: int) -> None:
        """Is told the length of the windows, in tokens, before a model is evaluated."""

    def rotation(self, first: int, last: int, device: Optional[torch.device] = None) -> Optional[Tensor]:
        """How `rotate` is to turn queries and keys at these positions, of which `last` is none; or None.

        Returns:
            (2, last - first, D / 2) float32, cosines and sines.
        """
        return None

    def relative_bias(self, distance: Tensor) -> Optional[Tensor]:
        """Bias to add to the scores after their division by sqrt(D), by distance.

        Args:
            distance: (N,) int64, i - j from query i to key j; below 0 for a key after the query, where a causal model
                sees nothing, whatever is returned.

        Returns:
            (H, N) float32 on the device of `distance`, -inf where a head sees nothing; None for no bias.
        """
        return None

    def bias(self, query_length: int, key_length: int, device: Optional[torch.device] = None) -> Optional[Tensor]:
        """The bias of each query and key, (H, T, S) float32, or None for no bias.

        Overridden where it depends on more than the distance; attention then needs a mask.
        """
        by_distance = self.relative_bias(torch.arange(key_length - 1, -query_length, -1, device=device))
        # From the longest distance down; row t of the bias is the part that ends at t's own.
        return None if by_distance is None else by_distance.unfold(1, key_length, 1).flip(1)

    def future_mask(
        self,
        query_length: int,
        key_length: int,
        dtype: torch.dtype = torch.float32,
        device: Optional[torch.device] = None,
        window: Optional[int] = None,
    ) -> Tensor:
        """The bias folded into the causal mask: -inf where a key lies in a query's future, else the bias.

        Args:
            query_length, key_length: T and S.
            dtype, device: of the mask.
            window: number of keys that a query sees, the last ones, itself included; None for all.

        Returns:
            (H, T, S), or (1, T, S) for a method without bias, in `dtype`, to be added to the scores of every batch row.
        """
        bias = self.bias(query_length, key_length, device)
        if bias is None:
            bias = torch.zeros(1, query_length, key_length, device=device)
        bias, distance = bias.to(dtype), distances(query_length, key_length, device)
        unseen = distance < 0 if window is None else (distance < 0) | (distance >= window)
        # In place, because at long lengths the mask is the largest tensor of all, unless autograd may need the bias.
        return bias.masked_fill(unseen, -math.inf) if bias.requires_grad else bias.masked_fill_(unseen, -math.inf)

    def full_mask(
        self,
        query_length: int,
        key_length: int,
        dtype: torch.dtype = torch.float32,
        device: Optional[torch.device] = None,
    ) -> Tensor:
        """The mask of an encoder, in which queries see the keys after them too: the bias, or zeros (1, 1, S)."""
        bias = self.bias(query_length, key_length, device)
        return torch.zeros(1, 1, key_length, dtype=dtype, device=device) if bias is None else bias.to(dtype)


class Sinusoidal(PositionMethod):
    """Sinusoidal embeddings added to the token embeddings (Vaswani et al. 2017, section 3.5), as fairseq does it."""

    embedding = "sinusoidal"


class Learned(PositionMethod):
    """An embedding for each position, learned and added to the token embeddings, as fairseq does it.

    The table has an entry for each position of the training length (or of --max-target-positions) and none past it.
    """

    embedding = "learned"


class Rotary(PositionMethod):
    """Queries and keys are turned by angles in proportion to their position, in every layer (RoFormer, Su et al. 2021).

    Dimensions 2n and 2n + 1 of a head are the coordinates of a point that is turned by position * base^(-2n / D), so
    that scores depend on distances alone. Values are not turned and nothing is added to the embeddings.

    Args:
        num_heads: H.
        head_dim: D, even.
        base: of the frequencies.

    Raises:
        ValueError: an odd head_dim.
    """

    def __init__(self, num_heads: int, head_dim: int = 64, base: float = 10000.0):
        super().__init__(num_heads)
        if head_dim % 2:
            raise ValueError(
                f"--position-method rotary turns pairs of dimensions: head_dim must be even, not {head_dim}"
            )
        self.frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    @classmethod
    def from_options(cls, num_heads: int, embed_dim: int, args) -> "Rotary":
        return cls(num_heads, embed_dim // num_heads)

    def rotation(self, first: int, last: int, device: Optional[torch.device] = None) -> Tensor:
        # In float64, because in float32 an angle near 100,000 is off by 0.004.
        angles = torch.arange(first, last, dtype=torch.float64)[:, None] * self.frequencies
        return torch.stack([angles.cos(), angles.sin()]).float().to(device)


class T5(PositionMethod):
    """A learned bias for each head and range of distances, shared by all layers (Raffel et al. 2020, section 2.1).

    Causal: distances 0 to 15 have a bucket each, those to 128 share 16 of growing width, and all beyond the last one.
    The biases start from 0.

    Args:
        num_heads: H.
        buckets: number of them, half for a distance each.
        longest: distance from which on all are in the last bucket.
    """

    def __init__(self, num_heads: int, buckets: int = 32, longest: int = 128):
        super().__init__(num_heads)
        self.buckets, self.longest = buckets, longest
        self.bucket_bias = nn.Parameter(torch.zeros(buckets, num_heads))

    def bucket(self, distance: Tensor) -> Tensor:
        """Bucket of each distance, int64; that of 0 for keys in the future."""
        exact = self.buckets // 2
        octaves = torch.log(distance.clamp(min=exact).double() / exact) / math.log(self.longest / exact)
        shared = (exact + (octaves * (self.buckets - exact)).long()).clamp(max=self.buckets - 1)
        return torch.where(distance < exact, distance.clamp(min=0), shared)

    def relative_bias(self, distance: Tensor) -> Tensor:
        return F.embedding(self.bucket(distance), self.bucket_bias).t()


class ALiBi(PositionMethod):
    """Attention with linear biases: -m_h * (i - j) is added to the score of query i against key j <= i.

    No parameter, no buffer, no embedding, no longest length (Press et al. 2022, section 3). The bias is computed from
    distances, not as one vector m_h * j per head: the two differ by a constant per row, which softmax ignores, but
    distances keep the numbers of near tokens small and so exact in half precision too.

    Args:
        num_heads: H.
        max_bias: see `alibi_slopes`.
        heads: number of heads with a bias, the first ones, with the slopes of a model of that many; None for all. The
            others have slope 0, which is no bias.
        length_scale: what the slopes are divided by: position interpolation for ALiBi (Al-Khateeb et al. 2023, arXiv
            2310.13017). "auto" is evaluation length over training length, where that is more than 1.
        training_length: in tokens, for "auto".

    Raises:
        ValueError: see `alibi_slopes`, and for a length scale that is no positive number and not "auto", or more heads
            than there are.
    """

    def __init__(
        self,
        num_heads: int,
        max_bias: float = 8.0,
        length_scale: Union[float, str] = 1.0,
        training_length: Optional[int] = None,
        heads: Optional[int] = None,
    ):
        super().__init__(num_heads)
        heads = num_heads if heads is None else heads
        if not 0 < heads <= num_heads:
            raise ValueError(f"alibi_heads must be from 1 to the number of heads, {num_heads}, not {heads}")
        self.training_length = training_length if length_scale == "auto" else None
        try:
            scale = 1.0 if length_scale == "auto" else float(length_scale)
        except ValueError:
            scale = math.nan
        if not 0 < scale < math.inf:
            raise ValueError(f"alibi_length_scale must be a positive number or auto, not {length_scale}")
        self.unscaled_slopes = F.pad(alibi_slopes(heads, max_bias), (0, num_heads - heads))
        self.slopes = (self.unscaled_slopes / scale).float()  # plain attributes: not part of a checkpoint

    @classmethod
    def from_options(cls, num_heads: int, embed_dim: int, args) -> "ALiBi":
        scale = args.alibi_length_scale
        return cls(num_heads, args.alibi_max_bias, scale, args.tokens_per_sample, args.alibi_heads)

    def set_evaluation_length(self, length: int) -> None:
        if self.training_length:
            self.slopes = (self.unscaled_slopes / max(1.0, length / self.training_length)).float()

    def relative_bias(self, distance: Tensor) -> Tensor:
        """See `PositionMethod.relative_bias`; 0 for keys in the future."""
        return -self.slopes.to(distance.device)[:, None] * distance.clamp(min=0)


class EncoderALiBi(PositionMethod):
    """ALiBi where a query sees keys on both sides: a bias of -left_h * (i - j) before it, -right_h * (j - i) after it.

    The three forms that the authors describe (their repository, issue 5):

    symmetric   left and right are the slopes of ALiBi.
    one_sided   half of the heads see only keys before the query, half only those after it, itself included; both
                halves have the slopes of H / 2 heads.
    two_slopes  the slopes of 2 H heads, in turn left and right; they may be learned, as sigmoids.

    Args:
        num_heads: H.
        form: one of `FORMS`.
        max_bias, length_scale, training_length: see `ALiBi`.
        learned: whether the slopes are parameters that start from the fixed ones.

    Raises:
        ValueError: see `ALiBi`; an unknown form; an odd number of heads for one_sided; learned slopes of another form.
    """

    FORMS = ("symmetric", "one_sided", "two_slopes")

    def __init__(
        self,
        num_heads: int,
        form: str = "symmetric",
        max_bias: float = 8.0,
        length_scale: Union[float, str] = 1.0,
        training_length: Optional[int] = None,
        learned: bool = False,
    ):
        super().__init__(num_heads)
        if form not in self.FORMS:
            raise ValueError(f"alibi_encoder_bias must be one of {', '.join(self.FORMS)}, not {form}")
        if form == "one_sided" and num_heads % 2:
            raise ValueError(f"alibi_encoder_bias one_sided needs an even number of heads, not {num_heads}")
        if learned and form != "two_slopes":
            raise ValueError(f"learned slopes are for alibi_encoder_bias two_slopes, not {form}")
        self.form = form
        heads = {"symmetric": num_heads, "one_sided": num_heads // 2, "two_slopes": 2 * num_heads}[form]
        self.fixed = ALiBi(heads, max_bias, length_scale, training_length)
        unscaled = self.fixed.unscaled_slopes.sort(descending=True).values.view(-1, 2).t() if learned else None
        self.slope_logits = nn.Parameter(unscaled.logit().float()) if learned else None

    @classmethod
    def from_options(cls, num_heads: int, embed_dim: int, args) -> "EncoderALiBi":
        scale, learned = args.alibi_length_scale, args.alibi_learned_slopes
        return cls(num_heads, args.alibi_encoder_bias, args.alibi_max_bias, scale, args.tokens_per_sample, learned)

    def set_evaluation_length(self, length: int) -> None:
        self.fixed.set_evaluation_length(length)

    @property
    def slopes(self) -> Optional[Tensor]:
        """(2, H), of the left and the right; None where they are learned, and gradients have to flow through a bias."""
        return self.left_and_right() if self.slope_logits is None else None

    def left_and_right(self, device: Optional[torch.device] = None) -> Tensor:
        """(2, H) float32 slopes before and after a query, infinite where a head sees nothing."""
        slopes = self.fixed.slopes.to(device)
        if self.slope_logits is not None:
            scale = self.fixed.unscaled_slopes[0].item() / slopes[0]
            return self.slope_logits.sigmoid() / scale
        if self.form == "symmetric":
            return torch.stack([slopes, slopes])
        if self.form == "one_sided":
            blind = torch.full_like(slopes, math.inf)
            return torch.stack([torch.cat([slopes, blind]), torch.cat([blind, slopes])])
        return slopes.sort(descending=True).values.view(-1, 2).t()

    def relative_bias(self, distance: Tensor) -> Tensor:
        return linear_bias(*self.left_and_right(distance.device), distance)


#: The values of `--position-method`.
POSITION_METHODS = {
    "alibi": ALiBi,
    "sinusoidal": Sinusoidal,
    "rotary": Rotary,
    "t5": T5,
    "learned": Learned,
    "none": PositionMethod,
}

#: Those of encoders: `T5` has no buckets for keys after a query.
ENCODER_POSITION_METHODS = {name: method for name, method in POSITION_METHODS.items() if method is not T5}
ENCODER_POSITION_METHODS["alibi"] = EncoderALiBi
