"""fairseq's generator, made to read the prompt in one pass, with the hypotheses and scores of fairseq's own.

fairseq-interactive, fairseq-generate and the hub interface get `Generator` for a model of this plugin. Shapes: B
sentences, R = B * beam hypotheses, V types.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Optional

import torch
from fairseq import search
from fairseq.data import Dictionary
from fairseq.sequence_generator import EnsembleModel, SequenceGenerator
from fairseq.tasks import FairseqTask
from torch import Tensor, nn

from .decoder import CHUNK, AlibiDecoder

SCORES = 2**24  # numbers in the largest matrix of scores, positions times V, that is made for a prompt


class PromptReader(EnsembleModel):
    """fairseq's ensemble of decoders, which reads the prompts, (B, n) tokens of the shortest's length, in one step.

    fairseq's search begins after the first `skip` tokens of the prompts, fewer than n, which it never sees.
    """

    def __init__(
        self, models: Sequence[nn.Module], rules: "EndingRules", prompt: Optional[Tensor] = None, skip: int = 0
    ):
        super().__init__(models)
        self.rules, self.skip = rules, skip
        self.prompt = None if prompt is None else rules.restore_line_ends(prompt)
        self.skipped: Optional[Tensor] = None  # (R, skip) tokens
        self.inside = False  # whether the last step was inside the prompt
        self.prompt_log_probs: Optional[Tensor] = None  # (B, n, 2) of the prompt's next token and of eos

    def forward_decoder(
        self, tokens: Tensor, encoder_outs: list[Any], incremental_states: list[Any], temperature: float = 1.0
    ) -> tuple[Tensor, Optional[Tensor]]:
        """See `EnsembleModel.forward_decoder`. (R, 1 + step) tokens -> (R, V), None.

        Inside the prompt all is -inf but its next token, which is forced, and eos, which the longest length may need.
        """
        eos, prompt = self.rules.eos, self.prompt
        step = tokens.size(1) - 1 + self.skip
        self.inside = prompt is not None and step < prompt.size(1)
        if prompt is None or not self.inside:
            skipped = [] if self.skipped is None else [self.skipped]
            tokens = torch.cat([tokens[:, :1], *skipped, self.rules.restore_line_ends(tokens[:, 1:])], dim=1)
            log_probs, attn = super().forward_decoder(tokens, encoder_outs, incremental_states, temperature)
            if self.rules.free_end:
                log_probs[:, eos] = 0.0
            # A tied output layer has more types than --output-dictionary-size lets a model predict.
            return self.rules.raise_to_least(log_probs[:, : self.types()]), attn
        sentences = prompt.size(0)
        # Each prompt is read once. Its hypotheses are still the same, so they start from copies of the same keys.
        copies = torch.arange(sentences, device=tokens.device).repeat_interleave(tokens.size(0) // sentences)
        if step == self.skip:
            log_probs = self.read(
                torch.cat([tokens[:: tokens.size(0) // sentences, :1], prompt[:, :-1]], dim=1),
                torch.stack([prompt, torch.full_like(prompt, eos)], dim=2),
                incremental_states,
                temperature,
            )
            self.prompt_log_probs = self.rules.raise_to_least(log_probs)
            self.skipped = prompt[copies, : self.skip] if self.skip else None
            super().reorder_incremental_state(incremental_states, copies)
        assert self.prompt_log_probs is not None
        known = torch.stack([prompt[:, step], torch.full_like(prompt[:, step], eos)], dim=1)
        log_probs = self.prompt_log_probs[:, step]
        return log_probs.new_full((sentences, self.types()), -math.inf).scatter_(1, known, log_probs)[copies], None

    def reorder_incremental_state(self, incremental_states: list[Any], new_order: Tensor) -> None:
        """See `EnsembleModel.reorder_incremental_state`; inside the prompt nothing is moved.

        There all hypotheses of a sentence have the same keys, and no sentence ends. Moving them at each step would take
        time in proportion to the square of the prompt's length.
        """
        if self.inside:
            return
        super().reorder_incremental_state(incremental_states, new_order)
        if self.skipped is not None and len(new_order) != len(self.skipped):  # a sentence has ended
            self.skipped = self.skipped[new_order]

    def types(self) -> int:
        """V."""
        return len(self.single_model.decoder.dictionary)

    def read(self, tokens: Tensor, wanted: Tensor, incremental_states: list[Any], temperature: float) -> Tensor:
        """Reads (B, n) tokens; returns the (B, n, k) mean log-probabilities of the `wanted` ones after each of them."""
        length, positions = tokens.size(1), max(1, SCORES // (tokens.size(0) * self.types()))
        decoders = [model.decoder for model in self.models]
        # Where a decoder drops what it has read, nothing of the whole prompt is held at once.
        bounded = all(decoder.bounded_cache(state) for decoder, state in zip(decoders, incremental_states))
        chunks = []
        for begin in range(0, length, CHUNK if bounded else length):
            end = min(begin + CHUNK, length) if bounded else length
            features = [
                decoder.extract_features_scriptable(tokens[:, :end], None, state, last=end - begin)[0]
                for decoder, state in zip(decoders, incremental_states)
            ]
            for first in range(begin, end, positions):
                chunk = slice(first, min(first + positions, end))
                log_probs = []
                for model, x in zip(self.models, features):
                    # The temperature divides what fairseq divides: logits, or the features of an adaptive softmax.
                    output = model.decoder.output_layer(x[:, first - begin : chunk.stop - begin]) / temperature
                    scores = model.get_normalized_probs((output, None), log_probs=True, sample=None)
                    log_probs.append(scores.gather(2, wanted[:, chunk]))
                average = torch.logsumexp(torch.stack(log_probs), dim=0) - math.log(len(log_probs))
                chunks.append(log_probs[0] if len(log_probs) == 1 else average)
        return torch.cat(chunks, dim=1)


@dataclass(frozen=True)
class EndingRules:
    """How a generation treats line ends and the ends of sentences."""

    eos: int  # token that ends a sentence
    line_end: int  # token that the models read as the end of a line
    #: Stands for `line_end` inside a prompt while fairseq searches, which would end the sentence there; None to end it.
    stand_in: Optional[int] = None
    free_end: bool = False  # `eos`, then a token that comes at the longest length only, adds nothing to a score
    least: Optional[float] = None  # smaller log-probabilities are raised to it

    def hide_line_ends(self, tokens: Tensor) -> Tensor:
        """Tokens with the stand-in in the place of line ends."""
        return tokens if self.stand_in is None else tokens.masked_fill(tokens == self.line_end, self.stand_in)

    def restore_line_ends(self, tokens: Tensor) -> Tensor:
        """Tokens with line ends in the place of the stand-in."""
        return tokens if self.stand_in is None else tokens.masked_fill(tokens == self.stand_in, self.line_end)

    def raise_to_least(self, log_probs: Tensor) -> Tensor:
        """Log-probabilities of at least `least`."""
        return log_probs if self.least is None else log_probs.float().clamp(min=self.least)


class RepeatBlock(nn.Module):
    """Bans tokens that would repeat an n-gram of `size` tokens, but none that is forced.

    fairseq's own looks for the n-gram at the end of its token buffer, which is padding, and so bans nothing on CPU; on
    GPU it bans tokens of a prompt that repeats itself.
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
    """fairseq's `SequenceGenerator` that reads a prompt in one pass; with `lines_in_prompt` line ends leave it open."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        dictionary: Dictionary,
        lines_in_prompt: bool = False,
        free_end: bool = False,
        **kwargs: Any,
    ):
        eos, draws = kwargs.get("eos"), isinstance(kwargs.get("search_strategy"), search.Sampling)
        rules = EndingRules(
            eos=dictionary.eos() if eos is None else eos,
            line_end=dictionary.eos(),
            stand_in=dictionary.bos() if lines_in_prompt else None,  # no text holds it
            free_end=free_end,
            # fairseq draws the tokens that it forces too, and fails at one whose probability underflows to 0.
            least=math.log(torch.finfo(torch.float).tiny) if draws else None,
        )
        super().__init__(PromptReader(models, rules), dictionary, **kwargs)
        self.rules = rules
        blocker: Any = self.repeat_ngram_blocker  # type: ignore[has-type]
        if blocker is not None:
            self.repeat_ngram_blocker = RepeatBlock(blocker.no_repeat_ngram_size)

    def _generate(
        self,
        sample: dict[str, Any],
        prefix_tokens: Optional[Tensor] = None,
        constraints: Optional[Tensor] = None,
        bos_token: Optional[int] = None,
    ) -> list[list[dict[str, Tensor]]]:
        prompt, skip = None, 0
        # A generation has a reader and settings of its own, so that several may run at once.
        generation = copy.copy(self)
        if prefix_tokens is not None:
            prefix_tokens = self.rules.hide_line_ends(prefix_tokens)
            if all(isinstance(getattr(model, "decoder", None), AlibiDecoder) for model in self.model.models):
                # As far as every row has a token and continues after it, no row can end inside.
                inside = (prefix_tokens != self.pad) & (prefix_tokens != self.eos)
                length = int(inside.all(dim=0).long().cumprod(dim=0).sum())
                prompt = prefix_tokens[:, :length] if length else None
                if length > CHUNK and self.may_skip():
                    longest = int(self.max_len_a * sample["net_input"]["src_tokens"].size(1) + self.max_len_b)
                    longest = min(longest, self.max_len - 1)
                    skip = min(length - 1, longest)
        if prefix_tokens is not None and skip:
            generation.max_len_a, generation.max_len_b = 0, longest - skip
            generation.min_len, generation.normalize_scores = max(0, self.min_len - skip), False
            prefix_tokens = prefix_tokens[:, skip:]
        reader = PromptReader(self.model.models, self.rules, prompt, skip)
        generation._modules = {**self._modules, "model": reader}
        finalized = super(Generator, generation)._generate(sample, prefix_tokens, constraints, bos_token)
        if skip:
            finalized = self.add_skipped(finalized, reader)
        for hypothesis in itertools.chain.from_iterable(finalized):
            hypothesis["tokens"] = self.rules.restore_line_ends(hypothesis["tokens"])
        return finalized

    def may_skip(self) -> bool:
        """Whether the search sees nothing of the tokens before a step but the sum of their log-probabilities.

        fairseq's loop copies all tokens at each step. A prompt of a million tokens would take it hours.
        """
        simple = type(self.search) in (search.BeamSearch, search.Sampling) and self.lm_model is None
        return simple and self.repeat_ngram_blocker is None and not self.match_source_len

    def add_skipped(
        self, finalized: list[list[dict[str, Tensor]]], reader: PromptReader
    ) -> list[list[dict[str, Tensor]]]:
        """Puts the skipped tokens before those of each hypothesis, with scores of the whole; the best comes first."""
        assert reader.prompt is not None
        assert reader.prompt_log_probs is not None
        tokens = reader.prompt[:, : reader.skip]
        log_probs = reader.prompt_log_probs[:, : reader.skip, 0] - self.unk_penalty * (tokens == self.unk)
        for sentence, hypotheses in enumerate(finalized):
            for hypothesis in hypotheses:
                for name, skipped in (("tokens", tokens), ("positional_scores", log_probs)):
                    hypothesis[name] = torch.cat([skipped[sentence].to(hypothesis[name]), hypothesis[name]])
                hypothesis["score"] = hypothesis["score"] + log_probs[sentence].sum()
                if self.normalize_scores:
                    hypothesis["score"] /= len(hypothesis["tokens"]) ** self.len_penalty
        return [sorted(hypotheses, key=lambda one: -float(one["score"])) for hypotheses in finalized]

    def _prefix_tokens(
        self, step: int, lprobs: Tensor, scores: Tensor, tokens: Tensor, prefix_tokens: Tensor, beam_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `SequenceGenerator._prefix_tokens`: makes the prompt's next token the only possible one."""
        if self.rules.stand_in is not None:
            line_ends = (prefix_tokens[:, step] == self.rules.stand_in).repeat_interleave(beam_size)
            lprobs[line_ends, self.rules.stand_in] = lprobs[line_ends, self.rules.line_end]
        if self.rules.free_end:  # where another row is still in its prompt fairseq lets shorter texts end too early
            lprobs[:, self.eos] = -math.inf
        return super()._prefix_tokens(step, lprobs, scores, tokens, prefix_tokens, beam_size)


def read_prompts_in_one_pass(task: FairseqTask) -> None:
    """Makes the task's `build_generator`, if it has one, build a `Generator`, unless it is given another class."""
    if hasattr(task, "build_generator"):
        vars(task).setdefault("build_generator", partial(task.build_generator, seq_gen_cls=Generator))
