"""fairseq's transformer decoder with a position method: B batch, T new tokens, S all tokens, C width, V types."""

import copy
import dataclasses
import itertools
import sys
from typing import Any, Optional

import torch
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerDecoder
from fairseq.modules import AdaptiveInput
from torch import Tensor, nn

from ..core.attention_inputs import AttentionInputs, TokenSpan
from ..core.attention_setup import AttentionSetup
from ..core.bounded_cache import STATE_KEY, BoundedCache, bounded_cache_in
from ..core.embeddings import token_positions
from ..core.positions import PositionMethod
from ..core.receptive_field import stack_excess
from .layers import DecoderLayer, IncrementalState, PositionedStack, autocast_products
from .options import attention_settings

CHUNK = 4096  # tokens of a long prompt that are read in one pass where a bounded cache holds those before

#: Key of an incremental state under which the number of tokens is noted whose keys it holds, and that were dropped.
PROGRESS = "fairseq_alibi.progress"


class AlibiDecoder(PositionedStack, TransformerDecoder):
    """fairseq's transformer decoder whose attention has the bias of a position method.

    What attention needs is made once in a pass, before the layer loop, see `AttentionSetup`. A pass leaves nothing in
    the decoder, so that it may run in several threads, or inside of another pass. `args`, the model's options, a
    namespace or fairseq config, are not changed.
    """

    def __init__(
        self,
        args: Any,
        dictionary: Dictionary,
        embed_tokens: nn.Module,
        position_method: PositionMethod,
        no_encoder_attn: bool = False,
    ):
        args = copy.copy(args)
        self.longest = args.max_target_positions or sys.maxsize
        if position_method.limited_to_training_length and self.longest == sys.maxsize:
            self.longest = args.tokens_per_sample
        self.cpu_bf16 = args.cpu_bf16
        args.no_token_positional_embeddings = True  # or fairseq makes an embedding of its own
        args.max_target_positions = args.tokens_per_sample
        settings = attention_settings(args, causal=True)
        numbers = itertools.count()
        self.add_positions = lambda attention: attention.use_positions(position_method, settings, next(numbers))
        super().__init__(args, dictionary, embed_tokens, no_encoder_attn)
        del self.add_positions
        self.position_method = position_method
        self.setup = AttentionSetup(position_method, settings)
        # Made last, so that the other weights start as with any method.
        self.embed_positions = position_method.position_embedding(self.embed_dim, self.longest, self.padding_idx)
        self.kept_excess: Optional[tuple[tuple, Tensor]] = None  # see `score_excess`

    def build_decoder_layer(self, args: Any, no_encoder_attn: bool = False) -> nn.Module:
        """See `TransformerDecoder.build_decoder_layer`."""
        layer = DecoderLayer(args, no_encoder_attn, self.cpu_bf16)
        self.add_positions(layer.self_attn)
        return layer

    def output_layer(self, features: Tensor) -> Tensor:
        """See `TransformerDecoder.output_layer`; the logits are in the dtype of the features."""
        with autocast_products(self.cpu_bf16, features):
            return super().output_layer(features).to(features.dtype)

    def extract_features_scriptable(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Optional[dict[str, list[Tensor]]],
        incremental_state: Optional[IncrementalState] = None,
        full_context_alignment: bool = False,
        alignment_layer: Optional[int] = None,
        alignment_heads: Optional[int] = None,
        last: Optional[int] = None,
        window: Optional[int] = None,
    ) -> tuple[Tensor, dict[str, list[Optional[Tensor]]]]:
        """See `TransformerDecoder.extract_features_scriptable`.

        With an incremental state all of the (B, S) tokens that are new to it are read: one or a long prompt. Where the
        state is a `BoundedCache` they are read in chunks, so that memory does not grow with the prompt.

        Args:
            last: number of tokens, the last ones, whose features are wanted: (B, last, C). The last layer does no more
                for the others than they need as keys. Default: all new tokens; the last one with an incremental state.
            window: number of tokens, the last ones, itself included, that a token attends to in every layer. With an
                incremental state no more keys are kept, and `prev_output_tokens` holds before the new tokens the last
                window - 1 alone.
        """
        if full_context_alignment:
            raise NotImplementedError("full_context_alignment: this decoder is causal, it cannot look at the future")
        if last is None and incremental_state is not None:
            last = 1
        if window is None and (cache := self.bounded_cache(incremental_state)) is not None:
            read, length = cache.get_seq_length(), prev_output_tokens.size(1)
            if length - read > CHUNK:
                parts = []
                for first in range(read, length, CHUNK):
                    end = min(first + CHUNK, length)
                    wanted = min(end - first, max(1, (last or 1) - (length - end)))
                    chunk = prev_output_tokens[:, :end], encoder_out, incremental_state
                    x, extra = self.extract_features_scriptable(*chunk, alignment_layer=alignment_layer, last=wanted)
                    parts.append(x)
                return torch.cat(parts, dim=1)[:, -(last or 1) :], extra
        span = advance(incremental_state, prev_output_tokens.size(1), window)
        x = self.embed(prev_output_tokens, span.queries)
        padding = prev_output_tokens.eq(self.padding_idx)
        inputs = self.setup.inputs(x, span, padding, window, incremental_state, self.training)
        aligned = self.num_layers - 1 if alignment_layer is None else alignment_layer
        x, weights, states = run_layers(self.layers, x.transpose(0, 1), inputs, encoder_out, aligned, last)
        if weights is not None:  # (H, B, T, S'), of each head
            weights = weights[:alignment_heads].mean(dim=0)
        if self.layer_norm is not None:
            x = self.layer_norm(x)
        x = x.transpose(0, 1)
        if self.project_out_dim is not None:
            x = self.project_out_dim(x)
        return x if last is None else x[:, -last:], {"attn": [weights], "inner_states": states}

    def bounded_cache(self, state: Optional[IncrementalState]) -> Optional[BoundedCache]:
        """The bounded cache of an incremental state, which a new state gets unless gradients are wanted."""
        if state is not None and PROGRESS not in state and self.setup.bounds_cache and not torch.is_grad_enabled():
            cache: Any = BoundedCache(self.score_excess, self.setup.settings.epsilon)
            state.setdefault(STATE_KEY, cache)
        return bounded_cache_in(state)

    def reorder_incremental_state(self, incremental_state: IncrementalState, new_order: Tensor) -> None:
        """See `FairseqIncrementalDecoder.reorder_incremental_state`; the layers reorder what they keep themselves."""
        if (cache := bounded_cache_in(incremental_state)) is not None:
            cache.reorder_cache(new_order)

    def embed(self, tokens: Tensor, new: int) -> Tensor:
        """(B, S) tokens -> (B, T, C) what the layers read of the last T = `new` tokens, in any batch or step."""
        read = tokens[:, -new:].contiguous()
        x = self.embed_scale * self.embed_tokens(read)
        if self.quant_noise is not None:
            x = self.quant_noise(x)
        if self.project_in_dim is not None:
            x = self.project_in_dim(x)
        if self.embed_positions is not None:
            positions = token_positions(tokens.ne(self.padding_idx), self.padding_idx)[:, -new:]
            x = x + self.embed_positions(positions, tokens.size(1)).to(x.dtype)
        if self.layernorm_embedding is not None:
            x = self.layernorm_embedding(x)
        return self.dropout_module(x)

    @torch.no_grad()
    def score_excess(self) -> Tensor:
        """See `stack_excess`: (layers, H) float64, computed again when the weights have changed."""
        version = tuple((id(p), None if p.is_inference() else p._version) for p in self.parameters())
        if self.kept_excess is None or self.kept_excess[0] != version:
            self.kept_excess = version, stack_excess(self.layers, self.vectors_of_types())
        return self.kept_excess[1]

    @torch.no_grad()
    def vectors_of_types(self) -> Optional[Tensor]:
        """(V, C) all that the first layer may read; None if that depends on positions, characters or dropout."""
        tokens = self.embed_tokens
        types = tokens.cutoff[-1] if isinstance(tokens, AdaptiveInput) else getattr(tokens, "num_embeddings", None)
        if types is None or self.embed_positions is not None or self.training:
            return None
        numbers = torch.arange(types, device=next(self.parameters()).device)
        return torch.cat([self.embed(part[:, None], 1)[:, 0] for part in numbers.split(4096)])

    def max_positions(self) -> int:
        """Longest sequence: none, unless --max-target-positions was given or the positions end."""
        return self.longest


def run_layers(
    layers: nn.ModuleList,
    x: Tensor,
    inputs: AttentionInputs,
    encoder_out: Optional[dict[str, list[Tensor]]],
    alignment_layer: int,
    last: Optional[int],
) -> tuple[Tensor, Optional[Tensor], list[Optional[Tensor]]]:
    """The layer loop of fairseq 0.12.2, models/transformer/transformer_decoder.py, line 329.

    Returns (T, B, C) or (last, B, C); the weights (H, B, T, S') over the encoder of the layer `alignment_layer` or
    None; what each layer reads and, last, what the last one returns.
    """
    source = padding = None
    if encoder_out is not None and encoder_out["encoder_out"]:
        source = encoder_out["encoder_out"][0]
    if encoder_out is not None and encoder_out["encoder_padding_mask"]:
        padding = encoder_out["encoder_padding_mask"][0]
    weights: Optional[Tensor] = None
    states: list[Optional[Tensor]] = [x]
    for number, layer in enumerate(layers):
        aligned = number == alignment_layer
        of_layer = dataclasses.replace(inputs, queries=last) if number == len(layers) - 1 else inputs
        x, layer_weights = layer(x, of_layer, source, padding, aligned)
        states.append(x)
        if aligned and layer_weights is not None:
            weights = layer_weights.float().to(x)
    return x, weights, states


def advance(state: Optional[IncrementalState], length: int, window: Optional[int]) -> TokenSpan:
    """The new ones among `length` tokens; an incremental state notes that they are read, and how many keys it keeps."""
    if state is None:
        return TokenSpan(length, length, 0)
    progress: Any = state.setdefault(PROGRESS, {"kept": 0, "dropped": 0})  # type: ignore[dict-item]
    kept, dropped = progress["kept"], progress["dropped"]
    if length <= kept:
        raise ValueError(f"no new token: {kept} tokens were read before, {length} were given")
    progress["kept"] = length if window is None else min(length, window - 1)
    progress["dropped"] = dropped + length - progress["kept"]
    return TokenSpan(length - kept, length, dropped + kept)
