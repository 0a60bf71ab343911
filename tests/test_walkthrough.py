"""The documents as they are written: the walk-through's commands and the README's position method run."""

import os
import re
import shutil

import pytest
import torch
from conftest import BIN, ROOT, run


def blocks(document, language):
    """The fenced code blocks of a document that are marked with a language."""
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def clone(tmp_path):
    """The project without what running it leaves behind."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "data-bin", "checkpoints", "results", "outputs"))
    return folder


def test_walkthrough_runs_as_written(clone):
    document = "examples/language_model/README.md"
    commands = "\n".join(blocks(document, "bash"))
    for line in ("bash scripts/setup.sh\n", "source .venv/bin/activate\n"):
        assert line in commands, "the one thing not done again here: this environment is the one it makes"
        commands = commands.replace(line, "")
    path = f"{BIN}:{os.environ['PATH']}"
    run("bash", "-euo", "pipefail", "-c", commands, cwd=clone, PATH=path, VENV="none")
    caption, table, *_ = (clone / "results" / "walkthrough" / "report.md").read_text().split("\n\n")
    assert caption == "Perplexity."
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    header, first, last = rows[0], rows[2], rows[-1]
    assert (first[0], last[0]) == ("128", "2,048")
    alibi = header.index("alibi, trained on 128")
    sinusoidal = header.index("sinusoidal, trained on 128")
    assert float(last[alibi]) < float(first[alibi]), "ALiBi gets better with length"
    assert float(last[sinusoidal]) > 1.2 * float(first[sinusoidal]), "sinusoidal does not"
    (python,) = blocks(document, "python")
    done = run(BIN / "python", "-c", python, cwd=clone)
    assert "if the value is not" in done.output.splitlines()[-1]


def test_quickstart_with_a_corpus_of_ones_own(clone, corpus):
    arguments = ["--data", corpus, "--lengths", "128 256", "--updates", 4, "--", "--decoder-layers", 1]
    (clone / "scripts" / "setup.sh").write_text("")  # this environment is the one it makes
    path = f"{BIN}:{os.environ['PATH']}"
    results = clone / "results" / "quickstart"
    results.mkdir(parents=True)
    (results / "report.png").write_text("of before")
    done = run("bash", "scripts/quickstart.sh", *arguments, cwd=clone, PATH=path, VENV="none")
    assert {"alibi.json", "sinusoidal.json", "report.md", "report.png"} <= {path.name for path in results.iterdir()}
    assert "alibi, trained on 128" in (results / "report.md").read_text()
    assert "written to results/quickstart/report.md" in done.output
    assert "Warning" not in done.output
    (kept,) = [path for path in results.parent.iterdir() if path != results]
    assert (kept / "report.png").read_text() == "of before"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--lengths", "128 many"], "'many'"),
        (["--updates", "0"], "'0'"),
        (["--dat", "x"], "'--dat'"),
        (["--data"], "--data needs a value"),
        (["--data", "nowhere"], "prepare_text.sh"),
    ],
)
def test_quickstart_names_bad_arguments_before_it_does_anything(clone, arguments, named):
    done = run("bash", "scripts/quickstart.sh", *arguments, cwd=clone, check=False)
    assert done.returncode != 0
    assert named in done.output
    assert len(done.output.splitlines()) == 1
    assert not (clone / "results").exists()


def test_the_readmes_position_method_is_complete(clone, corpus):
    """A class and a line: the README's example trains, evaluates past its length, and its parameters learn."""
    example, _ = blocks("README.md", "python")
    positions = clone / "fairseq_alibi" / "positions.py"
    positions.write_text(positions.read_text() + "\n\n" + example)
    common = [corpus, "--user-dir", "fairseq_alibi", "--task", "language_modeling", "--cpu"]
    training = [
        "--arch",
        "alibi_lm_tiny",
        "--position-method",
        "kerple",
        "--tokens-per-sample",
        32,
        "--max-tokens",
        256,
    ]
    training += ["--optimizer", "adam", "--lr", 0.01, "--max-update", 5, "--save-dir", "save", "--update-freq", 2]
    run(BIN / "fairseq-train", *common, *training, cwd=clone)
    evaluation = ["--path", "save/checkpoint_last.pt", "--gen-subset", "valid", "--tokens-per-sample", 256]
    assert "Perplexity" in run(BIN / "fairseq-eval-lm", *common, *evaluation, cwd=clone).output
    learned = torch.load(clone / "save" / "checkpoint_last.pt")["model"]["decoder.position_method.log_r"]
    assert learned.abs().min() > 1e-3


def test_the_modules_of_the_readme_run():
    _, modules = blocks("README.md", "python")
    names = {"torch": torch}
    exec(modules, names)
    assert names["y"].shape == (2, 1000, 256)
