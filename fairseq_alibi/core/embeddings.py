"""Position methods that add an embedding to the tokens: sinusoidal and learned; and the method without positions.

Shapes: B batch, T tokens, C width. Positions are numbered as in fairseq: padding has the number of the padding token,
1, and the first token the next one.
"""

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kept import KeptTensor, in_transform
from .positions import DECODER, ENCODER, PositionMethod, register_position_method


def token_positions(tokens_present: Tensor, padding_idx: int) -> Tensor:
    """Positions of tokens in rows with padding on either side: (B, T) bool, True at tokens -> (B, T) int64."""
    present = tokens_present.long()
    return padding_idx + present.cumsum(1) * present


class SinusoidalEmbedding(nn.Module):
    """Sinusoidal embeddings by position, zero at padding."""

    def __init__(self, dim: int, padding_idx: int):
        super().__init__()
        self.dim, self.padding_idx, self.table = dim, padding_idx, KeptTensor()

    def forward(self, positions: Tensor, length: int) -> Tensor:
        """(B, T) int64 positions -> (B, T, C) float32; `length` is the number of tokens in a row, earlier ones too."""
        if in_transform(positions):
            return self.embed(positions)
        size = 1 + self.padding_idx + length
        table = self.table.get(positions.device)
        if table is None or len(table) < size:
            table = self.table.keep(lambda: self.embed(torch.arange(max(1024, 2 * size), device=positions.device)))
        return F.embedding(positions, table)

    def embed(self, positions: Tensor) -> Tensor:
        """Sines, then cosines, as in fairseq, zero at the position of padding: (...) int64 -> (..., C) float32."""
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000) / (half - 1)))
        angles = positions[..., None].float() * frequencies.to(positions.device)
        values = F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, self.dim % 2))
        return values.masked_fill((positions == self.padding_idx)[..., None], 0.0)


class LearnedEmbedding(nn.Embedding):
    """A learned embedding for each of `length` positions, which starts from the values that fairseq gives it."""

    def __init__(self, length: int, dim: int, padding_idx: int):
        super().__init__(length + padding_idx + 1, dim, padding_idx)
        self.length = length
        nn.init.normal_(self.weight, mean=0, std=dim**-0.5)
        nn.init.constant_(self.weight[padding_idx], 0)

    def forward(self, positions: Tensor, length: int) -> Tensor:  # type: ignore[override]
        """(B, T) int64 positions -> (B, T, C), of rows of `length` tokens; ValueError past the end of the table."""
        if length > self.length and int(positions.max()) >= self.num_embeddings:
            raise ValueError(f"the model has learned {self.length:,} positions, but the text has {length:,} tokens")
        return super().forward(positions)


@register_position_method("sinusoidal", stacks=(DECODER, ENCODER))
class Sinusoidal(PositionMethod):
    """Sinusoidal embeddings added to the token embeddings (Vaswani et al. 2017, section 3.5), as fairseq does it."""

    adds_embedding = True
    needs_scaled_tokens = True
    paper_rank = 4

    def position_embedding(self, embed_dim: int, length: int, padding_idx: int) -> Optional[nn.Module]:
        """See `PositionMethod.position_embedding`."""
        return SinusoidalEmbedding(embed_dim, padding_idx)


@register_position_method("learned", stacks=(DECODER, ENCODER))
class Learned(PositionMethod):
    """An embedding for each position up to the training length (or --max-target-positions), added to the tokens'."""

    adds_embedding = True
    limited_to_training_length = True

    def position_embedding(self, embed_dim: int, length: int, padding_idx: int) -> Optional[nn.Module]:
        """See `PositionMethod.position_embedding`."""
        return LearnedEmbedding(length, embed_dim, padding_idx)


@register_position_method("none", stacks=(DECODER, ENCODER))
class NoPositions(PositionMethod):
    """No position information at all (NoPE, Kazemnejad et al. 2023): a causal model knows the order by its mask."""
