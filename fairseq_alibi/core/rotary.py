"""Rotary positions (RoFormer, Su et al. 2021): queries and keys are turned by angles in proportion to their position.

Shapes: T positions, D head_dim.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from .positions import DECODER, ENCODER, PositionMethod, register_position_method


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turns pairs of dimensions, in float32 at least: (..., T, D), by (2, T, D / 2) cosines and sines; x's dtype."""
    cos, sin = rotation
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


@register_position_method("rotary", stacks=(DECODER, ENCODER))
class Rotary(PositionMethod):
    """Rotary positions, applied in every layer.

    Dimensions 2n and 2n + 1 of a head are the coordinates of a point that is turned by position * base^(-2n / D), so
    that scores depend on distances alone. Values are not turned and nothing is added to the embeddings.

    Args:
        num_heads: H.
        head_dim: D, even.
        base: of the frequencies.

    Raises:
        ValueError: an odd head_dim.
    """

    rotates = True
    paper_rank = 3

    def __init__(self, num_heads: int, head_dim: int = 64, base: float = 10000.0):
        super().__init__(num_heads)
        if head_dim % 2:
            raise ValueError(
                f"--position-method {self.name} turns pairs of dimensions: head_dim must be even, not {head_dim}"
            )
        # On the CPU, because on the meta device, where a model may be built, they would be lost.
        self.frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)

    @classmethod
    def from_options(cls, num_heads: int, embed_dim: int, options: Any) -> "Rotary":
        """See `PositionMethod.from_options`."""
        return cls(num_heads, embed_dim // num_heads)

    def rotation(self, first: int, last: int, device: Optional[torch.device] = None) -> Tensor:
        """See `PositionMethod.rotation`."""
        # In float64, because in float32 an angle near 100,000 is off by 0.004.
        angles = torch.arange(first, last, dtype=torch.float64, device="cpu")[:, None] * self.frequencies
        return torch.stack([angles.cos(), angles.sin()]).float().to(device)
