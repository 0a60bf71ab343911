"""Causal self-attention under a future mask that carries the position bias. Pure torch, usable without fairseq.

Shapes: B batch, H heads, T queries, S keys (the last T of the S positions are the queries), D head_dim.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def mask_padding(mask: Tensor, padding: Tensor) -> Tensor:
    """Adds padded keys to a future mask.

    A padded key gets a very negative number, not -inf: a query on padding that sees nothing but padding then stays
    finite, so that no NaN can reach the real tokens through the next layer. A real query sees at least itself, and
    against any real score the weight of a padded key underflows to exactly 0.

    Args:
        mask: (H, T, S) or (1, T, S) future mask.
        padding: (B, S) bool, True at padded keys.

    Returns:
        (B, H, T, S) or (B, 1, T, S), in the mask's dtype; or the (H, T, S) mask itself where it already says all:
        padding on the right of every row lies in the future of its real tokens.
    """
    followed_by_token = padding[:, :-1] & ~padding[:, 1:]
    if not followed_by_token.any():
        return mask
    return mask.masked_fill(padding[:, None, None, :], torch.finfo(mask.dtype).min / 2)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, padding: Optional[Tensor] = None, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v, through PyTorch's fused kernels.

    Args:
        q: (B, H, T, D), not yet scaled.
        k, v: (B, H, S, D), in the dtype of q.
        mask: (H, T, S) or (1, T, S), see `PositionMethod.future_mask`; shared by the batch.
        padding: (B, S) bool, True at padded keys, on either side; None where there are none.
        dropout: probability that an attention weight is dropped; 0 outside training.

    Returns:
        (B, H, T, D). Rows of queries on padding are finite and without meaning.
    """
    if padding is not None:
        mask = mask_padding(mask, padding)
    # Four dimensions, or PyTorch's fused CPU kernel declines the mask and attention takes five times as long.
    mask = mask if mask.dim() == 4 else mask[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype), dropout_p=dropout)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor, padding: Optional[Tensor] = None) -> Tensor:
    """The weights that `attention` gives the keys, for looking at them: (B, H, T, S) float32. Arguments as there."""
    if padding is not None:
        mask = mask_padding(mask, padding)
    scores = q @ k.transpose(-2, -1) * q.size(-1) ** -0.5
    return torch.softmax(scores.float() + mask, dim=-1)
