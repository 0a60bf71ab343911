"""Accuracy of models on probes: by size, by depth of what is asked for, and by its distance from the question."""

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from fairseq.models import BaseFairseqModel
from fairseq.utils import split_paths
from torch import Tensor
from tqdm import tqdm

from ..files.checkpoints import describe_evaluated, load_model, read_checkpoint
from ..files.data_folders import open_subset, read_preparation
from ..models.decoder import AlibiDecoder
from .probe_tasks import PROBES, Answer

PARTS = ("train_sizes", "test_sizes", "unit", "options")  # what the record of a folder has to hold, beside its task
DEPTHS = 10  # equal parts of a text in which depths are counted


class Outcome(NamedTuple):
    """What a model made of one answer."""

    depth: float  # of the source in the text before the answer, from 0 to 1
    gap: int  # tokens from the source to the answer
    right: int  # tokens that are right
    tokens: int  # of the answer


@dataclass(frozen=True)
class ProbeEvaluation:
    """How probes are evaluated."""

    data: str  # folder of `fairseq-alibi probe make`
    sizes: Sequence[int] = ()  # those to evaluate; empty for all that the folder has
    threshold: float = 0.85  # accuracy that the effective length has to reach
    max_tokens: int = 8192  # in a batch
    model_overrides: dict[str, Any] = field(default_factory=dict)  # options of the model, by name
    device: str = "cpu"

    def preparation(self) -> dict[str, Any]:
        """The settings by which the folder was made, see `ProbeSettings.record`.

        ValueError: it holds no probes, or not of a size that is asked for.
        """
        if len(split_paths(self.data)) > 1:
            raise ValueError(f"{self.data} are several folders: evaluate on one after the other")
        probe = read_preparation(Path(self.data)).get("probe")
        if not isinstance(probe, dict) or probe.get("task") not in PROBES or not set(PARTS) <= set(probe):
            raise ValueError(f"{self.data} holds no probes: make a folder with fairseq-alibi probe make")
        for size in self.sizes:
            if size not in probe["test_sizes"]:
                known = ", ".join(map(str, probe["test_sizes"]))
                raise ValueError(f"{self.data} has no texts of size {size}, only of {known}: pass one of these")
        return probe


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95% confidence interval of a share (Wilson 1927), as if all trials were independent."""
    z = 1.959964
    share, spread = successes / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / trials + spread / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Share of answers that are right in all tokens, with its interval, and share of tokens that are right."""
    exact = sum(outcome.right == outcome.tokens for outcome in outcomes)
    return {
        "answers": len(outcomes),
        "exact_match": exact / len(outcomes),
        "interval": list(wilson_interval(exact, len(outcomes))),
        "token_accuracy": sum(outcome.right for outcome in outcomes) / sum(outcome.tokens for outcome in outcomes),
    }


def effective_length(results: Sequence[dict[str, Any]], threshold: float) -> int:
    """The size, of results by rising size, up to which all have this exact match; 0 if the first has not."""
    reached = itertools.takewhile(lambda result: result["exact_match"] >= threshold, results)
    return max((result["size"] for result in reached), default=0)


@torch.no_grad()
def predict(model: BaseFairseqModel, tokens: Tensor, answers: Sequence[Sequence[Answer]], eos: int) -> Tensor:
    """The model's greedy choice at each answer: (B, T) tokens, of which those of the answers count.

    Answers of one token are predicted in one pass. Longer ones are decoded through the cache, each token after the
    model's own choices for those before it; then all rows have to have their answers at the same places. The model is
    in evaluation mode, `tokens` (B, T) are the texts, which begin after `eos`.
    """
    source = tokens.roll(1, dims=1)
    source[:, 0] = eos
    if all(answer.stop - answer.start == 1 for row in answers for answer in row):
        return model.get_normalized_probs(model(source), log_probs=True).argmax(dim=-1)
    chosen = tokens.clone()
    state: Optional[dict[str, Any]] = {} if isinstance(model.decoder, AlibiDecoder) else None
    for answer in answers[0]:
        for place in range(answer.start, answer.stop):
            output = model.decoder(source[:, : place + 1], incremental_state=state)
            chosen[:, place] = model.get_normalized_probs(output, log_probs=True)[:, -1].argmax(dim=-1)
            if place + 1 < source.size(1):
                source[:, place + 1] = chosen[:, place]
    return chosen


def outcomes_of_size(model: BaseFairseqModel, size: int, settings: ProbeEvaluation, title: str) -> list[Outcome]:
    """Every answer in the texts of a size.

    ValueError: the texts are longer than the model reads, or the folder's files do not fit each other.
    """
    dataset, path = open_subset(settings.data, f"test-{size}"), Path(settings.data) / f"test-{size}.json"
    try:
        answers = [[Answer(*answer) for answer in row] for row in json.loads(path.read_text())]
        inside = all(
            row and all(0 <= answer.source < answer.start < answer.stop <= length for answer in row)
            for row, length in zip(answers, dataset.sizes)
        )
    except (OSError, ValueError, TypeError):
        answers, inside = [], False
    if not inside or len(answers) != len(dataset):
        raise ValueError(f"{path} does not list the answers of its subset: make the folder anew")
    length, longest = int(max(dataset.sizes)), model.max_positions()
    if length > longest:
        raise ValueError(f"texts of size {size} have {length} tokens, the model reads {longest}: pass smaller --sizes")
    if isinstance(model.decoder, AlibiDecoder):  # it may scale slopes or frequencies with the length
        model.decoder.set_evaluation_length(length)
    outcomes = []
    rows_at_once = max(1, settings.max_tokens // length)
    for first in tqdm(range(0, len(dataset), rows_at_once), title, leave=False):
        rows = answers[first : first + rows_at_once]
        tokens = torch.stack([dataset[first + number] for number in range(len(rows))]).to(settings.device)
        right = (predict(model, tokens, rows, model.decoder.dictionary.eos()) == tokens).cpu()
        for row, marks in zip(rows, right):
            for start, stop, source in row:
                depth = source / max(1, start)
                outcomes.append(Outcome(depth, start - source, int(marks[start:stop].sum()), stop - start))
    return outcomes


def by_depth_and_gap(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Accuracy by tenth of the text before the question, and by octave of the gap."""
    depths, gaps = defaultdict(list), defaultdict(list)
    for outcome in outcomes:
        depths[min(DEPTHS - 1, int(outcome.depth * DEPTHS))].append(outcome)
        gaps[outcome.gap.bit_length()].append(outcome)
    return {
        "by_depth": [{"depth": n / DEPTHS, **accuracy(depths[n])} for n in sorted(depths)],
        "by_gap": [{"first": 2**n // 2, "last": 2**n - 1, **accuracy(gaps[n])} for n in sorted(gaps)],
    }


def evaluate_probe(checkpoint: str, settings: ProbeEvaluation) -> dict[str, Any]:
    """The content of the result file of one checkpoint; prints a line for each size. ValueError names bad input."""
    probe = settings.preparation()
    state, overrides = read_checkpoint(checkpoint), settings.model_overrides
    description = describe_evaluated(checkpoint, state, overrides, ("probe", "language_modeling"))
    model = load_model(checkpoint, state, settings.data, overrides).to(settings.device)
    results = []
    for size in settings.sizes or probe["test_sizes"]:
        title = f"{Path(checkpoint).resolve().parent.name}: {probe['task']}, {size} {probe['unit']}"
        outcomes = outcomes_of_size(model, size, settings, title)
        results.append({"size": size, **accuracy(outcomes), **by_depth_and_gap(outcomes)})
        print(f"{title}: {results[-1]['exact_match']:.1%} of {len(outcomes):,} answers are right")
    results.sort(key=lambda result: result["size"])
    return {
        "model": {**description, "overrides": overrides},
        "data": settings.data,
        "probe": probe,
        "results": results,
        "threshold": settings.threshold,
        "effective_length": effective_length(results, settings.threshold),
    }
