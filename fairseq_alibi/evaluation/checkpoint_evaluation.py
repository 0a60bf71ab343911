"""Perplexity of checkpoints at many lengths, in exact arithmetic: each token is scored once.

A checkpoint is read once for all lengths. Its results are in one JSON file, written after each length; a result that is
in the file is not computed again. Under torchrun the processes share the batches and give the same results.
"""

import copy
import json
import re
import shlex
import sys
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from fairseq.models import BaseFairseqModel

from ..files.checkpoints import check_exists, describe_evaluated, describe_model, load_model, read_checkpoint
from ..files.errors import one_line
from ..files.results import describe_environment
from . import processes
from .measurement import Windowing, evaluate_model
from .result_files import ResultFile, TokenLossFile, evaluation_subject
from .text import EvaluationText

TASKS = ("language_modeling", "masked_lm")  # the tasks of fairseq whose models can be evaluated
LENGTH_MULTIPLES = (1, 2, 4, 8, 16)  # the default lengths are these multiples of the training length


def evaluation_dtype(device: str) -> str:
    """The dtype in which a model is evaluated unless another one is asked for: half precision on a GPU."""
    if device == "cpu":
        return "float32"
    return "bfloat16" if torch.cuda.get_device_capability() >= (8, 0) else "float16"


def tokens_that_fit(model: BaseFairseqModel, device: str) -> int:
    """Tokens in a batch: 4,096 on a CPU, on a GPU so many that their activations take a quarter of its free memory.

    A layer without gradients is taken to hold 24 numbers of each token per channel, and what is in its widest part.
    """
    widths = [(part.in_features, part.out_features) for part in model.modules() if isinstance(part, torch.nn.Linear)]
    if device == "cpu" or not widths:
        return 4096
    widest = max(min(pair) * 24 + max(pair) for pair in widths if max(pair) <= 16 * min(pair))
    free, _ = torch.cuda.mem_get_info()
    tokens = free // (4 * widest * next(model.parameters()).element_size())
    return min(max(4096, 2 ** (tokens.bit_length() - 1)), 65536)


@dataclass(frozen=True)
class EvaluationSettings:
    """What is evaluated and how; ValueError if two settings contradict each other."""

    data: str
    subset: str = "valid"
    lengths: Sequence[int] = ()  # in tokens; empty for multiples of each model's training length, or a whole stream
    stride: Optional[int] = None  # tokens from one window to the next; None for non-overlapping blocks
    stride_fraction: Optional[Fraction] = None  # the stride as a share of each length
    streaming: bool = False  # one stream without windows
    by_position: bool = False  # results hold the loss by position in the window
    token_losses: Optional[Path] = None  # .npz file for the losses of single tokens
    marker: Optional[str] = None  # of subword units, see `EvaluationText`
    max_tokens: Optional[int] = None  # in a batch, context included; None for `tokens_that_fit`
    model_overrides: dict[str, Any] = field(default_factory=dict)  # options of the model, by name
    dtype: str = "float32"
    device: str = "cpu"
    output: Optional[Path] = None  # folder of the JSON files; None to put each beside its checkpoint
    overwrite: bool = False  # replace earlier results

    def __post_init__(self) -> None:
        """Checks the settings."""
        if self.marker is not None and not self.marker.strip():
            raise ValueError(f"--remove-bpe '{self.marker}': pass the marker, '@@ ' or sentencepiece, or drop it")
        if self.by_position and self.streaming:
            raise ValueError("--by-position: a stream has no windows, and so no positions in them; drop one of the two")
        if self.token_losses is not None and self.token_losses.suffix != ".npz":
            raise ValueError(f"--save-token-losses {self.token_losses}: the file's name has to end in .npz")
        if self.streaming and processes.count() > 1:
            raise ValueError("--streaming: one process reads the stream from start to end; run without torchrun")

    def windowings(self, training_length: int, tokens: int) -> list[Windowing]:
        """The windowings to evaluate of a text of so many tokens; ValueError if a stride is longer than a length."""
        windowings = []
        multiples = [training_length * multiple for multiple in LENGTH_MULTIPLES]
        for length in self.lengths or ([tokens] if self.streaming else multiples):
            stride = None if self.streaming else self.stride or length
            if self.stride_fraction is not None:
                stride = max(1, int(length * self.stride_fraction))
            if stride is not None and stride > length:
                raise ValueError(f"stride {stride} is longer than the length {length} and would skip tokens")
            windowings.append(Windowing(length, stride))
        return list(dict.fromkeys(windowings))

    def result_path(self, checkpoint: str) -> Path:
        """The JSON file for a checkpoint's results."""
        path = Path(checkpoint)
        if self.output is None:
            return path.with_name(f"{path.stem}_{self.subset}.json")
        return self.output / f"{path.resolve().parent.name}_{path.stem}_{self.subset}.json"

    def run_name(self, content: dict[str, Any]) -> str:
        """A name for a TensorBoard folder of a result file, which differs for whatever else is evaluated."""
        path, options = Path(content["model"]["checkpoint"]), dict(self.model_overrides)
        if self.dtype != "float32":
            options["dtype"] = self.dtype
        parts = [path.resolve().parent.name, path.stem, self.subset]
        parts += [f"{key}={options[key]}" for key in sorted(options)]
        digest = zlib.crc32(json.dumps(content["subject"], sort_keys=True).encode())
        return re.sub(r"[^\w.=+-]", "-", "_".join(parts))[:200] + f"_{digest:08x}"

    def check_checkpoints(self, checkpoints: Sequence[str]) -> None:
        """Raises ValueError unless all checkpoints exist and each has files of its own."""
        if self.token_losses is not None and len(checkpoints) > 1:
            raise ValueError("--save-token-losses: the file is of one checkpoint, evaluate one at a time")
        writers: dict[Path, str] = {}
        for checkpoint in checkpoints:
            check_exists(checkpoint)
            path = self.result_path(checkpoint)
            if path in writers:
                raise ValueError(f"{writers[path]} and {checkpoint} would both be written to {path}: drop --output")
            writers[path] = checkpoint


class LoadedCheckpoint(NamedTuple):
    """A checkpoint that is ready for evaluation."""

    model: BaseFairseqModel  # in evaluation mode, with its dtype, on its device
    description: dict[str, Any]  # architecture, position method, training length, updates, parameters
    subject: dict[str, Any]  # checksums and settings that tell this evaluation from others
    text: EvaluationText  # with the first token that the model expects


def load_for_evaluation(checkpoint: str, text: EvaluationText, settings: EvaluationSettings) -> LoadedCheckpoint:
    """Loads a checkpoint in every process; ValueError if it cannot be evaluated, or differs between processes."""
    with processes.fail_together():
        state = read_checkpoint(checkpoint)
        describe_model(checkpoint, state, TASKS)  # raises an error for a model of another task
        subject = evaluation_subject(state, text, settings.model_overrides, settings.dtype, settings.device)
        model = load_model(checkpoint, state, settings.data, settings.model_overrides)
        description = describe_evaluated(checkpoint, state, settings.model_overrides, TASKS)
        description["parameters"] = sum(parameter.numel() for parameter in model.parameters())
        if description.get("add_bos_token"):
            text = copy.copy(text)
            text.first_token = model.decoder.dictionary.bos()
        subject["remove_bpe"] = settings.marker
        model = model.to(settings.device, getattr(torch, settings.dtype))
    if any(other != subject for other in processes.gather(subject)):
        raise ValueError(f"{checkpoint} or {settings.data} is not the same on all machines: copy one to all")
    return LoadedCheckpoint(model, description, subject, text)


class EvaluationFiles:
    """The files that one checkpoint's evaluation reads and writes; opened by the first process only."""

    def __init__(
        self, checkpoint: str, loaded: LoadedCheckpoint, settings: EvaluationSettings, max_tokens: int
    ) -> None:
        environment = describe_environment(settings.device)
        self.run = f"{environment['date']} {uuid.uuid4().hex[:8]}"  # by which each result names the run that made it
        run = {"command": shlex.join(sys.argv), "data": settings.data, "max_tokens": max_tokens}
        content = {
            "model": loaded.description,
            "data": settings.data,
            "subset": settings.subset,
            "subject": loaded.subject,
            "runs": {self.run: {**run, "processes": processes.count(), "environment": environment}},
        }
        self.by_position = settings.by_position
        self.results = ResultFile(settings.result_path(checkpoint), content, settings.overwrite)
        self.losses = TokenLossFile(settings.token_losses, loaded.text.stream, loaded.subject, settings.overwrite)

    def holds(self, windowing: Windowing) -> bool:
        """Whether everything that is wanted of a windowing is there."""
        result = self.results.find(windowing)
        complete = result is not None and (bool(result.get("by_position")) or not self.by_position)
        return complete and not self.losses.lacks(windowing)


def evaluate_checkpoint(checkpoint: str, text: EvaluationText, settings: EvaluationSettings) -> dict[str, Any]:
    """Evaluates a checkpoint with all windowings that its file lacks; the first process gets the file's content."""
    loaded = load_for_evaluation(checkpoint, text, settings)
    windowings = settings.windowings(loaded.description["training_length"], text.tokens)
    if (break_mode := loaded.description.get("sample_break_mode")) and processes.is_first():
        words = ["fairseq-alibi", "eval-lm", "nonoverlapping", settings.data, checkpoint, str(windowings[0].length)]
        command = shlex.join([*words, "--subset", settings.subset, "--", "--sample-break-mode", break_mode])
        note = f"{checkpoint} was trained with --sample-break-mode {break_mode}; here windows cross line ends"
        print(f"{note}. By lines: {command}", file=sys.stderr)
    files = None
    max_tokens = processes.broadcast(settings.max_tokens or tokens_that_fit(loaded.model, settings.device))
    with processes.fail_together():
        if processes.is_first():
            files = EvaluationFiles(checkpoint, loaded, settings, max_tokens)
    done = processes.broadcast(files and [windowing for windowing in windowings if files.holds(windowing)])
    for windowing in windowings:
        title = f"{Path(checkpoint).resolve().parent.name}: {windowing.name}"
        if windowing in done:
            if files and (result := files.results.find(windowing)):
                print(f"{windowing.name}: perplexity {result['perplexity']:.2f} (in {files.results.path} already)")
            continue
        try:
            evaluated = loaded.model, loaded.text, windowing
            result, losses = evaluate_model(*evaluated, max_tokens, settings.by_position, title)
        except RuntimeError as error:
            raise ValueError(f"{title}: {one_line(error)}") from error
        with processes.fail_together():
            if files:
                files.losses.add(windowing, losses, files.results.content["runs"][files.run])
                files.results.add({**result, "run": files.run})
                print(f"{title}: perplexity {result['perplexity']:.2f} ({result['seconds']} s)")
    return files.results.content if files else {}
