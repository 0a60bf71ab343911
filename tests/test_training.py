"""Training runs that are killed, stopped or find a broken checkpoint end as if nothing had happened.

The runs are forked from a process that has imported everything, so that a restart costs a second and not six.
"""

import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import ListDataset
from fairseq.data.iterators import EpochBatchIterator
from fairseq.dataclass.configs import CheckpointConfig, FairseqConfig
from forked import CONTEXT
from omegaconf import OmegaConf

from fairseq_alibi.patches import restart, training_state

#: Epochs have 82 updates, which neither the log interval nor the save interval divides.
OPTIONS = ["--task=language_modeling", "--arch=alibi_lm_tiny", "--tokens-per-sample=32", "--max-tokens=256"]
OPTIONS += ["--optimizer=adam", "--lr=0.003", "--lr-scheduler=inverse_sqrt", "--warmup-updates=20", "--dropout=0.1"]
OPTIONS += ["--cpu", "--no-epoch-checkpoints", "--save-interval-updates=5", "--keep-interval-updates=2"]
OPTIONS += ["--max-valid-steps=2", "--log-format=json", "--log-interval=4", "--user-dir=fairseq_alibi"]
OPTIONS += ["--max-update=118"]


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_copying(source, target):
    """In the place of `shutil.copyfile`."""
    with open(source, "rb") as whole, open(target, "wb") as half:
        half.write(whole.read(os.path.getsize(source) // 2))
    die()


def die_while_saving(state, file, save=torch.save):
    """In the place of `torch.save`."""
    whole = io.BytesIO()
    save(state, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    die()


def train(arguments, output, after=None, do=None, delay=0.0, environment=()):
    """fairseq-train in a process group of its own; in the update of that number something is done."""
    os.environ.update(environment)
    os.setpgrp()
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as ever for the data loader's workers
    import fairseq_cli.train
    from fairseq.trainer import Trainer

    actions = {
        "die": lambda: threading.Timer(delay, die).start(),
        "die while copying": lambda: setattr(shutil, "copyfile", die_while_copying),
        "die while saving": lambda: setattr(torch, "save", die_while_saving),
        # As torchrun does: to the data loader's workers too, and not from their parent, whom they obey.
        "fill the disk": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, resource.RLIM_INFINITY)),
        "stop": lambda: subprocess.run(["kill", "-TERM", "--", f"-{os.getpgrp()}"]),
    }
    step, done = Trainer.train_step, []

    def counted(*args, **options):
        done.append(None)
        if len(done) == after:
            actions[do]()
        return step(*args, **options)

    Trainer.train_step = counted
    sys.argv = ["fairseq-train", *arguments]
    fairseq_cli.train.cli_main()


@pytest.fixture(scope="module")
def launch(corpus):
    """Starts a training run in a folder, see `train`; returns its process."""

    def run(folder, *more, **event):
        folder.mkdir(exist_ok=True)
        arguments = [str(corpus), *OPTIONS, f"--save-dir={folder}", f"--log-file={folder}/log", *more]
        process = CONTEXT.Process(target=train, args=(arguments, folder / "output"), kwargs=event)
        process.start()
        return process

    return run


@pytest.fixture(scope="module")
def start(launch):
    """Runs training in a folder; returns its exit status and its new output."""

    def run(folder, *more, **event):
        output = folder / "output"
        before = output.stat().st_size if output.exists() else 0
        process = launch(folder, *more, **event)
        process.join()
        return process.exitcode, output.read_text()[before:]

    return run


@pytest.fixture(scope="module")
def start_two(launch):
    """Runs training in two processes; returns their exit statuses and new output. SIGTERM comes to the second one."""

    def run(folder, *more, **event):
        output = folder / "output"
        before = output.stat().st_size if output.exists() else 0
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        more = ("--distributed-backend=gloo", "--ddp-backend=legacy_ddp", *more)
        first = launch(folder, *more, environment={**address, "RANK": "0"})
        second = launch(folder, *more, environment={**address, "RANK": "1"}, **event)
        for process in (first, second):
            process.join(timeout=300)  # else they wait for each other
            process.kill()
        return first.exitcode, second.exitcode, output.read_text()[before:]

    return run


def losses(folder):
    """What was logged last for each update: loss and gradient norm of training, loss and best loss of validation."""
    found = {}
    for line in (folder / "log").read_text().splitlines():
        if line.startswith('{"'):
            entry = json.loads(line)
            for prefix in ("", "valid_"):
                if f"{prefix}num_updates" in entry:
                    names = ("loss", "gnorm", "best_loss")
                    found[prefix, int(entry[f"{prefix}num_updates"])] = [entry.get(prefix + name) for name in names]
    return found


def state(folder, name="checkpoint_last.pt"):
    return torch.load(folder / name)


def assert_same(folder, other):
    """Parameters, Adam's averages and everything logged agree to the last bit."""
    ours, theirs = state(folder), state(other)
    for name, value in theirs["model"].items():
        assert "_float_tensor" in name or torch.equal(ours["model"][name], value), name
    adam = (ours["last_optimizer_state"]["state"], theirs["last_optimizer_state"]["state"])
    torch.testing.assert_close(*adam, rtol=0, atol=0)
    assert ours["optimizer_history"][-1] == theirs["optimizer_history"][-1]
    assert losses(folder) == losses(other)


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    status, output = start(folder)
    assert status == 0, output
    assert len(losses(folder)) > 50
    return folder


@pytest.mark.parametrize("deaths", [(1, 1, 1), pytest.param((12, 4, 4), marks=pytest.mark.slow)])
def test_a_killed_run_ends_like_one_never_killed(start, uninterrupted, tmp_path, deaths):
    """Killed at any moment, while a file is copied, and while one is saved, so many times each."""
    rng = random.Random(1)
    kinds = ("die", "die while copying", "die while saving")
    ways = [kind for kind, number in zip(kinds, deaths) for _ in range(number)]
    rng.shuffle(ways)
    for way in ways:
        status, output = start(tmp_path, after=rng.randint(6, 10), do=way, delay=rng.uniform(0, 0.03))
        assert status == -signal.SIGKILL, output
        assert way == "die" or list(tmp_path.glob("*.pt.*.tmp")), "killed in the midst of a file"
    status, output = start(tmp_path)
    assert status == 0, output
    assert_same(tmp_path, uninterrupted)
    assert not list(tmp_path.glob("*.tmp")), "what the killed ones left"
    assert "is broken" not in (tmp_path / "output").read_text(), "no name ever stood for half a file"


#: Epochs of 11 updates, shuffled from the second on. The learning rate shrinks after 2 epochs without progress of half
#: the loss; after 4 validations without progress the run ends.
COUNTERS = ["--lr-scheduler=reduce_lr_on_plateau", "--lr-patience=1", "--lr-threshold=0.5", "--warmup-updates=0"]
COUNTERS += ["--max-tokens=2048", "--patience=4", "--lr=0.03", "--max-update=400", "--save-interval-updates=7"]
COUNTERS += ["--validate-interval-updates=7", "--store-ema", "--ema-update-freq=3", "--optimizer=nag", "--curriculum=1"]


@pytest.mark.slow
def test_counters_that_fairseq_forgets_are_kept(start, tmp_path):
    """Those of --patience, of the plateau of the learning rate and of the moving average of the parameters."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, output = start(whole, *COUNTERS)
    assert status == 0, output
    assert "early stop since valid performance hasn't improved for last 4 runs" in output
    for after in (25, 16):
        status, output = start(killed, *COUNTERS, after=after, do="die")
        assert status == -signal.SIGKILL, output
    status, output = start(killed, *COUNTERS)
    assert status == 0, output
    ours, theirs = state(killed), state(whole)
    assert ours["optimizer_history"][-1] == theirs["optimizer_history"][-1]
    assert ours["last_optimizer_state"]["param_groups"] == theirs["last_optimizer_state"]["param_groups"]
    assert theirs["last_optimizer_state"]["param_groups"][0]["lr"] < 0.03
    for tensors, expected in (
        (ours["model"], theirs["model"]),
        (ours["extra_state"]["ema"], theirs["extra_state"]["ema"]),
    ):
        for name, value in expected.items():
            assert "_float_tensor" in name or torch.equal(tensors[name], value), name
    assert ours["extra_state"]["fairseq_alibi"] == theirs["extra_state"]["fairseq_alibi"]
    status, output = start(killed, *COUNTERS)
    assert status == 0, output
    assert "nothing to do: the last 4 validations brought no better loss, --patience is 4" in output
    assert state(killed)["optimizer_history"] == ours["optimizer_history"], "no further update"


def test_a_resumed_epoch_ends_where_it_would_have_ended():
    dataset = ListDataset(range(20))

    def read(offset):
        epoch = EpochBatchIterator(dataset, list, [[n] for n in range(20)], skip_remainder_batch=True, buffer_size=2)
        epoch.load_state_dict({"version": 2, "epoch": 1, "iterations_in_epoch": offset})
        return list(epoch.next_epoch_itr())

    assert read(7) == read(0)[7:]
    assert len(read(0)) == 19


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_what_was_saved(start, uninterrupted, tmp_path):
    """A limit of the system on the size of files stands in for it. With room again the run resumes."""
    status, output = start(tmp_path, "--max-update=118", after=8, do="fill the disk")
    assert status == 1, output
    line = output.splitlines()[-1]
    assert line.startswith(
        f"{tmp_path}/checkpoint_1_10.pt cannot be written (File too large); earlier checkpoints are kept"
    )
    assert line.endswith(f": make room in {tmp_path} and start the same command again")
    assert "Traceback" not in output
    assert not list(tmp_path.glob("*.tmp"))
    assert state(tmp_path)["optimizer_history"][-1]["num_updates"] == 5
    status, output = start(tmp_path)
    assert status == 0, output
    assert_same(tmp_path, uninterrupted)


def test_counters_of_loss_scaler_and_moving_average_are_kept():
    """Without a GPU no run has a loss scaler, so objects with the same attributes stand in."""
    import fairseq_cli.train  # noqa: F401

    def run(number):
        scaler = SimpleNamespace(**dict.fromkeys(training_state.SCALER_COUNTERS, number), loss_scale=2.0)
        cfg = OmegaConf.structured(FairseqConfig)
        cfg.ema.store_ema = True
        optimizer, ema = SimpleNamespace(scaler=scaler), SimpleNamespace(update_freq_counter=number, decay=0.5)
        return SimpleNamespace(cfg=cfg, optimizer=optimizer, ema=ema, lr_scheduler=None)

    saved, restarted, reset = run(3), run(0), run(0)
    state = training_state.collect_state(saved)
    training_state.restore_state(restarted, state)
    assert vars(restarted.optimizer.scaler) == vars(saved.optimizer.scaler)
    assert restarted.ema == saved.ema
    reset.cfg.checkpoint.reset_optimizer = True
    training_state.restore_state(reset, state)
    assert (reset.ema.update_freq_counter, reset.optimizer.scaler._iter) == (0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "the checkpoint has 118 updates, --max-update is 118"),
        (("--max-update", "200", "--stop-time-hours", "1e-9"), "hours, --stop-time-hours is 1e-09"),
    ],
)
def test_a_finished_run_makes_no_further_update(start, uninterrupted, tmp_path, options, message):
    """As one has to be that was killed after its last checkpoint."""
    copy = shutil.copytree(uninterrupted, tmp_path / "copy")
    status, output = start(copy, *options)
    assert status == 0, output
    assert re.search(f"nothing to do: .*{message}", output)
    assert_same(copy, uninterrupted)


def truncate(path):
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip_a_bit(path):
    """In the weights, where torch's loader does not look."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


BREAK = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"garbage" * 1000),
    "flipped bit": flip_a_bit,
    "missing": lambda path: path.unlink(),
}


@pytest.fixture
def folder(uninterrupted, tmp_path):
    """A finished run: checkpoint_last.pt has 118 updates, checkpoint_best.pt some, checkpoint_2_115.pt the most."""
    return shutil.copytree(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("how", BREAK)
def test_the_newest_good_checkpoint_takes_the_place_of_a_broken_one(folder, how, caplog):
    last = folder / "checkpoint_last.pt"
    BREAK[how](last)
    broken = last.read_bytes() if last.exists() else None
    good = (folder / "checkpoint_2_110.pt").read_bytes()
    flip_a_bit(folder / "checkpoint_2_115.pt")
    older = state(folder, "checkpoint_best.pt")
    older["optimizer_history"][-1]["num_updates"] = 90
    torch.save(older, folder / "checkpoint_best.pt")  # newer by its date
    (folder / "checkpoint_2_120.pt.tmp").touch()
    (folder / "checkpoint_2_120.pt.1234.tmp").touch()
    restart.restore_last_checkpoint(CheckpointConfig(save_dir=str(folder)))
    assert last.read_bytes() == good
    assert not list(folder.glob("*.tmp"))
    (record,) = caplog.records
    line = record.getMessage()
    assert record.levelname == "WARNING"
    assert f"{last} is " in line
    assert "training resumes from checkpoint_2_110.pt, 110 updates" in line
    aside = [path for path in folder.iterdir() if ".broken-" in path.name]
    assert [path.read_bytes() for path in aside] == ([] if broken is None else [broken]), "kept"
    assert all(path.name in line for path in aside)


def test_a_good_checkpoint_is_left_alone(folder, caplog):
    old = folder / "checkpoint_last.pt"
    torch.save(torch.load(old), old, _use_new_zipfile_serialization=False)
    for path in (old, folder / "checkpoint_2_115.pt"):
        content = path.read_bytes()
        path.rename(old)
        restart.restore_last_checkpoint(CheckpointConfig(save_dir=str(folder)))
        assert old.read_bytes() == content
    other = old.rename(folder.parent / "other.pt")
    restart.restore_last_checkpoint(CheckpointConfig(save_dir=str(folder), finetune_from_model=str(other)))
    assert not old.exists(), "a run to be begun from another model"
    assert not caplog.records


def test_a_broken_checkpoint_is_passed_over_and_the_run_ends_the_same(start, uninterrupted, folder):
    truncate(folder / "checkpoint_last.pt")
    status, output = start(folder)
    assert status == 0, output
    assert len([line for line in output.splitlines() if "checkpoint_last.pt is broken" in line]) == 1
    assert "Loaded checkpoint" in output
    assert_same(folder, uninterrupted)


def test_without_a_good_checkpoint_nothing_is_begun_anew(start, folder):
    for path in folder.glob("*.pt"):
        truncate(path)
    before = {path: path.read_bytes() for path in folder.glob("*.pt*")}
    status, output = start(folder)
    assert status == 1
    assert output.splitlines()[-1].startswith(f"{folder}/checkpoint_last.pt is broken (")
    assert f") and no other checkpoint of {folder} can be resumed from ({folder}/" in output.splitlines()[-1]
    assert output.splitlines()[-1].endswith("): move it away to start anew")
    assert "Traceback" not in output
    assert {path: path.read_bytes() for path in folder.glob("*.pt*")} == before


def test_a_broken_file_that_the_user_named_is_refused(folder):
    named = folder / "checkpoint_2_115.pt"
    truncate(named)
    cfg = CheckpointConfig(save_dir=str(folder), restore_file=str(named))
    with pytest.raises(ValueError, match=r"^--restore-file .*checkpoint_2_115.pt is broken \(.*: name another"):
        restart.restore_last_checkpoint(cfg)


def test_sigterm_saves_and_ends_and_the_run_goes_on(start, uninterrupted, tmp_path):
    """Sent to the workers too; without a buffer between them and training, their end would be an error at once."""
    status, output = start(tmp_path, "--data-buffer-size=0", after=52, do="stop")
    assert status == 0, output
    assert len([line for line in output.splitlines() if "stopped by SIGTERM after 52 updates, saved" in line]) == 1
    assert "Traceback" not in output
    assert state(tmp_path)["optimizer_history"][-1]["num_updates"] == 52
    assert ("valid_", 50) in losses(tmp_path)
    assert ("valid_", 52) not in losses(tmp_path), "no validation that was not due"
    status, output = start(tmp_path, after=30, do="stop")
    assert status == 0, output
    assert "stopped by SIGTERM after 82 updates, saved" in output
    assert state(tmp_path)["extra_state"]["train_iterator"]["iterations_in_epoch"] == 0, "at the end of an epoch"
    status, output = start(tmp_path)
    assert status == 0, output
    assert_same(tmp_path, uninterrupted)


def test_sigterm_says_that_nothing_is_saved(start, tmp_path):
    status, output = start(tmp_path, "--no-save", after=3, do="stop")
    assert status == 0, output
    assert "stopped by SIGTERM after 3 updates, but not saved (--no-save)" in output


def test_a_checkpoint_that_is_refused_is_not_called_damaged_or_missing(folder):
    """Its whole file calls code, so it is named with the reason, and nothing is begun anew."""
    for path in folder.glob("*.pt"):
        torch.save({"cfg": Fraction(1)}, path)
    truncate(folder / "checkpoint_last.pt")
    with pytest.raises(ValueError, match=r"no other checkpoint .* can be resumed from \(.* is refused, as it could"):
        restart.restore_last_checkpoint(CheckpointConfig(save_dir=str(folder)))


@pytest.mark.parametrize(
    ("options", "note"),
    [
        (
            {"checkpoint.no_save_optimizer_state": True},
            "--no-save-optimizer-state: the state of the optimizer is",
        ),
        ({"common.fp16": True}, "--fp16: the float32 copies"),
        ({"common.fp16": True, "common.memory_efficient_fp16": True}, None),
        ({"optimization.use_bmuf": True}, "--use-bmuf: the block momentum"),
        ({"checkpoint.reset_optimizer": True}, "--reset-optimizer: the state of the optimizer is dropped"),
        ({}, None),
    ],
    ids=str,
)
def test_what_a_restart_loses_is_said(options, note):
    cfg = OmegaConf.structured(FairseqConfig)
    for name, value in options.items():
        OmegaConf.update(cfg, name, value)
    notes = training_state.inexact_options(cfg)
    assert len(notes) == (note is not None)
    assert all(f"a restart is not exact with {note}" in line for line in notes)


def test_a_restore_file_beside_an_own_checkpoint_is_said(folder):
    cfg = CheckpointConfig(save_dir=str(folder), restore_file=str(folder / "checkpoint_best.pt"))
    note = training_state.restart_from_elsewhere(cfg)
    assert f"to resume from {folder}/checkpoint_last.pt (118 updates) drop --restore-file" in note
    for name in ("checkpoint_last.pt", str(folder / "checkpoint_last.pt")):
        assert training_state.restart_from_elsewhere(CheckpointConfig(save_dir=str(folder), restore_file=name)) is None


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on_from_the_same_checkpoint(start_two, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    *statuses, output = start_two(whole, "--max-update=24")
    assert statuses == [0, 0], output
    *statuses, output = start_two(stopped, "--max-update=24", after=17, do="stop")
    assert statuses == [0, 0], output
    assert output.count("stopped by SIGTERM after 17 updates, saved") == 1
    truncate(stopped / "checkpoint_last.pt")
    *statuses, output = start_two(stopped, "--max-update=24")
    assert statuses == [0, 0], output
    assert output.count(", 15 updates; the broken file") == 1
    assert_same(stopped, whole)
    for path in stopped.glob("*.pt"):
        truncate(path)
    *statuses, output = start_two(stopped, "--max-update=24")
    assert statuses == [1, 1], output
    assert output.count("can be resumed from") == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fox", "cable", "fire", "alibi --alibi-learned-slopes"])
def test_learned_biases_train_in_two_processes_as_in_one(start, start_two, tmp_path, method):
    """An update of two processes is that of one which sums two batches."""
    options = ["--position-method", *method.split(), "--dropout=0", "--max-update=4", "--disable-validation"]
    *statuses, output = start_two(tmp_path / "two", *options)
    assert statuses == [0, 0], output
    status, output = start(tmp_path / "one", *options, "--update-freq=2")
    assert status == 0, output
    ours, theirs = (state(tmp_path / name)["model"] for name in ("two", "one"))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5, msg=name)
