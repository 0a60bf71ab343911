"""Attention and stacks of layers with a position method, for any PyTorch model. Pure torch, usable without fairseq.

    from fairseq_alibi.core.transformer import Transformer
    decoder = Transformer(layers=4, embed_dim=256, num_heads=8)
    y = decoder(x)  # (B, T, C) -> (B, T, C), of any length
    encoder = Transformer(layers=4, embed_dim=256, num_heads=8, causal=False)
    y = encoder(x, padding)  # padding (B, T), True where there is no token

Shapes: B batch, T new tokens, S all tokens (the last S positions), C width.
"""

from functools import partial
from typing import Any, Optional, Union, cast

from torch import Tensor, nn

from .alibi import ALiBi, EncoderALiBi
from .attention_inputs import EPSILON, AttentionInputs, TokenSpan
from .attention_setup import AttentionSettings, AttentionSetup
from .bounded_cache import BoundedCache
from .layers import Cache, Layer, LayerOptions, SelfAttention
from .positions import PositionMethod
from .receptive_field import stack_excess


class Attention(SelfAttention):
    """Multi-head self-attention with a bias for distance: (B, T, C) -> (B, T, C), no position embedding needed.

    Without `causal` a token sees those after it too. The position method is ALiBi unless one is given, symmetric if not
    causal (`alibi.EncoderALiBi` has the other forms). `attention` and `epsilon` are `kernel` and `epsilon` of
    `AttentionSettings`. ValueError: the heads do not divide the width, or the position method adds embeddings.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        causal: bool = True,
        position_method: Optional[PositionMethod] = None,
        dropout: float = 0.0,
        attention: str = "auto",
        epsilon: float = EPSILON,
    ):
        super().__init__(embed_dim, num_heads, dropout)
        self.position_method = given_or_alibi(position_method, num_heads, causal)
        settings = AttentionSettings(attention, epsilon, dropout, causal)
        self.use_positions(self.position_method, settings)
        self.setup = AttentionSetup(self.position_method, settings)

    def forward(self, x: Tensor, padding: Optional[Tensor] = None, cache: Any = None) -> Tensor:  # type: ignore[override]
        """(B, T, C) new tokens -> (B, T, C).

        `padding` (B, S) is True where there is no token; a `cache` of the tokens before, see `Cache`, is extended.
        """
        return super().forward(x, attention_inputs(self.setup, x, padding, cache, self.training))


class Transformer(nn.Module):
    """A stack of layers with a position method, decoder or encoder: (B, T, C) -> (B, T, C), at any length.

    The bias is made once in a pass, before the layer loop. A norm follows the last layer with `normalize_before`. The
    other arguments are those of `Attention`. Second derivatives, as of a gradient penalty, need "mask" and a pass under
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`; PyTorch's other kernels have none and say so.
    """

    def __init__(
        self,
        layers: int,
        embed_dim: int,
        num_heads: int,
        causal: bool = True,
        position_method: Optional[PositionMethod] = None,
        options: LayerOptions = LayerOptions(),  # noqa: B008, it cannot change
        attention: str = "auto",
    ):
        super().__init__()
        self.layers = nn.ModuleList(Layer(embed_dim, num_heads, options, n) for n in range(layers))
        self.position_method = given_or_alibi(position_method, num_heads, causal)
        settings = AttentionSettings(attention, dropout=options.attention_dropout, causal=causal)
        for number, layer in enumerate(self.layers):
            cast(Layer, layer).self_attn.use_positions(self.position_method, settings, number)
        self.setup = AttentionSetup(self.position_method, settings)
        self.layer_norm = nn.LayerNorm(embed_dim) if options.normalize_before else None

    def make_cache(self) -> Union[BoundedCache, Cache]:
        """A cache for decoding; where the bias is that of ALiBi alone it keeps what can matter, see `BoundedCache`."""
        if self.setup.bounds_cache:
            return BoundedCache(partial(stack_excess, self.layers), self.setup.settings.epsilon)  # type: ignore[arg-type]
        return Cache()

    def forward(self, x: Tensor, padding: Optional[Tensor] = None, cache: Any = None) -> Tensor:
        """(B, T, C) embeddings of the new tokens -> (B, T, C), see `Attention.forward`."""
        inputs = attention_inputs(self.setup, x, padding, cache, self.training)
        for layer in self.layers:
            x = layer(x, inputs)
        return x if self.layer_norm is None else self.layer_norm(x)


def given_or_alibi(method: Optional[PositionMethod], num_heads: int, causal: bool) -> PositionMethod:
    """The position method that is given, or ALiBi; ValueError if it has other heads or adds embeddings to tokens."""
    if method is None:
        return ALiBi(num_heads) if causal else EncoderALiBi(num_heads)
    if not isinstance(method, PositionMethod):
        raise TypeError(f"position_method is {method!r}: pass an object, such as ALiBi({num_heads})")
    if method.num_heads != num_heads:
        raise ValueError(
            f"{type(method).__name__} has {method.num_heads} heads, not {num_heads}: make it with {num_heads}"
        )
    if method.adds_embedding:
        raise ValueError(
            f"{type(method).__name__} adds embeddings to those of the tokens: add them, and pass no method"
        )
    return method


def attention_inputs(
    setup: AttentionSetup, x: Tensor, padding: Optional[Tensor], cache: Any, training: bool
) -> AttentionInputs:
    """The attention inputs for (B, T, C) new tokens after those of a cache; ValueError if they do not fit it."""
    earlier = 0 if cache is None else cache.get_seq_length()
    keys = earlier + x.size(1)
    if padding is not None and padding.shape != (x.size(0), keys):
        raise ValueError(f"padding must be (B, S) = ({x.size(0)}, {keys}), not {tuple(padding.shape)}")
    return setup.inputs(x, TokenSpan(x.size(1), keys, earlier), padding, cache=cache, training=training)
