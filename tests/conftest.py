"""A tiny corpus in fairseq's format, and models built the way fairseq-train builds them."""

import copy
import functools
import gc
import hashlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from filelock import FileLock
from forked import SCRIPTS, run_forked

from fairseq_alibi.core import position_methods

# One thread each, here and in spawned commands: tiny models are ten times slower when threads fight for a core.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# The code of exported models that transformers copies: no trace in the user's cache, nor of another process of pytest.
MODULES = tempfile.TemporaryDirectory()
os.environ["HF_MODULES_CACHE"] = MODULES.name

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
#: The console scripts that `run` starts in a forked process.
FORKED = {str(BIN / name) for name in SCRIPTS}
#: The tests that take minutes.
LONGEST = ("test_walkthrough_runs_as_written", "test_the_oldest_transformers")


@pytest.hookimpl(trylast=True)  # after tests are deselected
def pytest_collection_modifyitems(items):
    """Lets each process begin with its share of the slow tests: one begun last would run alone at the end.

    A process of pytest-xdist with `--dist worksteal` gets a run of consecutive tests.
    """
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    slow = [item for item in items if item.get_closest_marker("slow")]
    slow.sort(key=lambda item: item.name not in LONGEST)
    others = [item for item in items if not item.get_closest_marker("slow")]
    bounds = [len(others) * number // processes for number in range(processes + 1)]
    items[:] = []
    for number in range(processes):
        items += slow[number::processes] + others[bounds[number] : bounds[number + 1]]


def pytest_collection_finish():
    """Spares the garbage collector what was imported for all tests, or it looks through all of it time and again."""
    gc.collect()
    gc.freeze()


def run(*command, cwd=ROOT, check=True, new_process=False, **environment):
    """Runs a command; returns its `returncode`, and its stdout and stderr together as `output`.

    A console script of fairseq or of this project starts from a process that has imported fairseq (see `forked`),
    unless `new_process` is set or environment variables are given.
    """
    command = [str(part) for part in command]
    if command[0] in FORKED and not (new_process or environment):
        with tempfile.NamedTemporaryFile("r", suffix=".output") as file:
            status = run_forked(command, file.name, str(cwd))
            done = types.SimpleNamespace(args=command, returncode=status, output=file.read())
    else:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        done.output = done.stdout
    assert not check or done.returncode == 0, done.output
    return done


def fairseqs_own(corpus, checkpoint, *arguments):
    """Loss and tokens that fairseq-eval-lm prints; in this process, as a new one takes seconds to start."""
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf
    from fairseq_cli import eval_lm

    command = [corpus, "--user-dir", "fairseq_alibi", "--path", checkpoint, "--gen-subset", "valid", "--cpu"]
    command = [str(part) for part in (*command, *arguments)]
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_eval_lm_parser(), command))
    with mock.patch.object(eval_lm.logger, "info") as info:
        eval_lm.main(cfg)
    output = " ".join(str(call.args[0]) for call in info.call_args_list)
    loss = float(output.split("Loss (base 2): ")[1].split(",")[0])
    return loss, int(output.split("Evaluated ")[1].split(" tokens")[0].replace(",", ""))


@functools.cache
def parsed_options(*arguments):
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    import fairseq_alibi  # noqa: F401

    return convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), list(arguments)))


def training_config(*arguments):
    """The fairseq config of fairseq-train's options, a new copy: making one takes longer than building a tiny model."""
    return copy.deepcopy(parsed_options(*map(str, arguments)))


def failure(capsys, call, *arguments, status=None):
    """Runs a command in this process, which has to fail with one line, and with this status; returns the line."""
    with pytest.raises(SystemExit) as stopped:
        call([str(part) for part in arguments])
    assert stopped.value.code not in (0, None)
    assert status in (None, 1 if isinstance(stopped.value.code, str) else stopped.value.code)
    message = str(stopped.value.code)
    if stopped.value.code == 2:  # argparse prints its line itself
        message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "\n" not in message
    return message


def random_tokens(model, *shape):
    """Tokens that are words, as a tensor of this shape."""
    return torch.randint(4, len(model.decoder.dictionary), shape)


@pytest.fixture(autouse=True)
def sigterm():
    """Training in this process takes SIGTERM for a wish to save and end; after a test it ends pytest again."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(params=position_methods())
def method(request):
    """Every position method."""
    return request.param


@pytest.fixture(scope="session")
def make_once(tmp_path_factory):
    """`make_once(name, fill)` fills a folder with `fill(folder)`, once for all processes of pytest-xdist."""
    common = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        common = common.parent

    def make(name, fill):
        folder, done = common / name, common / f"{name}.done"
        with FileLock(common / f"{name}.lock"):
            if not done.exists():
                folder.mkdir()
                fill(folder)
                done.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def corpus(make_once):
    """A fairseq data folder: 40 words, lines of 0 to 12 words, 3,000 / 100 / 100 lines."""

    def fill(folder):
        rng = random.Random(1)
        words = [f"word{i}" for i in range(40)]
        for split, lines in (("train", 3000), ("valid", 100), ("test", 100)):
            text = (" ".join(rng.choices(words, k=rng.randrange(13))) for _ in range(lines))
            (folder / f"{split}.txt").write_text("\n".join(text) + "\n")
        run(
            BIN / "fairseq-preprocess",
            *("--only-source", "--destdir", folder / "data"),
            *(part for split in ("train", "valid", "test") for part in (f"--{split}pref", folder / f"{split}.txt")),
        )

    return make_once("corpus", fill) / "data"


@pytest.fixture(scope="session")
def build(corpus):
    """Builds a model from fairseq-train's options: `build("alibi_lm_tiny", "--position-method", "none")`."""
    from fairseq import tasks

    def build_model(arch, *arguments, seed=1, task="language_modeling"):
        language_model = task == "language_modeling"
        if language_model and "learned" in arguments and "--max-target-positions" not in arguments:
            arguments = (*arguments, "--max-target-positions", 4096)
        cfg = training_config(corpus, "--task", task, "--arch", arch, *arguments)
        torch.manual_seed(seed)
        model = tasks.setup_task(cfg.task).build_model(cfg.model).eval()
        for name, parameter in model.named_parameters():
            if "position_method" in name:
                torch.nn.init.normal_(parameter)  # they may start from 0, which would tell nothing
            if name.endswith("score_scale"):
                torch.nn.init.uniform_(parameter, 0.1, 0.5)
            if name.endswith("gate.weight"):
                torch.nn.init.normal_(parameter, std=0.1)
        model.built_from = cfg
        return model

    return build_model


@pytest.fixture(scope="session")
def train(corpus, make_once, tmp_path_factory):
    """Trains for a few updates with fairseq-train, once for the same options; returns the path of a copy."""

    def train_model(*arguments, arch="alibi_lm_tiny", updates=5):
        options = ["--arch", arch, "--max-update", updates, "--tokens-per-sample", 32, "--max-tokens", 256]
        options += ["--optimizer", "adam", "--lr", 0.003, "--no-epoch-checkpoints", "--cpu", *arguments]

        def fill(folder):
            common = ("--user-dir", "fairseq_alibi", "--task", "language_modeling", "--save-dir", folder)
            run(BIN / "fairseq-train", corpus, *common, *options)

        key = hashlib.sha256(repr([str(option) for option in options]).encode()).hexdigest()[:16]
        trained = make_once(f"trained-{key}", fill)
        return Path(shutil.copy(trained / "checkpoint_last.pt", tmp_path_factory.mktemp("checkpoints")))

    return train_model


@pytest.fixture(scope="session")
def sharpened(train):
    """Trains as `train`, a model whose scores depend strongly on the context, which few updates do not bring about."""

    def train_sharp(*arguments, **options):
        path = train(*arguments, updates=20, **options)
        state = torch.load(path)
        for name, value in state["model"].items():
            if "self_attn" in name:
                value *= 8
        torch.save(state, path)
        return path

    return train_sharp


@pytest.fixture(scope="session")
def checkpoint(sharpened):
    """A trained ALiBi model, see `sharpened`."""
    return sharpened()


@pytest.fixture(scope="session")
def given(corpus, checkpoint, tmp_path_factory):
    """A folder of files good and bad, see bad_input.py; whoever uses it leaves it as it was."""
    from bad_input import make_files

    folder = tmp_path_factory.mktemp("given")
    make_files(folder, corpus, checkpoint)
    return folder


@pytest.fixture
def inside_given(given, monkeypatch):
    """Runs a test in that folder, without a prompt on standard input, without waiting for the network."""
    from fairseq_alibi.data import download

    monkeypatch.chdir(given)
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
