"""The list of patches is true: each target is replaced, and each cited line of the installed fairseq holds it."""

import logging
import multiprocessing
import pkgutil
import re
import sys
import time
import warnings
from pathlib import Path

import fairseq
import pytest
from conftest import training_config
from fairseq import tasks

from fairseq_alibi.patches import catalogue, compatibility
from fairseq_alibi.patches.patch import original

SITE_PACKAGES = Path(fairseq.__file__).parent.parent


@pytest.mark.parametrize("patch", catalogue.PATCHES, ids=lambda patch: patch.target)
def test_target_is_replaced_once_and_its_source_is_cited(patch):
    import fairseq_cli.eval_lm
    import fairseq_cli.generate
    import fairseq_cli.train  # noqa: F401

    for _ in range(2):
        catalogue.apply(in_command=True)
    assert pkgutil.resolve_name(patch.target) is patch.replacement
    assert original(patch.target) is not patch.replacement, "applied twice"
    file, line = patch.source.split(":")
    name = re.split(r"[:.]", patch.target)[-1]
    text = (SITE_PACKAGES / file).read_text().splitlines()[int(line) - 1]
    assert re.search(rf"\b(def|class) {name}\(|\b{name}\.|(self|parser)\.{name}\b|{name}\(self\.", text), text
    assert all((patch.what, patch.why, patch.removable))


def test_nothing_else_of_fairseq_is_replaced():
    """Every assignment to an attribute of an imported module stands in the list."""
    package = Path(catalogue.__file__).parents[1]
    for path in package.rglob("*.py"):
        for module in re.findall(r"^ *from fairseq\S* import (?:\w+ as )?([a-z_]\w*)$", path.read_text(), re.MULTILINE):
            assert not re.search(rf"^ *{module}\.\w+ = ", path.read_text(), re.MULTILINE), (path, module)


def test_silenced_warnings_name_their_origin():
    for message, origin in compatibility.SILENCED_WARNINGS.items():
        re.compile(message)
        assert (SITE_PACKAGES / origin.partition(":")[0]).is_file(), origin
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        compatibility.silence_known_warnings()
        warnings.warn("'pin_memory' argument is set as true but no accelerator is found", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["another"]


def test_another_fairseq_is_named_in_one_line(monkeypatch, caplog):
    monkeypatch.setattr(fairseq, "__version__", "0.13.0")
    with caplog.at_level(logging.WARNING):
        catalogue.apply()
    (record,) = caplog.records
    assert "fairseq 0.13.0 is installed, but the patches of fairseq_alibi are made for 0.12.2" in record.getMessage()
    assert "pip install --no-deps fairseq==0.12.2" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_script_that_defines_functions_of_the_same_names_keeps_them(monkeypatch):
    """`python fairseq_cli/train.py` is recognized by its file, not by its functions."""
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "train", "mine", raising=False)
    catalogue.apply(in_command=True)
    assert main.train == "mine"


def test_the_processes_that_load_batches_end_with_the_last_one(corpus):
    """By themselves: the garbage collector would wait for each of them, and then kill it."""
    options = (corpus, "--task", "language_modeling", "--arch", "alibi_lm_tiny", "--tokens-per-sample", 16)
    task = tasks.setup_task(training_config(*options).task)
    task.load_dataset("valid")
    before = multiprocessing.active_children()
    batches = task.get_batch_iterator(task.dataset("valid"), max_tokens=128, num_workers=2, data_buffer_size=1)
    batches = batches.next_epoch_itr()
    next(batches)
    workers = [process for process in multiprocessing.active_children() if process not in before]
    assert len(workers) == 2
    assert len(list(batches)) > 3
    deadline = time.monotonic() + 20
    for worker in workers:
        while worker.exitcode is None and time.monotonic() < deadline:
            time.sleep(0.05)  # no join: the loader's thread joins too, and what the second one sees may be unset yet
        assert worker.exitcode == 0
