"""The paper's comparison: trains every position method alike and evaluates all at many lengths.

All models of a training length and seed have the same order of the data and, where shapes agree, the same initial
weights. A step that is finished is recorded in its model's folder and not repeated.
"""

import json
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ..core import position_methods
from ..files.errors import one_line
from ..files.locks import locked
from ..files.results import describe_environment, now, write_json
from ..files.safe_reading import count_updates
from .presets import TEST_TIME, Preset

#: Steps of every model, in their order.
TRAINING, EVALUATION, SLIDING_WINDOW = "training", "evaluation", "sliding window"


class ComparedModel(NamedTuple):
    """One model of the comparison: its position method, training length in tokens, seed, and folder."""

    method: str
    length: int
    seed: int
    folder: Path

    @property
    def checkpoint(self) -> Path:
        """The checkpoint that is evaluated."""
        return self.folder / "checkpoint_last.pt"

    def result_folder(self, name: str) -> Path:
        """The folder of its results as `name`, which is its method or one of `TEST_TIME`."""
        return self.folder.parent / "results" / name.partition("+")[2]

    def result_file(self, name: str, subset: str) -> Path:
        """The results of its evaluation, see `result_folder`."""
        return self.result_folder(name) / f"{self.folder.name}_{self.checkpoint.stem}_{subset}.json"

    @property
    def training_log(self) -> Path:
        """The JSON log of fairseq-train."""
        return self.folder / "train.json.log"


@dataclass(frozen=True)
class Comparison:
    """Settings of a comparison."""

    name: str  # of the preset
    preset: Preset
    data: str
    subset: str  # that is evaluated
    updates: int
    methods: list[str]  # and names of `TEST_TIME`
    seeds: list[int]  # each trains every method once
    output: Path  # folder of models, results and page
    cpu: bool  # GPUs are left unused

    def models(self) -> list[ComparedModel]:
        """Returns all models, by training length, seed and method."""
        trained = dict.fromkeys(name.partition("+")[0] for name in self.methods)
        return [
            ComparedModel(method, n, seed, self.output / f"{method}-{n}{'' if seed == 1 else f'-seed{seed}'}")
            for n in self.preset.training_lengths
            for seed in dict.fromkeys(self.seeds)
            for method in trained
        ]

    def commands(self, model: ComparedModel) -> dict[str, list[str]]:
        """Returns the commands for a model by step, in their order."""
        train = self.preset.training_command(self.data, model.method, model.length, model.folder, self.updates)
        train += ["--seed", str(model.seed), "--log-format", "json", "--log-interval", "20"]
        commands = {TRAINING: [*train, "--log-file", str(model.training_log)]}
        for name in dict.fromkeys(self.methods):
            method, plus, _ = name.partition("+")
            if method == model.method:
                options = ["--model-overrides", str(TEST_TIME[name])] if plus else []
                options += ["--cpu"] if self.cpu or self.preset.parallel > 1 else []
                for step, command in self.evaluations(model, name).items():
                    commands[f"{step} {name}" if plus else step] = [*command, *options]
        return commands

    def evaluations(self, model: ComparedModel, name: str) -> dict[str, list[str]]:
        """Returns the commands that evaluate a model as `name`, by step; `commands` adds options that all have."""
        lengths = list(self.preset.evaluation_lengths)
        if position_methods()[model.method].limited_to_training_length:
            lengths = [length for length in lengths if length <= model.length]
        evaluate = ["fairseq-alibi", "evaluate", self.data, str(model.checkpoint)]
        evaluate += ["--lengths", ",".join(map(str, lengths)), "--subset", self.subset, "--by-position"]
        evaluate += ["--output", str(model.result_folder(name))]
        return {EVALUATION: evaluate, SLIDING_WINDOW: [*evaluate, *self.preset.sliding]}


class CommandRunner:
    """Runs commands side by side, each in one thread if `single_thread`, and can stop them all."""

    def __init__(self, single_thread: bool):
        self.environment = {**os.environ, **({"OMP_NUM_THREADS": "1"} if single_thread else {})}
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def run(self, command: list[str], log: Path) -> dict[str, float]:
        """Runs a command, writes its output to a log, and returns memory, times, and the load average at its end.

        ValueError: it failed; names the log and quotes its last line.
        """
        with log.open("w", encoding="utf-8") as output:
            with self.lock:
                if self.stopped:
                    raise KeyboardInterrupt
                started = time.monotonic()
                process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=self.environment)
                self.processes.add(process)
            _, status, usage = os.wait4(process.pid, 0)  # Popen.wait does not tell the memory of this process alone
            process.returncode = os.waitstatus_to_exitcode(status)
            self.processes.discard(process)
        if process.returncode:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
            raise ValueError(
                f"{shlex.join(command[:2])} ended with status {process.returncode}, see {log}: {lines[-1]}"
            )
        return {
            "peak_memory_bytes": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "wall_seconds": time.monotonic() - started,
            "load_average": os.getloadavg()[0],
        }

    def stop(self) -> None:
        """Ends the running commands and prevents new ones."""
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.terminate()


def read_record(path: Path) -> dict[str, Any]:
    """Reads a JSON file that an earlier run wrote; ValueError if it holds something else."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not ours ({one_line(error)}): name another --output, or remove it") from error


def finished_steps(model: ComparedModel) -> dict[str, Any]:
    """Returns what `run.json` in a model's folder says about every finished step."""
    path = model.folder / "run.json"
    return read_record(path) if path.exists() else {}


def run_steps(model: ComparedModel, comparison: Comparison, runner: CommandRunner, bar: tqdm) -> None:
    """Runs the steps of a model that are not finished; ValueError if one fails, or training was stopped early."""
    model.folder.mkdir(parents=True, exist_ok=True)
    finished = finished_steps(model)
    for step, command in comparison.commands(model).items():
        if step not in finished:
            bar.set_postfix_str(f"{model.folder.name}: {step}")
            if step == TRAINING:
                with locked(model.checkpoint):  # a training that outlived its killed reproduce writes this log
                    pass
            usage = runner.run(command, model.folder / f"{step.replace(' ', '-')}.log")
            # SIGTERM ends training with status 0.
            if step == TRAINING and (updates := count_updates(model.checkpoint)) < comparison.updates:
                raise ValueError(f"{model.folder}: training was stopped after {updates:,} updates; start this again")
            finished[step] = {
                "command": shlex.join(command),
                "finished": now(),
                **usage,
                "environment": describe_environment("cpu" if "--cpu" in command else "cuda"),
            }
            write_json(model.folder / "run.json", finished)
        bar.update()


def check_settings(comparison: Comparison) -> None:
    """Records the settings, or raises ValueError if those of an earlier run in the output folder differ."""
    settings = {
        "preset": comparison.name,
        "data": comparison.data,
        "subset": comparison.subset,
        "updates": comparison.updates,
        "training_lengths": list(comparison.preset.training_lengths),
        "evaluation_lengths": list(comparison.preset.evaluation_lengths),
        "cpu": comparison.cpu,
    }
    path = comparison.output / "settings.json"
    if not path.exists():
        write_json(path, {"settings": settings, "environment": describe_environment()})
        return
    before = {"cpu": comparison.cpu, **read_record(path).get("settings", {})}  # earlier releases did not record it
    differ = [name for name, value in settings.items() if before.get(name) != value]
    if differ:
        raise ValueError(
            f"{comparison.output} was begun with another {', '.join(differ)}: name another --output, or drop the option"
        )


def run_comparison(comparison: Comparison) -> None:
    """Runs all steps that are not finished, with a progress bar.

    ValueError: a step failed, or see `check_settings`. KeyboardInterrupt: it was interrupted; its commands were
    stopped.
    """
    check_settings(comparison)
    models, parallel = comparison.models(), comparison.preset.parallel
    runner = CommandRunner(single_thread=parallel > 1)
    steps = sum(len(comparison.commands(model)) for model in models)
    with tqdm(total=steps, desc="reproduce", unit="step") as bar, ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(run_steps, model, comparison, runner, bar) for model in models]
        try:
            for future in futures:
                future.result()
        except BaseException:
            runner.stop()
            raise
