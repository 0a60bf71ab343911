"""The documents as they are written: their commands and their Python run, and what they refer to exists."""

import os
import re
import shlex
import shutil

import pytest
import torch
from conftest import BIN, ROOT, run

from fairseq_alibi import __version__
from fairseq_alibi.__main__ import COMMANDS

#: The documents that tests run as they are written, in this order.
WALKTHROUGH = ["examples/language_model/README.md", "examples/language_model/generation.md"]
DOCUMENTS = [path for path in sorted(ROOT.rglob("*.md")) if not any(part.startswith(".") for part in path.parts)]


def blocks(document, language):
    """The fenced code blocks of a document that are marked with a language."""
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def without(commands, *lines):
    """Commands without these lines, each of which has to be there."""
    for line in lines:
        assert f"{line}\n" in commands
        commands = commands.replace(f"{line}\n", "")
    return commands


@pytest.fixture
def clone(tmp_path):
    """The project without what running it leaves behind."""
    folder = tmp_path / "clone"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "data-bin", "checkpoints", "results", "outputs"))
    return folder


@pytest.mark.slow
def test_walkthrough_runs_as_written(clone):
    commands = "\n".join(block for document in WALKTHROUGH for block in blocks(document, "bash"))
    # The tests run in the environment that these two make.
    commands = without(commands, "bash scripts/setup.sh", "source .venv/bin/activate")
    assert "--builtin\n" in commands
    commands = commands.replace("--builtin\n", "--builtin --max-bytes 1000000\n")  # less text, and fewer updates
    assert "--lr-period-updates 150 --max-update 200" in commands
    commands = commands.replace("--lr-period-updates 150 --max-update 200", "--lr-period-updates 50 --max-update 100")
    path = f"{BIN}:{os.environ['PATH']}"
    run("bash", "-euo", "pipefail", "-c", commands, cwd=clone, PATH=path, VENV="none")
    caption, table, *_ = (clone / "results" / "walkthrough" / "report.md").read_text().split("\n\n")
    assert caption == "## Perplexity"
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    header, lengths = rows[0], {row[0]: row for row in rows[2:]}
    assert len(lengths) == 4, "three lengths, and all of the text in a stream"
    first, last = lengths["128"], lengths["2,048"]
    alibi = header.index("alibi, trained on 128")
    sinusoidal = header.index("sinusoidal, trained on 128")
    assert float(last[alibi]) < float(first[alibi]), "ALiBi gets better with length"
    assert float(last[sinusoidal]) > 1.2 * float(first[sinusoidal]), "sinusoidal does not"
    (python,) = (block for document in WALKTHROUGH for block in blocks(document, "python"))
    done = run(BIN / "python", "-c", python, cwd=clone)
    assert "if the value is not" in done.output.splitlines()[-1]


@pytest.mark.slow
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


def test_the_commands_of_the_readme_run_as_written(corpus, tmp_path):
    """With another corpus in the place of the built-in one, which takes a while to prepare."""
    (commands,) = blocks("README.md", "bash")
    prepare = "bash scripts/prepare_text.sh data-bin/builtin --builtin"
    commands = without(commands, "source .venv/bin/activate", prepare).replace("\\\n", "")
    (tmp_path / "data-bin").mkdir()
    (tmp_path / "data-bin" / "builtin").symlink_to(corpus)
    (tmp_path / "fairseq_alibi").symlink_to(ROOT / "fairseq_alibi")
    for command in commands.splitlines():
        name, *arguments = shlex.split(command)
        done = run(BIN / name, *arguments, cwd=tmp_path)
    assert "Perplexity" in done.output


def test_the_position_method_of_the_readme_trains_and_evaluates_past_its_length(corpus, tmp_path):
    example, _ = blocks("README.md", "python")
    (tmp_path / "log_bias").mkdir()
    (tmp_path / "log_bias" / "__init__.py").write_text(example)
    common = [corpus, "--user-dir", "log_bias", "--task", "language_modeling", "--cpu"]
    training = ["--arch", "alibi_lm_tiny", "--position-method", "log", "--tokens-per-sample", 32, "--max-tokens", 256]
    training += ["--optimizer", "adam", "--lr", 0.01, "--max-update", 2, "--save-dir", "save"]
    run(BIN / "fairseq-train", *common, *training, cwd=tmp_path)
    evaluation = ["--path", "save/checkpoint_last.pt", "--gen-subset", "valid", "--tokens-per-sample", 256]
    assert "Perplexity" in run(BIN / "fairseq-eval-lm", *common, *evaluation, cwd=tmp_path).output


def test_the_modules_of_the_readme_run():
    _, modules = blocks("README.md", "python")
    names = {"torch": torch}
    exec(modules, names)
    assert names["y"].shape == (2, 1000, 256)


def anchors(path):
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_refers_to_exists(document):
    text = document.read_text()
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = document.parent / name if name else document
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    if document.name != "CHANGELOG.md":  # which names what is gone, too
        for name in re.findall(r"\b(?:scripts|configs|tests|fairseq_alibi)/[\w./-]*\w", text):
            assert name.endswith("/NAME.py") or (ROOT / name).exists(), name
    for subcommand in re.findall(r"fairseq-alibi ([a-z][\w-]+)", text):
        assert subcommand in COMMANDS, subcommand


def test_the_version_is_the_same_everywhere():
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == __version__


@pytest.mark.parametrize(("document", "limit"), [("README.md", 130), ("examples/language_model/README.md", 300)])
def test_the_main_documents_are_short(document, limit):
    assert len((ROOT / document).read_text().splitlines()) <= limit
