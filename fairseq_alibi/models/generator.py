"""fairseq's generator, made to read the prompt in one pass.

`Generator` is what fairseq-interactive, fairseq-generate and the hub interface get for a model of this plugin
(`read_prompts_in_one_pass`). It gives the hypotheses and scores of fairseq's own, which reads a prompt token by token.

Shapes: B sentences, R = B * beam hypotheses, V types.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Optional

import torch
from fairseq import search
from fairseq.data import Dictionary
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from torch import Tensor, nn

from .decoder import AlibiDecoder

#: Numbers in the largest matrix of scores, positions times V, that is made for a prompt.
SCORES = 2**24


class PromptReader(EnsembleModel):
    """fairseq's ensemble of decoders; at the first step it reads a whole prompt, and needs no step inside it.

    Args:
        models: one or more language models.
        eos: what ends a sentence.
        line_end: what the models read where the tokens hold `stand_in`.
        stand_in: see `Generator`.
    """

    def __init__(self, models: Sequence[nn.Module], eos: int, line_end: int, stand_in: Optional[int] = None):
        super().__init__(models)
        self.eos, self.line_end, self.stand_in = eos, line_end, stand_in
        #: (B, n) first tokens of the prompts, as far as the shortest goes; None for no prompt.
        self.prompt: Optional[Tensor] = None
        self.inside = False  # whether the last step was inside the prompt
        self.log_probs: Optional[Tensor] = None  # (B, n, 2) of the prompt's next token and of eos
        #: Whether the end, when it has to come, costs nothing.
        self.free_end = False
        #: What smaller log-probabilities are raised to; None to leave them.
        self.least: Optional[float] = None

    def reads_prompts(self) -> bool:
        """Whether all models have this plugin's decoder, which can read any number of tokens at once."""
        return all(isinstance(getattr(model, "decoder", None), AlibiDecoder) for model in self.models)

    def forward_decoder(self, tokens, encoder_outs, incremental_states, temperature=1.0):
        """See `EnsembleModel.forward_decoder`. (R, 1 + step) tokens -> (R, V), None.

        Inside the prompt all is -inf but the prompt's next token, which is to be forced, and eos, which may have to
        come because the longest length is reached.
        """
        tokens = torch.cat([tokens[:, :1], self.as_read(tokens[:, 1:])], dim=1)
        step = tokens.size(1) - 1
        self.inside = self.prompt is not None and step < self.prompt.size(1)
        if not self.inside:
            log_probs, attn = super().forward_decoder(tokens, encoder_outs, incremental_states, temperature)
            if self.free_end:
                log_probs[:, self.eos] = 0.0
            return self.raise_to_least(log_probs), attn
        prompt = self.as_read(self.prompt)
        sentences = prompt.size(0)
        # Each prompt is read once; its hypotheses are still alike, so they start from copies of the same keys.
        copies = torch.arange(sentences, device=tokens.device).repeat_interleave(tokens.size(0) // sentences)
        if step == 0:
            self.log_probs = self.read(
                torch.cat([tokens[:: tokens.size(0) // sentences], prompt[:, :-1]], dim=1),
                torch.stack([prompt, torch.full_like(prompt, self.eos)], dim=2),
                incremental_states,
                temperature,
            )
            super().reorder_incremental_state(incremental_states, copies)
        known = torch.stack([prompt[:, step], torch.full_like(prompt[:, step], self.eos)], dim=1)
        log_probs = self.raise_to_least(self.log_probs[:, step])
        return log_probs.new_full((sentences, self.types()), -math.inf).scatter_(1, known, log_probs)[copies], None

    def reorder_incremental_state(self, incremental_states, new_order):
        """See `EnsembleModel.reorder_incremental_state`; inside the prompt there is nothing to be done.

        There all hypotheses of a sentence have the same keys, and no sentence ends. To move them at each step would
        take time in proportion to the square of the prompt.
        """
        if not self.inside:
            super().reorder_incremental_state(incremental_states, new_order)

    def as_read(self, tokens: Tensor) -> Tensor:
        """Tokens with the line ends that the stand-in stands for."""
        return tokens if self.stand_in is None else tokens.masked_fill(tokens == self.stand_in, self.line_end)

    def raise_to_least(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities of at least `least`."""
        return log_probs if self.least is None else log_probs.float().clamp(min=self.least)

    def types(self) -> int:
        """V."""
        return len(self.single_model.decoder.dictionary)

    def read(self, tokens: Tensor, wanted: Tensor, incremental_states, temperature: float) -> Tensor:
        """Reads (B, n) tokens into empty incremental states.

        Returns:
            (B, n, k) log-probabilities, averaged over the models, of the (B, n, k) `wanted` tokens after each position.
        """
        positions = max(1, SCORES // (tokens.size(0) * self.types()))
        features = [
            model.decoder.extract_features_scriptable(tokens, None, state, last=tokens.size(1))[0]
            for model, state in zip(self.models, incremental_states)
        ]
        found = []
        for first in range(0, tokens.size(1), positions):
            chunk = slice(first, first + positions)
            log_probs = []
            for model, x in zip(self.models, features):
                # The temperature divides what fairseq divides: logits, or the features of an adaptive softmax.
                output = model.decoder.output_layer(x[:, chunk]) / temperature
                scores = model.get_normalized_probs((output, None), log_probs=True, sample=None)
                log_probs.append(scores.gather(2, wanted[:, chunk]))
            average = torch.logsumexp(torch.stack(log_probs), dim=0) - math.log(len(log_probs))
            found.append(log_probs[0] if len(log_probs) == 1 else average)
        return torch.cat(found, dim=1)


class RepeatBlock(nn.Module):
    """Bans tokens that would repeat an n-gram, but none that is forced.

    fairseq's own looks for the n-gram at the end of its token buffer, which is padding, and so bans nothing on CPU; on
    GPU it bans tokens of a prompt that repeats itself.

    Args:
        size: n.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, tokens: Tensor, lprobs: Tensor, bsz: int, beam_size: int, step: int) -> Tensor:
        """See `NGramRepeatBlock.forward`: (R, V) `lprobs` with -inf at banned tokens."""
        if step + 1 < self.size:
            return lprobs
        ngrams = tokens[:, : step + 1].unfold(1, self.size, 1)  # (R, number, n)
        last = tokens[:, None, step + 2 - self.size : step + 1]
        rows, places = (ngrams[:, :, :-1] == last).all(dim=2).nonzero(as_tuple=True)
        free = lprobs.isfinite().sum(dim=1)[rows] > 1
        lprobs[rows[free], ngrams[rows, places, -1][free]] = -math.inf
        return lprobs


class Generator(SequenceGenerator):
    """fairseq's `SequenceGenerator`, which reads the prompt, its `prefix_tokens`, in one pass.

    Args:
        models, dictionary, kwargs: as for `SequenceGenerator`.
        lines_in_prompt: whether a line end inside a prompt leaves the sentence open; for fairseq it ends it.
        free_end: whether `eos`, then a token that comes at the longest length only, adds nothing to a score.
    """

    def __init__(self, models, dictionary: Dictionary, lines_in_prompt: bool = False, free_end: bool = False, **kwargs):
        # While fairseq looks, the prompt's line ends are tokens that no text holds.
        stand_in = dictionary.bos() if lines_in_prompt else None
        eos = kwargs.get("eos")
        reader = PromptReader(models, dictionary.eos() if eos is None else eos, dictionary.eos(), stand_in)
        reader.free_end = free_end
        super().__init__(reader, dictionary, **kwargs)
        if isinstance(self.search, search.Sampling):
            # fairseq draws the tokens that it forces too, and fails at one whose probability underflows to 0.
            reader.least = math.log(torch.finfo(torch.float).tiny)
        if self.repeat_ngram_blocker is not None:
            self.repeat_ngram_blocker = RepeatBlock(self.repeat_ngram_blocker.no_repeat_ngram_size)

    def _generate(self, sample, prefix_tokens=None, constraints=None, bos_token=None):
        if prefix_tokens is not None and self.model.stand_in is not None:
            prefix_tokens = prefix_tokens.masked_fill(prefix_tokens == self.model.line_end, self.model.stand_in)
        if prefix_tokens is not None and self.model.reads_prompts():
            # As far as every row has a token and goes on after it: no row can end inside.
            goes_on = (prefix_tokens != self.pad) & (prefix_tokens != self.eos)
            length = int(goes_on.all(dim=0).long().cumprod(dim=0).sum())
            self.model.prompt = prefix_tokens[:, :length] if length else None
        try:
            finalized = super()._generate(sample, prefix_tokens, constraints, bos_token)
        finally:
            self.model.prompt = self.model.log_probs = None
        for hypothesis in (one for sentence in finalized for one in sentence):
            hypothesis["tokens"] = self.model.as_read(hypothesis["tokens"])
        return finalized

    def _prefix_tokens(self, step, lprobs, scores, tokens, prefix_tokens, beam_size):
        """See `SequenceGenerator._prefix_tokens`: makes the prompt's next token the only possible one."""
        if self.model.stand_in is not None:
            line_ends = (prefix_tokens[:, step] == self.model.stand_in).repeat_interleave(beam_size)
            lprobs[line_ends, self.model.stand_in] = lprobs[line_ends, self.model.line_end]
        if self.model.free_end:  # where another row is still in its prompt fairseq lets shorter texts end too early
            lprobs[:, self.eos] = -math.inf
        return super()._prefix_tokens(step, lprobs, scores, tokens, prefix_tokens, beam_size)


def read_prompts_in_one_pass(task) -> None:
    """Makes `Generator` what the task's `build_generator` builds, unless it is told another class.

    The task is all that fairseq's commands ask for a generator. A task that builds none stays as it is.
    """
    if hasattr(task, "build_generator"):
        vars(task).setdefault("build_generator", partial(task.build_generator, seq_gen_cls=Generator))
