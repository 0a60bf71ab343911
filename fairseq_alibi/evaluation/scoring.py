"""Loss of every token of a text, by windows or as one stream, or of masked ones: only what is scored passes the output
layer.

Shapes: N tokens of the text, B windows in a batch, L tokens in a window, of which n are scored, C model width, V types.

fairseq-eval-lm computes log-probabilities of all V types at all L positions and keeps n of them. Here the last layer
computes n queries, the output layer reads n features, a few hundred at a time, and of an adaptive softmax each token
has its head and, where it needs one, its own tail.
"""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fairseq.models import BaseFairseqModel
from fairseq.models.roberta import RobertaModel
from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase
from torch import Tensor

from ..core.adaptive import cross_entropies, target_losses
from ..models.decoder import Decoder
from ..models.encoder import Encoder
from .windows import batches, windows

#: Least and most tokens that a stream reads in one pass.
CHUNK = (512, 4096)

#: Share of the tokens that a masked language model has to find.
MASKED = 0.15


class Scored(NamedTuple):
    """Consecutive tokens of the text that were scored.

    Args:
        first: number of the first of them.
        losses: (B, n) float32, nats; the windows one after the other.
    """

    first: int
    losses: Tensor


def output_losses(decoder, features: Tensor, targets: Tensor) -> Tensor:
    """Loss of each target, without a tensor of n x V elements.

    Args:
        decoder: fairseq's, with an output layer or an adaptive softmax.
        features: (n, C), what the output layer reads.
        targets: (n,) int64.

    Returns:
        (n,) float32, -log p(target) in nats.
    """
    softmax = getattr(decoder, "adaptive_softmax", None)
    if softmax is None:
        return cross_entropies(decoder.output_layer, features, targets, len(decoder.dictionary))
    return target_losses(softmax, features, targets)


def source_of(stream: Tensor, end_of_sentence: int) -> Tensor:
    """What a model reads to predict a stream, (N,): the stream, moved by one behind an end of sentence."""
    return torch.cat([stream.new_tensor([end_of_sentence]), stream[:-1]])


def shared(items: Iterator, share: tuple[int, int]) -> Iterator:
    """Of a share (k, n) the items k, k + n, k + 2n, ..."""
    return islice(items, share[0], None, share[1])


def last_features(model: BaseFairseqModel, tokens: Tensor, last: int) -> Tensor:
    """(B, L) tokens -> (B, n, C) features of the last n, as the output layer reads them."""
    if isinstance(model.decoder, Decoder):
        return model.decoder.extract_features_scriptable(tokens, None, last=last)[0]
    return model.decoder.extract_features(tokens, None)[0][:, -last:]


@torch.no_grad()
def score_windows(
    model: BaseFairseqModel,
    stream: Tensor,
    length: int,
    stride: int,
    positions: int,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Scored]:
    """Scores a text by windows, see `windows`; the losses equal those of fairseq-eval-lm.

    Args:
        model: language model of fairseq's, in evaluation mode; of this plugin's, the last layer is computed for the
            scored tokens only.
        stream: (N,) tokens of the text.
        length, stride: L and stride, in tokens.
        positions: tokens in a batch, context included; a batch has one window at least.
        share: k and n, to score the batches k, k + n, k + 2n, ... alone.
    """
    device = next(model.parameters()).device
    source = source_of(stream, model.decoder.dictionary.eos())
    prepare(model, length)
    for batch in shared(batches(windows(len(stream), length, stride), positions), share):
        scored = batch[0].scored
        _, last = batch[0].shape
        inputs = torch.stack([source[window.begin : window.end] for window in batch]).to(device).long()
        targets = stream[scored : batch[-1].end].to(device).long()
        features = last_features(model, inputs, last)
        losses = output_losses(model.decoder, features.reshape(len(targets), -1), targets)
        yield Scored(scored, losses.view(len(batch), last).cpu())


@torch.no_grad()
def score_stream(model: BaseFairseqModel, stream: Tensor, window: int) -> Iterator[Scored]:
    """Scores a text as one stream: a token attends, in every layer, to the last `window` tokens, itself included.

    With x(0, i) the embedding of input i, layer l computes x(l, i) from x(l - 1, i) and attention over the keys and
    values of x(l - 1, j) for i - window < j <= i, the bias being that of the distance i - j; input 0 is the end of
    sentence in front of the text. So each key and value is computed once and kept for `window` tokens, and memory
    is constant. Through the layers a token learns of what lies up to layers x (window - 1) tokens back.

    Args:
        model: of this plugin, in evaluation mode, with a position method that knows distances only.
        stream: (N,) tokens of the text.
        window: W, tokens.

    Raises:
        ValueError: the model has absolute positions or is none of this plugin's.
    """
    decoder = model.decoder
    if not isinstance(decoder, Decoder):
        raise ValueError("streaming needs a model of this plugin (alibi_lm): evaluate this one by windows")
    if decoder.position_method.embedding is not None:
        raise ValueError(
            "streaming: the model adds a position to each token, and a stream has no first one; use windows"
        )
    device = next(model.parameters()).device
    source = source_of(stream, decoder.dictionary.eos())
    prepare(model, window)
    chunk, state = min(max(window, CHUNK[0]), CHUNK[1]), {}
    for first in range(0, len(stream), chunk):
        end = min(first + chunk, len(stream))
        inputs = source[max(0, first - (window - 1)) : end].to(device).long()[None]
        targets = stream[first:end].to(device).long()
        features = decoder.extract_features_scriptable(inputs, None, state, last=end - first, window=window)[0]
        yield Scored(first, output_losses(decoder, features[0], targets)[None].cpu())


def masked_tokens(count: int) -> Tensor:
    """Which tokens of a text are masked, the same ones at all lengths and for all models: (N,) bool."""
    masked = torch.zeros(count, dtype=torch.bool)
    masked[torch.randperm(count, generator=torch.Generator().manual_seed(1))[: max(1, round(MASKED * count))]] = True
    return masked


@torch.no_grad()
def score_masked(
    model: BaseFairseqModel, stream: Tensor, length: int, positions: int, share: tuple[int, int] = (0, 1)
) -> Iterator[Scored]:
    """Scores the masked tokens of a text in blocks that do not overlap, see `masked_tokens`.

    A block is what fairseq's task masked_lm makes: <s> and length - 1 tokens. All masked tokens are <mask> there.

    Args:
        model: masked language model of fairseq's or this plugin's, in evaluation mode.
        stream: (N,) tokens of the text.
        length: L, tokens in a block, <s> included.
        positions: tokens in a batch; a batch has one block at least.
        share: see `score_windows`.

    Yields:
        The losses of all tokens, 0 for those that are not masked.

    Raises:
        ValueError: the length is 1, or see `prepare`.
    """
    if length < 2:
        raise ValueError("length 1: a block begins with <s>, pass a length of at least 2")
    prepare(model, length)
    device, encoder = next(model.parameters()).device, model.encoder
    masked = masked_tokens(len(stream))
    source = stream.long().masked_fill(masked, encoder.dictionary.index("<mask>"))
    for batch in shared(batches(windows(len(stream), length - 1, length - 1), positions), share):
        scored = slice(batch[0].begin, batch[-1].end)
        inputs = F.pad(source[scored].view(len(batch), -1), (1, 0), value=encoder.dictionary.bos())
        found = masked[scored].view(len(batch), -1)
        features = encoder.extract_features(inputs.to(device))[0][:, 1:][found.to(device)]
        targets = stream[scored].view_as(found)[found].to(device).long()
        losses = torch.zeros(found.shape)
        losses[found] = cross_entropies(encoder.lm_head, features, targets, len(encoder.dictionary)).cpu()
        yield Scored(scored.start, losses)


def prepare(model: BaseFairseqModel, length: int) -> None:
    """Tells a model the length at which it is evaluated.

    Raises:
        ValueError: the model has a longest sequence, and this is longer; or it is no transformer.
    """
    masked = isinstance(model, RobertaModel)
    stack = model.encoder.sentence_encoder if masked else model.decoder
    if not isinstance(stack, (TransformerDecoderBase, TransformerEncoderBase)):
        raise ValueError(f"{type(model).__name__} is no transformer: evaluate it with scripts/eval_nonoverlapping.sh")
    longest, option = model.max_positions(), "max_positions" if masked else "max_target_positions"
    if length > longest:
        raise ValueError(
            f"length {length:,} is longer than the model's longest sequence, {longest:,}: evaluate it at up to that "
            f"or, where its positions go on, pass --model-overrides \"{{'{option}': N}}\""
        )
    if isinstance(stack, (Decoder, Encoder)):
        stack.set_evaluation_length(length)
