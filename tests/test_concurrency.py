"""Two processes of the user's own that write to one place: results are merged, or the second is refused in one line."""

import json
import multiprocessing
import os
import signal
import time

import numpy
import pytest
from conftest import failure

from fairseq_alibi.__main__ import main
from fairseq_alibi.evaluation import checkpoint_evaluation, result_files
from fairseq_alibi.files.locks import locked

fork = multiprocessing.get_context("fork")


def hold(path, held):
    """Holds the lock on a path until it is killed."""
    with locked(path):
        held.set()
        time.sleep(600)


@pytest.fixture
def owner():
    """Starts a process that holds the lock on a path."""
    started = []

    def start(path):
        held = fork.Event()
        started.append(fork.Process(target=hold, args=(path, held)))
        started[-1].start()
        assert held.wait(60)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def test_a_lock_that_was_removed_while_it_was_awaited_is_taken_anew(owner, tmp_path, monkeypatch):
    """A process that opened the file just before its owner removed it holds a lock that nobody else sees."""
    path, removed = tmp_path / "results.json", []
    lock_path = tmp_path / ".results.json.lock"
    from filelock import FileLock

    acquire = FileLock.acquire

    def unlucky(self, *args, **options):
        result = acquire(self, *args, **options)
        if not removed:
            removed.append(lock_path.unlink())
        return result

    monkeypatch.setattr(FileLock, "acquire", unlucky)
    with locked(path), pytest.raises(ValueError, match=f"process {os.getpid()}"):
        locked(path).__enter__()


def test_waiting_for_a_lock(owner, tmp_path, capsys):
    process = owner(tmp_path / "x")
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(ValueError, match="is being written"):
        locked(tmp_path / "x", wait=0.2).__enter__()
    assert f"waiting up to 0.2 seconds for process {process.pid}, which writes" in capsys.readouterr().err
    process.kill()
    with locked(tmp_path / "x", wait=60):
        pass


def test_two_evaluations_into_one_file_keep_all_results(corpus, checkpoint, tmp_path, monkeypatch):
    """The second runs while the first scores; JSON and token losses."""
    original = checkpoint_evaluation.evaluate_model
    lengths = iter(["64,96"])
    losses = tmp_path / "losses.npz"

    def sweep(text):
        options = ("--lengths", text, "--output", tmp_path / "out", "--save-token-losses", losses, "--cpu")
        main([str(part) for part in ("evaluate", corpus, checkpoint, *options)])

    def interrupted(*arguments):
        if (second := next(lengths, None)) is not None:
            sweep(second)
        return original(*arguments)

    monkeypatch.setattr(checkpoint_evaluation, "evaluate_model", interrupted)
    sweep("32,48")
    (path,) = (tmp_path / "out").iterdir()
    assert sorted(result["length"] for result in json.loads(path.read_text())["results"]) == [32, 48, 64, 96]
    assert len(numpy.load(losses).files) == 3 + 4, "tokens, subject, runs, and the lengths"
    assert sorted(part.name for part in tmp_path.iterdir()) == ["losses.npz", "out"]


def test_an_evaluation_of_something_else_is_not_mixed_in(corpus, checkpoint, tmp_path, monkeypatch, capsys):
    """The second replaces the file while the first scores: the first ends with one line, and the second's are kept."""
    original = checkpoint_evaluation.evaluate_model
    common = ("evaluate", corpus, checkpoint, "--output", tmp_path, "--cpu", "--lengths")
    others = iter([("64", "--overwrite", "--model-overrides", "{'alibi_length_scale': 2.0}")])

    def interrupted(*arguments):
        if (second := next(others, None)) is not None:
            main([str(part) for part in (*common, *second)])
        return original(*arguments)

    monkeypatch.setattr(checkpoint_evaluation, "evaluate_model", interrupted)
    assert "of another evaluation (model_overrides)" in failure(capsys, main, *common, "32")
    (path,) = tmp_path.iterdir()
    assert [result["length"] for result in json.loads(path.read_text())["results"]] == [64]


def test_a_second_writer_is_refused_and_named(corpus, checkpoint, owner, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(result_files, "WAIT", 0.1)
    output = tmp_path / "results.json"
    process = owner(output)
    named = f"being written by process {process.pid}"
    arguments = ("eval-lm", "nonoverlapping", corpus, checkpoint, 32, "--output", output, "--", "--cpu")
    assert named in failure(capsys, main, *arguments)
    folder = tmp_path / "out"
    process = owner(folder / f"{checkpoint.parent.name}_{checkpoint.stem}_valid.json")
    arguments = ("evaluate", corpus, checkpoint, "--lengths", 32, "--output", folder, "--cpu")
    assert f"being written by process {process.pid}" in failure(capsys, main, *arguments)
    assert not output.exists()
    assert not list(folder.glob("*.json"))


@pytest.mark.parametrize(
    "command",
    [
        "export-hf good.pt OUT",
        "import-checkpoint good.pt OUT",
        "merge-checkpoint good.pt OUT",
        "reach good.pt --output OUT",
        "show-bias --output OUT",
    ],
)
def test_a_second_writer_is_refused_before_its_work(tmp_path, owner, capsys, command):
    process = owner(tmp_path / "OUT")
    arguments = [tmp_path / "OUT" if word == "OUT" else word for word in command.split()]
    assert f"being written by process {process.pid}" in failure(capsys, main, *arguments)


def test_a_second_report_is_refused(tmp_path, owner, capsys, monkeypatch):
    from fairseq_alibi.evaluation import report

    monkeypatch.setattr(report, "WAIT", 0.1)
    model = {"checkpoint": "good.pt", "position_method": "alibi", "training_length": 32}
    content = {"model": model, "subset": "valid", "results": [{"length": 64, "stride": 64, "perplexity": 9.0}]}
    (tmp_path / "good.json").write_text(json.dumps(content))
    process = owner(tmp_path / "report")
    arguments = ("report", tmp_path / "good.json", "--output", tmp_path / "report", "--overwrite")
    assert f"being written by process {process.pid}" in failure(capsys, main, *arguments)
    assert not (tmp_path / "report").exists()
    process.kill()
    process.join()
    main([str(part) for part in arguments])
