"""Commands where standard output, locale, warnings or optimization are other than usual: they work, or say one line."""

import errno
import io
import logging
import os
import subprocess
import sys
import warnings

import pytest
from conftest import BIN, ROOT, training_config

from fairseq_alibi.__main__ import main, prepare_streams_and_warnings
from fairseq_alibi.patches.option_checks import checked_command

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.fixture
def shell(corpus, checkpoint, tmp_path):
    """Runs a shell command in an empty folder, with $DATA and $CK; returns status and lines of its standard error."""

    def execute(command, **environment):
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"],
            cwd=tmp_path,
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "DATA": corpus, "CK": checkpoint, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=300,
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode().splitlines()

    return execute


EVALUATE = "fairseq-alibi evaluate $DATA $CK --cpu --lengths 32,64 --output out"


def test_a_reader_that_ends_is_one_line(shell, tmp_path):
    status, output, errors = shell(f"{EVALUATE} | head -1")
    assert (status, len(output.splitlines())) == (1, 1)
    assert errors == ["fairseq-alibi evaluate: standard output is closed"]
    assert list((tmp_path / "out").glob("*.json")), "what was done is kept"


@pytest.mark.slow
def test_a_reader_of_fairseqs_commands_that_ends_is_one_line(shell):
    command = "fairseq-interactive $DATA --user-dir $ROOT/fairseq_alibi --task language_modeling --path $CK --cpu"
    status, _, errors = shell(f"{command} --input $DATA/dict.txt --max-len-b 3 | true", ROOT=ROOT)
    assert status == 1
    assert errors[-1] == "standard output is closed"
    assert "Traceback" not in "".join(errors)


class FullOutput(io.StringIO):
    """An output whose disk is full."""

    def write(self, _=""):
        raise OSError(errno.ENOSPC, "No space left on device")

    flush = write


def test_a_log_of_fairseq_that_cannot_be_written_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", FullOutput())
    monkeypatch.setattr(os, "dup2", lambda *_: monkeypatch.undo())  # the output is dropped
    cfg = training_config("data", "--arch", "alibi_lm_tiny", "--task", "language_modeling", "--cpu")
    with checked_command(cfg):
        logging.StreamHandler(sys.stdout).emit(logging.makeLogRecord({"msg": "an update"}))
    assert capsys.readouterr().err == "standard output cannot be written (No space left on device)\n"
    monkeypatch.setattr(sys, "stderr", None)  # closed
    with checked_command(cfg):
        assert os.get_inheritable(sys.stderr.fileno()), "the commands that it starts write there too"
    assert logging.StreamHandler.handleError is logging.Handler.handleError, "the command has ended"


def test_a_full_standard_output_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", FullOutput())
    dropped = []
    monkeypatch.setattr(os, "dup2", lambda _, number: dropped.append(number))
    with pytest.raises(SystemExit, match=r"show-bias: standard output cannot be written \(No space left on device\)"):
        main(["show-bias", "--heads", "2", "--length", "4", "--output", str(tmp_path / "bias.png")])
    assert dropped == [1], "or Python complains of the rest when it ends"


def test_without_standard_output_results_are_written(shell, tmp_path):
    assert shell(f"{EVALUATE} >&-")[::2] == (0, [])
    assert len(list((tmp_path / "out").iterdir())) == 1


def test_without_standard_input_a_prompt_is_missing(shell):
    status, _, errors = shell("fairseq-alibi generate $DATA $CK --cpu <&-")
    assert status == 1
    assert len(errors) == 1
    assert "no prompt" in errors[0]


def test_warnings_of_libraries_end_no_command(shell):
    assert shell("fairseq-alibi generate $DATA $CK --cpu word1 --tokens 3", PYTHONWARNINGS="error")[0] == 0


@pytest.mark.parametrize("module", ["torch.nn", "fairseq_alibi.core"])
def test_warnings_of_libraries_alone_are_no_errors(monkeypatch, module):
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    expected = pytest.raises if module.startswith("fairseq_alibi") else pytest.warns
    with expected(UserWarning, match="old"), warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_streams_and_warnings()
        warnings.warn_explicit("old", UserWarning, "file.py", 1, module)


@pytest.mark.slow
def test_assertions_and_docstrings_are_not_needed(shell):
    status, output, _ = shell(EVALUATE.replace("fairseq-alibi", "python -OO -m fairseq_alibi"))
    assert status == 0
    assert "written to out/" in output


@pytest.mark.slow
def test_what_the_terminal_cannot_encode_is_escaped(shell):
    status, output, errors = shell(
        "fairseq-alibi generate $DATA $CK --cpu 'word1 na\u00efve' word2 --tokens 3", **ASCII
    )
    assert status == 0
    assert output.startswith("word1 <unk>"), "the prompt is UTF-8 whatever the locale"
    assert errors == ["1 of the prompt's 3 tokens are unknown, <unk>"]
    status, output, _ = shell(
        "fairseq-alibi show-bias --heads 2 --length 4 --output na\u00efve.png", PYTHONIOENCODING="ascii"
    )
    assert (status, output.partition(":")[0]) == (0, r"na\xefve.png")
