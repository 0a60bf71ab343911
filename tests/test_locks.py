"""Two processes cannot write one output; the second says which process is the first, and a killed one blocks nobody."""

import os
import signal
import subprocess
import sys
from unittest import mock

import pytest
from conftest import training_config

from fairseq_alibi.files.locks import locked


def hold(path):
    """A process that holds the lock until it is killed."""
    code = f"""
import pathlib, time
from fairseq_alibi.files.locks import locked
with locked(pathlib.Path({str(path)!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.touch(), lambda path: path.mkdir()])
def test_the_second_process_is_refused_and_a_killed_one_blocks_nobody(tmp_path, make):
    path = tmp_path / "output"
    make(path)
    before = sorted(tmp_path.iterdir())
    first = hold(path)
    try:
        for name in (path, tmp_path / "." / "output", tmp_path / "folder" / ".." / "output"):
            (tmp_path / "folder").mkdir(exist_ok=True)
            refusal = pytest.raises(ValueError, match=f"output is being written by process {first.pid}: wait for it")
            with refusal, locked(name):
                pytest.fail("two at once")
        with locked(tmp_path / "other"):
            pass
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    for _ in range(2):
        with locked(path):
            assert sorted(tmp_path.iterdir()) != before
    (tmp_path / "folder").rmdir()
    assert sorted(tmp_path.iterdir()) == before, "nothing is left beside the output"


def test_the_lock_is_free_after_an_error(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path / "new" / "output"):
        raise KeyError
    with locked(tmp_path / "new" / "output"):
        (tmp_path / "new" / "output").mkdir()
    assert not list(tmp_path.iterdir()), "no empty folder is left"
    refusal = pytest.raises(ValueError, match=f"process {os.getpid()}")
    with locked(tmp_path / "new" / "output"), refusal, locked(tmp_path / "new" / "output"):
        pytest.fail("two at once")


def test_a_place_that_cannot_hold_a_lock_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="output cannot be written"), locked(tmp_path / "file" / "output"):
        pytest.fail("locked nothing")


def test_two_runs_cannot_train_into_one_folder(corpus, tmp_path, monkeypatch):
    from fairseq_alibi.patches import option_checks

    monkeypatch.setattr(option_checks, "LOCK_WAIT", 0)
    cfg = training_config(
        corpus, "--task", "language_modeling", "--arch", "alibi_lm_tiny", "--save-dir", tmp_path, "--cpu"
    )
    refusal = pytest.raises(SystemExit, match=f"checkpoint_last.pt is being written by process {os.getpid()}: wait")
    with locked(tmp_path / "checkpoint_last.pt"), refusal:
        option_checks.train_alone(lambda _: pytest.fail("two at once"), cfg)
    trained = []
    option_checks.train_alone(trained.append, cfg)
    assert trained == [cfg]
    assert not list(tmp_path.iterdir()), "the lock leaves nothing behind"
    cfg.checkpoint.no_save = True
    with locked(tmp_path / "checkpoint_last.pt"):
        option_checks.train_alone(trained.append, cfg)
    assert len(trained) == 2


def test_training_goes_on_where_files_cannot_be_locked(corpus, tmp_path, monkeypatch, caplog):
    import errno

    import filelock

    from fairseq_alibi.patches import option_checks

    cfg = training_config(
        corpus, "--task", "language_modeling", "--arch", "alibi_lm_tiny", "--save-dir", tmp_path, "--cpu"
    )
    for error in (NotImplementedError(), OSError(errno.ENOLCK, "No locks available")):
        monkeypatch.setattr(filelock.FileLock, "_acquire", mock.Mock(side_effect=error))
        trained = []
        option_checks.train_alone(trained.append, cfg)
        assert trained == [cfg]
        assert "no locks" in caplog.text
        caplog.clear()
