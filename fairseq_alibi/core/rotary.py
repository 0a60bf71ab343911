"""Rotary positions (RoFormer, Su et al. 2021), their forms for lengths past that of the training, and xPos.

Shapes: T positions, D head_dim.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Optional, Union

import torch
from torch import Tensor

from .positions import DECODER, ENCODER, PositionMethod, option_field, register_position_method

SCALINGS = ("none", "linear", "ntk", "dynamic_ntk", "yarn")  # ways to change the frequencies at evaluation


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns pairs of dimensions, in float32 at least: (..., T, D), by (2, T, D / 2) cosines and sines; x's dtype."""
    cos, sin = rotation
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


@dataclass
class RotaryOptions:
    """Options of rotary positions."""

    rotary_scaling: str = option_field(
        SCALINGS[0],
        "changes the frequencies for lengths past that of the training; to be overridden at evaluation",
        choices=SCALINGS,
    )
    rotary_scaling_factor: str = option_field(
        "auto",
        "by how much --rotary-scaling stretches: a number of at least 1, or auto for evaluation length "
        "over training length (dynamic_ntk grows with the evaluation length by itself: auto is 1)",
    )
    p_rope: float = option_field(1.0, "share of the frequencies that turn, the highest ones (p-RoPE: 0.75)")


@register_position_method("rotary", stacks=(DECODER, ENCODER))
class Rotary(PositionMethod):
    """Rotary positions, applied in every layer.

    Dimensions 2n and 2n + 1 of a head are the coordinates of a point that is turned by position * base^(-2n / D), so
    that scores depend on distances alone. Values are not turned and nothing is added to the embeddings. Only the
    highest frequencies turn, of the `share`; the others are 0 (p-RoPE, arXiv 2410.06205).

    With L0 the training length, L the evaluation length and s the factor, at least 1 or "auto", at evaluation

    linear        divides the frequencies by s (position interpolation, arXiv 2306.15595).
    ntk           multiplies the base by s^(D / (D - 2)).
    dynamic_ntk   multiplies the base by (s L / L0 - (s - 1))^(D / (D - 2)) if L > L0.
    yarn          divides by s the frequencies that turn less than once in L0 tokens, leaves those that turn more than
                  32 times, and goes linearly from one to the other in between; queries and keys are multiplied by
                  0.1 ln(s) + 1 (arXiv 2309.00071).

    ValueError: an odd head_dim, an unknown scaling, a factor below 1, or a share that is not in (0, 1].
    """

    rotates = True
    paper_rank: ClassVar[Optional[int]] = 3
    options = RotaryOptions

    def __init__(
        self,
        num_heads: int,
        head_dim: int = 64,
        base: float = 10000.0,
        scaling: str = SCALINGS[0],
        factor: Union[float, str] = "auto",
        training_length: int = 512,
        share: float = 1.0,
    ):
        super().__init__(num_heads)
        if head_dim % 2:
            reason = "turns pairs of dimensions: head_dim must be even"
            raise ValueError(f"--position-method {self.name} {reason}, not {head_dim}")
        if scaling not in SCALINGS:
            raise ValueError(f"rotary_scaling must be one of {', '.join(SCALINGS)}, not {scaling}")
        try:
            self.factor = None if factor == "auto" else float(factor)
        except ValueError:
            self.factor = math.nan
        if self.factor is not None and not 1 <= self.factor < math.inf:
            raise ValueError(f"rotary_scaling_factor must be a number of at least 1 or auto, not {factor}")
        if self.factor is not None and scaling == SCALINGS[0]:
            raise ValueError(f"rotary_scaling_factor {factor} needs rotary_scaling: {', '.join(SCALINGS[1:])}")
        if head_dim < 4 and scaling in ("ntk", "dynamic_ntk"):
            raise ValueError(f"rotary_scaling {scaling} needs a head_dim of at least 4, not {head_dim}")
        if not 0 < share <= 1:
            raise ValueError(f"p_rope must be above 0 and at most 1, not {share}")
        self.head_dim, self.base, self.scaling, self.share = head_dim, base, scaling, share
        self.training_length = training_length
        self.set_evaluation_length(training_length)

    @classmethod
    def from_options(cls, num_heads: int, embed_dim: int, options: Any) -> "Rotary":
        """See `PositionMethod.from_options`."""
        scaling, factor, length = options.rotary_scaling, options.rotary_scaling_factor, options.tokens_per_sample
        return cls(num_heads, embed_dim // num_heads, 10000.0, scaling, factor, length, options.p_rope)

    def set_evaluation_length(self, length: int) -> None:
        """Sets the frequencies, and the amplitude of queries and keys, for windows of so many tokens."""
        dim, stretch = self.head_dim, max(1.0, length / self.training_length)
        factor = self.factor or (1.0 if self.scaling == "dynamic_ntk" else stretch)
        base = self.base
        if self.scaling == "ntk":
            base *= factor ** (dim / (dim - 2))
        elif self.scaling == "dynamic_ntk":
            base *= (factor * stretch - (factor - 1)) ** (dim / (dim - 2))
        # On the CPU, because on the meta device, where a model may be built, they would be lost.
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim
        frequencies = base**-exponents
        self.amplitude = 1.0
        if self.scaling == "linear":
            frequencies = frequencies / factor
        elif self.scaling == "yarn":
            fast, slow = (
                dim * math.log(self.training_length / (turns * 2 * math.pi)) / (2 * math.log(self.base))
                for turns in (32, 1)
            )
            low, high = max(math.floor(fast), 0), min(math.ceil(slow), dim - 1)
            ramp = (torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / max(high - low, 0.001)
            ramp = ramp.clamp(0, 1)
            frequencies = frequencies * (1 - ramp * (1 - 1 / factor))
            self.amplitude = 0.1 * math.log(factor) + 1
        frequencies[int(self.share * dim // 2) :] = 0
        self.frequencies = frequencies

    def rotation(self, first: int, last: int, device: Optional[torch.device] = None) -> Tensor:
        """See `PositionMethod.rotation`."""
        # In float64, because in float32 an angle near 100,000 is off by 0.004.
        angles = torch.arange(first, last, dtype=torch.float64, device="cpu")[:, None] * self.frequencies
        return (self.amplitude * torch.stack([angles.cos(), angles.sin()])).float().to(device)


SCALE_BASE = 512  # tokens in which the largest factor of xPos changes by z_n

#: The position at which the factors of xPos are 1, and the number of positions: float32 holds few more.
ORIGIN, POSITIONS = 24_576, 49_152


@register_position_method("xpos", stacks=(DECODER,))
class XPos(Rotary):
    """xPos (Sun et al. 2022, arXiv 2212.10554): rotary positions whose scores also fall with the distance.

    Queries at position i are multiplied by z_n^((i - o) / 512) and keys at j by z_n^(-(j - o) / 512), for dimensions 2n
    and 2n + 1, with z_n = (2n / D + 0.4) / 1.4. The origin o drops out of the scores. It is the same for all lengths,
    so that cached keys stay as they are. ValueError, in a pass: positions past 49,152, or float16.
    """

    paper_rank = None
    needs_wide_exponents = True

    def rotation(self, first: int, last: int, device: Optional[torch.device] = None) -> Tensor:
        """See `PositionMethod.rotation`."""
        if last > POSITIONS:
            raise ValueError(f"--position-method xpos: its factors overflow at {last:,} tokens, past {POSITIONS:,}")
        dim = self.head_dim
        z = (torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim + 0.4) / 1.4
        powers = (torch.arange(first, last, dtype=torch.float64, device="cpu")[:, None] - ORIGIN) / SCALE_BASE
        turned = super().rotation(first, last).double()
        return torch.cat([turned * z**powers, turned * z**-powers]).float().to(device)
