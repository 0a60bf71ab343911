"""Files of evaluation results: JSON, losses of single tokens, TensorBoard.

Earlier results are read and kept. Several processes of the user may write one file at the same time: under a lock each
reads what the others have written and adds its own.
"""

import json
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional

import numpy
import torch
from omegaconf import OmegaConf
from torch import Tensor

from ..files.checkpoints import reading_options
from ..files.locks import locked
from ..files.results import check_content, check_values, check_writable, naming, write_json, written_whole
from .curves import window_names
from .measurement import Windowing
from .text import EvaluationText

WAIT = 60.0  # seconds to wait for another process that is writing the same file


def checksum(tensors: Iterable[Tensor], more: Any = None) -> str:
    """CRC-32 of tensors and `more`, which JSON or `str` can write, eight hexadecimal digits."""
    value = zlib.crc32(json.dumps(more, sort_keys=True, default=str).encode()) if more else 0
    for tensor in tensors:
        value = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def evaluation_subject(
    state: dict[str, Any], text: EvaluationText, overrides: dict[str, Any], dtype: str, device: str
) -> dict[str, Any]:
    """Checksums and settings that tell an evaluation from others; `state` is of the checkpoint, without overrides."""
    model, task = state["cfg"]["model"], state["cfg"]["task"]
    options = OmegaConf.to_container(model) if OmegaConf.is_config(model) else vars(model)
    return {
        "weights": checksum(state["model"].values()),
        "model_options": checksum([], [options, reading_options(state), task.tokens_per_sample]),
        "text": checksum([text.stream], text.original),
        "model_overrides": overrides,
        "dtype": dtype,
        "device": device,
    }


class ResultFile:
    """The JSON file with the results of one checkpoint; each new result is written at once.

    `content` is everything but the results: `content["subject"]` says what is evaluated, `content["runs"]` by name what
    makes the results. ValueError: the file holds results of another subject.
    """

    def __init__(self, path: Path, content: dict[str, Any], overwrite: bool) -> None:
        self.path, self.overwrite = path, overwrite
        self.content: dict[str, Any] = {**content, "results": []}
        check_writable(path)
        self.content["results"] = self.read_earlier_results()

    def read_earlier_results(self) -> list[dict[str, Any]]:
        """The results in the file; none if there is no file or it is to be overwritten."""
        if self.overwrite or not self.path.exists():
            return []
        subject = self.content["subject"]
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            check_content(content)
            different = [name for name in subject if content["subject"].get(name) != subject[name]]
            results, runs = list(content["results"]), dict(content["runs"])
            for result in results:
                check_values(result, tokens="count", loss="measure", tokens_per_second="measure", seconds="measure")
                runs[result["run"]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            different, results, runs = ["content"], [], {}
        if different:
            raise ValueError(
                f"{self.path} exists and is of another evaluation ({', '.join(different)}): pass --overwrite to "
                "replace it, or another --output"
            )
        self.content["runs"] = {**runs, **self.content["runs"]}
        return results

    def find(self, windowing: Windowing) -> Optional[dict[str, Any]]:
        """The result of a windowing, None if it is missing."""
        matches = (result for result in self.content["results"] if (result["length"], result["stride"]) == windowing)
        return next(matches, None)

    def add(self, result: dict[str, Any]) -> None:
        """Adds a result, in place of one of the same windowing, and writes the file; ValueError if it has changed."""
        with locked(self.path, WAIT):
            results = {}
            for other in [*self.content["results"], *self.read_earlier_results()]:
                results[other["length"], other["stride"]] = other
            results.pop((result["length"], result["stride"]), None)
            self.content["results"] = [*results.values(), result]
            used = {other.get("run") for other in self.content["results"]}
            runs = {name: run for name, run in self.content["runs"].items() if name in used}
            write_json(self.path, {**self.content, "runs": runs})
        self.overwrite = False


class TokenLossFile:
    """An .npz file with the losses of single tokens, one array per windowing, always written whole.

    It also holds the (N,) tokens of the text, and as JSON the subject and the run that made each array. ValueError: it
    holds something else.
    """

    def __init__(self, path: Optional[Path], stream: Tensor, subject: dict[str, Any], overwrite: bool) -> None:
        self.path, self.overwrite, self.tokens = path, overwrite, stream.numpy()
        self.subject = {**subject, "remove_bpe": None}  # which changes no loss of a token
        self.losses: dict[str, Any] = {}
        self.runs: dict[str, Any] = {}
        if path is not None:
            check_writable(path)
            self.read_earlier_losses(path)

    def read_earlier_losses(self, path: Path) -> None:
        """Adds what is in the file, unless there is no file or it is to be overwritten."""
        if self.overwrite or not path.exists():
            return
        try:
            with numpy.load(path) as stored:
                arrays = dict(stored)
            same = numpy.array_equal(arrays.pop("tokens"), self.tokens)
            same = same and json.loads(str(arrays.pop("subject"))) == self.subject
            self.runs.update(json.loads(str(arrays.pop("runs"))))
            self.losses.update(arrays)
        except Exception:  # numpy and zipfile raise many kinds of errors for a file that is not a whole .npz
            same = False
        if not same:
            raise ValueError(
                f"{path} exists and holds something else, or losses of another evaluation: pass --overwrite to replace "
                "it, or another --save-token-losses"
            )

    def lacks(self, windowing: Windowing) -> bool:
        """Whether the losses of a windowing are wanted and missing."""
        return self.path is not None and windowing.name not in self.losses

    def add(self, windowing: Windowing, losses: Tensor, run: dict[str, Any]) -> None:
        """Adds the (N,) losses in bits that `run` made with a windowing, and writes the file; raises as the class."""
        if self.path is None:
            return
        with locked(self.path, WAIT):
            self.read_earlier_losses(self.path)
            self.losses[windowing.name], self.runs[windowing.name] = losses.numpy(), run
            texts = {"subject": json.dumps(self.subject), "runs": json.dumps(self.runs)}
            with written_whole(self.path) as partial:
                numpy.savez(partial, tokens=self.tokens, **texts, **self.losses)  # type: ignore[arg-type]
        self.overwrite = False


def log_to_tensorboard(folder: Path, content: dict[str, Any]) -> None:
    """Writes the results of a checkpoint as TensorBoard scalars against length; OSError."""
    from tensorboardX import SummaryWriter

    names = window_names([(result["length"], result["stride"]) for result in content["results"]])
    with locked(folder, WAIT), naming(folder):
        earlier = list(folder.glob("events.out.tfevents.*"))  # of the same evaluation, with some of these results
        # tensorboardX names a file by the second and the host, so two writers need a suffix.
        with SummaryWriter(str(folder), filename_suffix=f".{time.time_ns()}") as writer:
            writer.add_text("what made these numbers", f"```json\n{json.dumps(content, indent=2)}\n```")
            for result in sorted(content["results"], key=lambda result: result["length"]):
                curve = names[result["length"], result["stride"]].replace("/", "-")  # "/" begins a group of its own
                for measure in ("loss", "perplexity", "tokens_per_second"):
                    writer.add_scalar(f"{content['subset']}/{measure}/{curve}", result[measure], result["length"])
        for path in earlier:
            path.unlink()
