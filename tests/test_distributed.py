"""Several processes give what one gives, and when one dies the others end; on this machine's CPU.

torchrun starts the processes of the training script. Those of other commands are forked, with the environment variables
that torchrun sets: torchrun and each of its processes import torch and fairseq, which takes ten seconds.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import numpy
import pytest
import torch
from conftest import BIN, ROOT, failure, run, training_config
from forked import start_forked
from torch.distributed import distributed_c10d

from fairseq_alibi.__main__ import main
from fairseq_alibi.evaluation import processes
from fairseq_alibi.evaluation.scoring import score_masked, score_windows
from fairseq_alibi.patches.option_checks import call_main

#: Seconds after which a run is ended: on a busy machine the slowest takes a tenth of it.
LIMIT = 600

#: A small model and small batches for the training script. Without dropout, the one thing in which processes differ.
SMALL = (
    *("--decoder-layers", 1, *(f"--decoder-{part}-dim=32" for part in ("embed", "input", "output", "ffn-embed"))),
    *("--adaptive-input-cutoff", "10,20", "--adaptive-softmax-cutoff", "10,20", "--max-tokens", 512),
    *(f"--{part}=0" for part in ("dropout", "attention-dropout", "activation-dropout", "adaptive-softmax-dropout")),
    *("--warmup-updates", 10, "--disable-validation", "--log-format", "json", "--log-interval", 1, "--cpu"),
)
UPDATES = 5

#: What two evaluations do not have in common.
TIMES = ("seconds", "tokens_per_second", "finished", "run")


class Running:
    """A command that runs, its output in a file; it ends with the context at the latest."""

    def __init__(self, log, *command, **environment):
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                cwd=ROOT,
                env={**os.environ, "VENV": "none", **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()  # torchrun ends its processes, then itself
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    @property
    def output(self):
        return self.log.read_text()

    def ended(self):
        """Waits for its end; returns its status."""
        return self.process.wait(LIMIT)

    def trained(self, updates):
        """Waits until so many updates are logged; returns their loss, norm of gradients and tokens."""
        end = time.monotonic() + LIMIT
        while len(found := updates_in(self.output)) < updates:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.1)
        return found[:updates]


def updates_in(output):
    lines = [line[line.index("{") :] for line in output.splitlines() if "train_inner" in line and line.endswith("}")]
    return [(one["loss"], one["gnorm"], one["wpb"]) for one in map(json.loads, lines)]


def training(tmp_path, name, corpus, *arguments, **environment):
    """The training script, running."""
    script = ROOT / "scripts" / "train_wikitext103.sh"
    path = environment.pop("PATH", f"{BIN}:{os.environ['PATH']}")
    command = ("bash", script, corpus, tmp_path / name, 64, *SMALL, *arguments)
    return Running(tmp_path / f"{name}.log", *command, PATH=path, **environment)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The updates of one process with twice the update frequency."""
    folder = tmp_path_factory.mktemp("alone")
    with training(folder, "one", corpus, "--update-freq", 2, "--max-update", UPDATES, "--no-save") as one:
        assert one.ended() == 0, one.output
    return updates_in(one.output)


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_update_frequency(corpus, alone, tmp_path):
    with training(tmp_path, "two", corpus, "--max-update", UPDATES, NPROC="2") as two:
        assert two.ended() == 0, two.output
    assert updates_in(two.output) == alone
    assert "training on 2 devices" in two.output
    assert len(alone) == UPDATES
    assert len({loss for loss, _, _ in alone}) == UPDATES, "it learns"
    assert (
        torch.load(tmp_path / "two" / "checkpoint_last.pt")["cfg"]["distributed_training"]["ddp_backend"]
        == "legacy_ddp"
    )


@pytest.mark.slow
def test_two_machines_train_as_one_process_and_a_worker_that_dies_ends_both(corpus, alone, tmp_path):
    """Two torchruns that know of each other by address and port alone; the second one's worker is killed."""
    nodes = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    stand_in = tmp_path / "bin" / "fairseq-train"  # notes which process a worker is
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/bash\necho $$ > {tmp_path}/pid-$RANK\nexec {BIN}/fairseq-train "$@"\n')
    stand_in.chmod(0o755)
    nodes["PATH"] = f"{stand_in.parent}:{BIN}:{os.environ['PATH']}"
    with contextlib.ExitStack() as running:
        first, second = (
            running.enter_context(training(tmp_path, f"node{rank}", corpus, "--no-save", NODE_RANK=str(rank), **nodes))
            for rank in range(2)
        )
        assert first.trained(UPDATES) == alone
        os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
        assert second.ended() == 1
        assert first.ended() == 1
    assert "SIGKILL" in second.output
    assert "RuntimeError" in first.output, "what the other worker then met, with its traceback"
    assert updates_in(second.output) == [], "the first process alone reports"


def test_script_keeps_the_tokens_of_an_update_or_says_that_it_cannot(tmp_path):
    (tmp_path / "dict.txt").write_text("")
    for name in ("fairseq-train", "fairseq-alibi", "torchrun"):
        (tmp_path / name).write_text('#!/bin/bash\nprintf "%q " "${0##*/}" "$@"\n')
        (tmp_path / name).chmod(0o755)
    (tmp_path / "python").write_text(f'#!/bin/bash\n[ "$1" = -c ] || exec {sys.executable} "$@"\necho ${{GPUS:-8}}\n')
    (tmp_path / "python").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"

    def script(length, check=True, **environment):
        command = ("bash", ROOT / "scripts" / "train_wikitext103.sh", tmp_path, "save", length)
        return run(*command, check=check, PATH=path, VENV="none", **environment).output

    def option(output, name):
        words = shlex.split(output.splitlines()[-1])
        return words[words.index(name) + 1]

    def batch(output):
        return int(option(output, "--max-tokens")), int(option(output, "--update-freq"))

    assert script(512).startswith("fairseq-train"), "one process is started as ever"
    assert batch(script(512)) == batch(script(512, NPROC="1")) == (9216, 1)
    assert batch(script(512, NPROC="2")) == (4608, 1)
    assert batch(script(3072, NPROC="3")) == (3072, 1)
    nodes = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host"}
    output = script(64, NPROC="8", **nodes)
    assert batch(output) == (576, 1)
    launch = (
        "--nnodes 2 --node-rank 1 --master-addr host --master-port 29500 --nproc-per-node 8 --no-python fairseq-train"
    )
    assert output.startswith(f"torchrun {launch}")
    assert "--fp16" in output
    restarting = script(64, NPROC="8", MAX_RESTARTS="3", **nodes)
    meeting = "--rdzv-backend c10d --rdzv-id fairseq --rdzv-endpoint host:29500 --max-restarts 3 --nproc-per-node 8"
    assert restarting.startswith(f"torchrun --nnodes 2 {meeting} --no-python fairseq-train")
    output = script(3072, NPROC="2")
    assert batch(output) == (3072, 2)
    assert "an update takes 4 blocks, 12288 tokens instead of 9216" in output.splitlines()[0]
    assert option(script(512, NPROC="64", GPUS="0"), "--distributed-backend") == "gloo"
    for wrong, named in (
        ({"NPROC": "0"}, "NPROC=0"),
        ({"NPROC": "two"}, "NPROC=two"),
        ({"NPROC": "9"}, "8 GPUs"),
        ({"NNODES": "-1"}, "NNODES=-1"),
        ({**nodes, "NODE_RANK": "2"}, "0 to 1"),
        ({**nodes, "NODE_RANK": ""}, "NODE_RANK="),
        ({**nodes, "MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"NPROC": "2", "MAX_RESTARTS": "-1"}, "MAX_RESTARTS=-1"),
        ({"MAX_RESTARTS": "1"}, "MAX_RESTARTS=1 needs several processes"),
        ({**nodes, "MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
    ):
        (line,) = script(512, check=False, **wrong).splitlines()
        assert line.startswith("train_wikitext103: ")
        assert named in line


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def in_two_processes(folder, *command, second_cwd=ROOT):
    """Runs a console script in two processes, the second one from another folder: their statuses and their output."""
    command, output = [str(part) for part in command], str(folder / "output")
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    group["TORCHELASTIC_RUN_ID"] = "tests"
    running = [
        start_forked(command, output, str(cwd), RANK=rank, LOCAL_RANK=rank, **group)
        for rank, cwd in (("0", ROOT), ("1", second_cwd))
    ]
    for process in running:
        process.join(LIMIT)
        process.kill()  # without effect on one that has ended
    return [process.exitcode for process in running], (folder / "output").read_text()


def test_two_processes_evaluate_as_one(corpus, checkpoint, tmp_path):
    options = [corpus, checkpoint, "--lengths", "16,300", "--stride-fraction", "1/4", "--max-tokens", 600]
    options = [str(part) for part in (*options, "--by-position", "--cpu", "--save-token-losses")]
    main(["evaluate", *options, str(tmp_path / "1.npz"), "--output", str(tmp_path / "one")])
    command = (BIN / "fairseq-alibi", "evaluate", *options, tmp_path / "2.npz", "--output", tmp_path / "two")
    statuses, output = in_two_processes(tmp_path, *command)
    assert statuses == [0, 0], output
    assert sum("perplexity" in line for line in output.splitlines()) == 3, "two results and the table, each once"

    def content(folder):
        (path,) = (tmp_path / folder).glob("*.json")
        content = json.loads(path.read_text())
        (processes,) = {run["processes"] for run in content["runs"].values()}
        timeless = [{k: v for k, v in one.items() if k not in TIMES} for one in content["results"]]
        return processes, (timeless, content["subject"], content["model"])

    assert (content("one")[0], content("two")[0]) == (1, 2)
    assert content("one")[1] == content("two")[1]
    one, two = (dict(numpy.load(tmp_path / f"{number}.npz")) for number in (1, 2))
    assert one.keys() == two.keys()
    assert all(numpy.array_equal(one[name], two[name]) for name in one if name != "runs")


@pytest.mark.parametrize("task", ["language_modeling", "masked_lm"])
def test_each_process_scores_its_share_only(build, task):
    masked = task == "masked_lm"
    model = build("alibi_masked_lm_tiny" if masked else "alibi_lm_tiny", task=task)
    stream = torch.randint(4, 40, (700,))
    score = partial(score_masked, model, stream, 32, 64) if masked else partial(score_windows, model, stream, 32, 8, 64)

    def scored(*share):
        return [(first, losses.tolist()) for first, losses in score(*share)]

    shares = [scored((number, 3)) for number in range(3)]
    assert sorted(found for share in shares for found in share) == scored()
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_what_fails_in_one_process_fails_in_all_with_one_line(corpus, checkpoint, tmp_path):
    """The second process does not find the data, as on a machine that they were not copied to."""
    (tmp_path / "second").mkdir()
    options = ("evaluate", os.path.relpath(corpus, ROOT), checkpoint, "--cpu", "--output", tmp_path)
    statuses, output = in_two_processes(tmp_path, BIN / "fairseq-alibi", *options, second_cwd=tmp_path / "second")
    assert statuses == [1, 1]
    (line,) = output.splitlines()
    assert line.startswith(
        f"fairseq-alibi evaluate: process 1: there is no {options[1]}/dict.txt: name the data folder"
    )
    assert not list(tmp_path.glob("*.json"))


def test_stream_is_refused_in_several_processes(monkeypatch, capsys, corpus, checkpoint):
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert "--streaming" in failure(capsys, main, "evaluate", corpus, checkpoint, "--streaming", "--cpu")


def test_another_checkpoint_on_another_machine_is_refused(monkeypatch, capsys, corpus, checkpoint, tmp_path):
    gather = processes.gather
    others = {"weights": "of another update"}
    monkeypatch.setattr(processes, "gather", lambda v: [v, {**v, **others}] if isinstance(v, dict) else gather(v))
    options = ("evaluate", corpus, checkpoint, "--cpu", "--output", tmp_path)
    assert "not the same on all machines" in failure(capsys, main, *options)
    others.clear()
    main([str(part) for part in (*options, "--lengths", 64)])


@pytest.mark.parametrize(("option", "seconds"), [([], 600), (["--heartbeat-timeout", 20], 20)])
def test_a_group_waits_ten_minutes_or_as_long_as_the_option_says(monkeypatch, option, seconds):
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, None)  # and restored
    cfg = training_config("data", "--arch", "alibi_lm_tiny", "--task", "language_modeling", "--cpu", *option)
    limits = []
    call_main(cfg, lambda _: limits.extend(map(distributed_c10d._get_default_timeout, ("gloo", "nccl"))))
    assert [limit.total_seconds() for limit in limits] == [seconds, seconds]


def test_fairseq_eval_lm_refuses_to_report_a_share(corpus, checkpoint, tmp_path):
    command = (BIN / "fairseq-eval-lm", corpus, "--user-dir", "fairseq_alibi", "--path", checkpoint, "--cpu")
    command += ("--gen-subset", "valid", "--tokens-per-sample", 64, "--distributed-backend", "gloo")
    statuses, output = in_two_processes(tmp_path, *command)
    assert 0 not in statuses
    assert "use fairseq-alibi evaluate under torchrun" in output
    assert "Perplexity" not in output


@pytest.mark.parametrize("option", ["--num-shards", "--num-workers"])
def test_fairseq_eval_lm_refuses_windows_with_the_wrong_context(build, corpus, option):
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    def config(*arguments):
        arguments = [str(corpus), "--path", "x", "--tokens-per-sample", "64", *arguments]
        return convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_eval_lm_parser(), arguments))

    model = build("alibi_lm_tiny")
    model.prepare_for_inference_(config(option, "2"))
    model.prepare_for_inference_(config("--context-window", "32"))
    with pytest.raises(ValueError, match=f"{option} 2 with --context-window"):
        model.prepare_for_inference_(config(option, "2", "--context-window", "32"))
