"""Commands that are printed run as they are printed; only shorter, on the CPU."""

import json
import os
import shlex
from pathlib import Path

import pytest
import torch
from conftest import BIN, ROOT, failure, run
from hydra.core.override_parser.overrides_parser import OverridesParser
from packaging import requirements

from fairseq_alibi.__main__ import main
from fairseq_alibi.commands import plan
from fairseq_alibi.commands.doctor import FAIRSEQ, PARTS, PIP, SETUP
from fairseq_alibi.files import errors

SPLITS = ("train", "valid", "test")


def run_printed(line, *more, cwd):
    """Runs a command as it was printed, with more arguments; returns its output."""
    program, *arguments = shlex.split(line)
    return run(program if program == "bash" else BIN / program, *arguments, *more, cwd=cwd).output


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A working directory with a space in its name that is not the project's."""
    folder = tmp_path / "my work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_what_the_preparation_prints_trains_and_reads_plain_text(elsewhere, capsys):
    for split in SPLITS:
        (elsewhere / f"{split} text").write_text('the low boat, the slow "boat"\n' * 60)
    texts = [part for split in SPLITS for part in (f"--{split}", f"{split} text")]
    main(["prepare-text", "my data", *texts, "--bpe-merges", "5", "--workers", "1"])
    training, reading = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  fairseq-"))
    run_printed(training, "--cpu", "--max-update", 2, "--no-epoch-checkpoints", cwd=elsewhere)
    (elsewhere / "lines").write_text("the low boat\n")
    out = run_printed(reading, "--cpu", "--input", "lines", "--max-len-b", 12, cwd=elsewhere)
    assert any(line.startswith("D-0") for line in out.splitlines()), out


def test_a_plan_prints_the_run_that_it_planned_wherever_its_overrides_stand(corpus, elsewhere, capsys, monkeypatch):
    """Also from outside of the project, where the config's relative path of the plugin leads nowhere."""
    before, after = ["model.position_method=sinusoidal"], [f"task.data={corpus}", "model.decoder_layers=1"]
    config = str(ROOT / "configs" / "tiny.yaml")
    main(["plan", *before, "--gpu-memory", "1", config, "--gpus", "1", *after, "task.tokens_per_sample=64"])
    printed = capsys.readouterr().out.splitlines()
    planned = next(line.split()[-1] for line in printed if line.startswith("all "))
    out = run_printed(printed[-1], "optimization.max_update=1", "common.log_format=simple", cwd=elsewhere)
    assert f"num. shared model params: {planned} " in out
    cfg = torch.load(elsewhere / "checkpoints" / "alibi-tiny" / "checkpoint_last.pt", weights_only=False)["cfg"]
    model = cfg["model"]
    assert (model["position_method"], model["decoder_layers"], cfg["task"]["tokens_per_sample"]) == (
        "sinusoidal",
        1,
        64,
    )
    monkeypatch.setattr(plan, "__file__", "/my 'x' (1)/fairseq_alibi/commands/plan.py")
    main(["plan", config, "--types", "100", "--gpu-memory", "1"])
    *_, data, user_dir = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert data == "task.data=DATA"
    assert OverridesParser.create().parse_override(user_dir).value() == "/my 'x' (1)/fairseq_alibi"


def test_commands_in_results_give_the_same_results(corpus, train, tmp_path, capsys):
    """Those of each number of evaluate and eval-lm, and the one that evaluate names for a model of lines."""
    checkpoint = train("--sample-break-mode", "eos", updates=2)
    done = run(BIN / "fairseq-alibi", "evaluate", corpus, checkpoint, "--lengths", 16, "--cpu", "--output", tmp_path)
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    (made_by,) = content["runs"].values()
    run_printed(made_by["command"], "--overwrite", cwd=ROOT)
    assert json.loads(path.read_text())["results"][0]["loss"] == content["results"][0]["loss"]
    by_lines = next(line for line in done.output.splitlines() if "By lines: " in line).partition("By lines: ")[2]
    run_printed(by_lines, "--cpu", cwd=ROOT)
    (result,) = json.loads((checkpoint.parent / "nonoverlapping_valid.json").read_text())["results"]
    out = run_printed(result["command"], cwd=ROOT)
    assert f"Loss (base 2): {result['loss']:.4f}" in out


def test_what_the_preparation_of_wikitext103_prints_names_a_script_and_the_data(elsewhere, capsys):
    """test_recipes.py runs the script."""
    (elsewhere / "wiki").mkdir()
    for split in SPLITS:
        (elsewhere / "wiki" / f"wiki.{split}.tokens").write_text(" \n = Cats = \n the cat sat \n" * 60)
    main(["prepare-wikitext103", "my data", "--from", "wiki", "--workers", "1"])
    program, script, data, *_ = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert (program, Path(script).name) == ("bash", "train_wikitext103.sh")
    assert Path(script).is_file()
    assert (Path(data) / "dict.txt").is_file()


def test_the_scripts_and_packages_that_remedies_name_exist(elsewhere):
    """Of doctor; from the project's folder the path is the short one of the documents."""
    assert Path(shlex.split(errors.script_command("setup.sh"))[1]).is_file()
    remedies = {part.remedy for part in PARTS} - {SETUP, FAIRSEQ}
    named = {requirements.Requirement(shlex.split(remedy)[-1]).name for remedy in remedies if remedy.startswith(PIP)}
    assert "transformers" in named
    os.chdir(ROOT)
    assert errors.script_command("setup.sh") == "bash scripts/setup.sh"


def test_without_the_scripts_of_a_clone_no_command_names_them(elsewhere, capsys, monkeypatch):
    monkeypatch.setattr(errors, "__file__", str(elsewhere / "site-packages" / "fairseq_alibi" / "files" / "errors.py"))
    assert not errors.script_command("setup.sh")
    assert "run it in a clone" in failure(capsys, main, "reproduce", "--preset", "paper")
