"""The loss of every token of a text, by windows or as one stream, or of its masked tokens.

fairseq-eval-lm computes log-probabilities of all V types at all L positions and keeps n of them. Here the last layer
computes n queries only. The output layer reads these n features, a few hundred at a time. With an adaptive softmax each
token passes the head and, if it needs one, its own tail. Shapes: N tokens of the text, B windows in a batch, L tokens
in a window, of which n are scored, C model width, V types.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from fairseq.models import BaseFairseqModel, FairseqDecoder
from fairseq.models.roberta import RobertaModel
from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase
from torch import Tensor

from ..core.adaptive import cross_entropies, target_losses
from ..models.decoder import AlibiDecoder
from ..models.encoder import AlibiEncoder
from .windows import batches, windows

CHUNK = (512, 4096)  # smallest and largest number of tokens that a stream reads in one pass
MASKED_SHARE = 0.15  # of the tokens of a text, for a masked language model


class ScoredTokens(NamedTuple):
    """(B, n) float32 losses in nats, window after window, of consecutive tokens of the text from number `first` on."""

    first: int
    losses: Tensor


def output_losses(decoder: FairseqDecoder, features: Tensor, targets: Tensor) -> Tensor:
    """(n, C) inputs of the output layer, (n,) targets -> (n,) float32, -log p in nats, without n x V elements."""
    softmax = getattr(decoder, "adaptive_softmax", None)
    if softmax is None:
        return cross_entropies(decoder.output_layer, features, targets, len(decoder.dictionary))
    return target_losses(softmax, features, targets)


def replace_unknown(tokens: Tensor, dictionary: Dictionary) -> Tensor:
    """Tokens, int64, in which types beyond a model's output dictionary (--output-dictionary-size) are <unk>."""
    return tokens.long().masked_fill(tokens >= len(dictionary), dictionary.unk())


def source_of(stream: Tensor, dictionary: Dictionary, stride: Optional[int] = None) -> Tensor:
    """The inputs, (N,) int64, that predict a stream: an end of sentence, then the stream without its last token.

    With --output-dictionary-size fairseq 0.12.2 replaces targets by <unk> in place (monolingual_dataset.py,
    `_filter_vocab`). A block's inputs share their memory, so they are replaced too: all but the first of a block of
    `stride` tokens, and none in a block at the beginning of a line. A model was trained so, and is evaluated so.
    """
    source = torch.cat([stream.new_tensor([dictionary.eos()]), stream[:-1]]).long()
    if not (source >= len(dictionary)).any():
        return source
    replaced = replace_unknown(source, dictionary)
    if stride is None:
        return replaced
    places = torch.arange(len(source))
    starts = places // stride * stride
    return torch.where((places == starts) | (source[starts] == dictionary.eos()), source, replaced)


@torch.no_grad()
def score_windows(
    model: BaseFairseqModel,
    stream: Tensor,
    length: int,
    stride: int,
    positions: int,
    share: tuple[int, int] = (0, 1),
    first_token: Optional[int] = None,
) -> Iterator[ScoredTokens]:
    """Scores the (N,) tokens of a text by windows, see `windows`; the losses equal those of fairseq-eval-lm.

    A model of this plugin computes its last layer for the scored tokens only. A batch has at most `positions` tokens,
    context included, but at least one window; of a share (k, n) only the batches k, k + n, k + 2n, ... are scored.
    `first_token` stands in front of each window, as --add-bos-token puts <s> in front of each block.
    """
    device = next(model.parameters()).device
    source = source_of(stream, model.decoder.dictionary, stride)
    prepare_model(model, length, extra=0 if first_token is None else 1)
    for batch in islice(batches(windows(len(stream), length, stride), positions), share[0], None, share[1]):
        scored = batch[0].scored
        _, last = batch[0].shape
        inputs = torch.stack([source[window.begin : window.end] for window in batch]).to(device)
        if first_token is not None:
            inputs = F.pad(inputs, (1, 0), value=first_token)
        targets = replace_unknown(stream[scored : batch[-1].end], model.decoder.dictionary).to(device)
        if isinstance(model.decoder, AlibiDecoder):
            features = model.decoder.extract_features_scriptable(inputs, None, last=last)[0]
        else:
            features = model.decoder.extract_features(inputs, None)[0][:, -last:]
        losses = output_losses(model.decoder, features.reshape(len(targets), -1), targets)
        yield ScoredTokens(scored, losses.view(len(batch), last).cpu())


@torch.no_grad()
def score_stream(
    model: BaseFairseqModel, stream: Tensor, window: int, first_token: Optional[int] = None
) -> Iterator[ScoredTokens]:
    """Scores a text as one stream: a token attends, in every layer, to the last `window` tokens, itself included.

    Let x(0, i) be the embedding of input i; input 0 is the end of sentence in front of the text. Layer l computes x(l,
    i) from x(l - 1, i) and attention over the keys and values of x(l - 1, j) for i - window < j <= i, with the bias of
    the distance i - j. Each key and value is computed once and kept for `window` tokens, so memory is constant. Through
    all layers a token depends on inputs up to layers x (window - 1) tokens back. With a window over all of the text a
    token attends to all earlier ones; memory is constant then too where a `BoundedCache` drops what cannot matter.

    ValueError: the model has absolute positions or does not belong to this plugin.
    """
    decoder = model.decoder
    if not isinstance(decoder, AlibiDecoder):
        raise ValueError("streaming needs a model of this plugin (alibi_lm): evaluate this one by windows")
    if decoder.position_method.adds_embedding:
        raise ValueError(
            "streaming: the model adds a position to each token, and a stream has no first one; use windows"
        )
    device = next(model.parameters()).device
    source = source_of(stream, decoder.dictionary)
    shift = 0 if first_token is None else 1  # token n of the text is predicted at input n + shift
    source = F.pad(source, (shift, 0), value=first_token)
    prepare_model(model, window)
    state: dict[str, dict[str, Optional[Tensor]]] = {}
    chunk = min(max(window, CHUNK[0]), CHUNK[1])
    band = None if window >= len(source) and decoder.setup.bounds_cache else window
    for first in range(0, len(stream), chunk):
        end = min(first + chunk, len(stream))
        begin = 0 if band is None else max(0, first + shift - (window - 1))
        inputs = source[begin : end + shift].to(device)[None]
        targets = replace_unknown(stream[first:end], decoder.dictionary).to(device)
        features = decoder.extract_features_scriptable(inputs, None, state, last=end - first, window=band)[0]
        yield ScoredTokens(first, output_losses(decoder, features[0], targets)[None].cpu())


def masked_tokens(count: int) -> Tensor:
    """(N,) bool: which tokens of a text are masked, the same at all lengths and for all models."""
    masked = torch.zeros(count, dtype=torch.bool)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    masked[order[: max(1, round(MASKED_SHARE * count))]] = True
    return masked


@torch.no_grad()
def score_masked(
    model: BaseFairseqModel, stream: Tensor, length: int, positions: int, share: tuple[int, int] = (0, 1)
) -> Iterator[ScoredTokens]:
    """Scores the masked tokens of a text in blocks that do not overlap, see `masked_tokens` and `score_windows`.

    As in fairseq's task masked_lm a block is <s> and length - 1 tokens. Every masked token is replaced by <mask>. The
    losses of the others are 0. ValueError: the length is 1, or see `prepare_model`.
    """
    if length < 2:
        raise ValueError("length 1: a block begins with <s>, pass a length of at least 2")
    prepare_model(model, length)
    device, encoder = next(model.parameters()).device, model.encoder
    masked = masked_tokens(len(stream))
    source = stream.long().masked_fill(masked, encoder.dictionary.index("<mask>"))
    for batch in islice(batches(windows(len(stream), length - 1, length - 1), positions), share[0], None, share[1]):
        scored = slice(batch[0].begin, batch[-1].end)
        inputs = F.pad(source[scored].view(len(batch), -1), (1, 0), value=encoder.dictionary.bos())
        predicted = masked[scored].view(len(batch), -1)
        features = encoder.extract_features(inputs.to(device))[0][:, 1:][predicted.to(device)]
        targets = stream[scored].view_as(predicted)[predicted].to(device).long()
        losses = torch.zeros(predicted.shape)
        losses[predicted] = cross_entropies(encoder.lm_head, features, targets, len(encoder.dictionary)).cpu()
        yield ScoredTokens(scored.start, losses)


def prepare_model(model: BaseFairseqModel, length: int, extra: int = 0) -> None:
    """Sets the length of a window, beside `extra` inputs, for an evaluation; ValueError if the model cannot read it."""
    masked = isinstance(model, RobertaModel)
    stack = model.encoder.sentence_encoder if masked else model.decoder
    if not isinstance(stack, (TransformerDecoderBase, TransformerEncoderBase)):
        raise ValueError(f"{type(model).__name__} is no transformer: evaluate it with fairseq-alibi eval-lm")
    longest, option = model.max_positions(), "max_positions" if masked else "max_target_positions"
    if length + extra > longest:
        raise ValueError(
            f"length {length:,} is longer than the model's longest sequence, {longest:,}: evaluate it at up to that "
            f"or, where its positions go on, pass --model-overrides \"{{'{option}': N}}\""
        )
    if isinstance(stack, (AlibiDecoder, AlibiEncoder)):
        stack.set_evaluation_length(length)
