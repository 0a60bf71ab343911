"""The long run that looks for leaks, made short."""

import json

import pytest
import soak
from conftest import failure


def test_a_round_trains_evaluates_and_notes_what_is_held(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(soak, "LONGEST", 600)
    message = failure(capsys, soak.main, corpus, "--minutes", 0.001, "--updates", 2, "--output", tmp_path)
    assert message == "soak: 1 rounds are too few to tell, 80 are needed: raise --minutes"
    (noted,) = json.loads((tmp_path / "soak.json").read_text())["rounds"]
    assert noted["updates"] == 2
    assert 0 < noted["loss"] < 9
    assert noted["memory_mib"] > 100
    assert (tmp_path / "soak.png").exists()


def test_epochs_leave_no_data_set_behind(corpus):
    trainer = soak.trainer_of(str(corpus))
    batches = soak.batches(trainer)
    first = next(batches)
    epochs = [trainer.get_train_iterator(1, load_dataset=False).epoch for _ in zip(range(60), batches)]
    assert first
    assert max(epochs) > 2
    assert len(trainer.task.dataset_to_epoch_iter) == 1


@pytest.mark.parametrize(("leak", "grown"), [({}, None), ({"memory_mib": 1}, "memory_mib"), ({"files": 0.1}, "files")])
def test_what_grows_is_named(leak, grown, monkeypatch, corpus, tmp_path, capsys):
    still = {"seconds": 9, "updates": 1, "length": 64, "loss": 1, "memory_mib": 500, "files": 9, "threads": 2}
    rounds = [{**still, **{name: still[name] + n * each for name, each in leak.items()}} for n in range(100)]
    monkeypatch.setattr(soak, "soak", lambda *_: rounds)
    if grown:
        message = failure(capsys, soak.main, corpus, "--output", tmp_path)
        assert message == f"soak: not flat: {grown}"
    else:
        soak.main([str(corpus), "--output", str(tmp_path)])


def test_bad_input_is_named(corpus, capsys, tmp_path):
    assert "dict.txt" in failure(capsys, soak.main, tmp_path)
    assert "--minutes must be more than 0, not -1" in failure(capsys, soak.main, corpus, "--minutes", -1)
