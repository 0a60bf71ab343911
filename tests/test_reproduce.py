"""`fairseq-alibi reproduce`: all methods alike, what is done is not done again, one page."""

import contextlib
import json
import logging
import resource
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import BIN, ROOT
from fairseq_cli import train

from fairseq_alibi.__main__ import main
from fairseq_alibi.core import position_methods
from fairseq_alibi.core.methods import COMPARED
from fairseq_alibi.evaluation.curves import Curve, read_curves
from fairseq_alibi.experiments import comparison, comparison_page, presets, probe_comparison, probe_data, probe_tasks


def laptop_model(*arguments):
    """The laptop's model made smaller."""
    sizes = ["--decoder-layers=1", "--decoder-embed-dim=32", "--decoder-ffn-embed-dim=32", "--max-tokens=64"]
    return [*presets.laptop_model(*arguments), *sizes]


@pytest.fixture
def small(monkeypatch, corpus):
    """The laptop's preset made smaller."""
    monkeypatch.setenv("PATH", str(BIN), prepend=":")
    preset = presets.Preset(laptop_model, str(corpus), (16,), (16, 64), 41, 2)
    monkeypatch.setitem(presets.PRESETS, "laptop", preset)
    return preset


@pytest.fixture
def in_process(monkeypatch):
    """Has the commands run in this process, as a new one takes seconds to start; returns those that were run."""
    commands = []

    def run(_, command, log):
        program, *arguments = command
        commands.append(command)
        loggers = [logging.getLogger(name) for name in ("fairseq_cli.train", "fairseq.logging.progress_bar")]
        with log.open("w") as output, contextlib.redirect_stdout(output):
            if program == "fairseq-train":
                for logger in loggers:
                    logger.setLevel(logging.INFO)
                monkeypatch.setattr(sys, "argv", command)
                train.cli_main()
            else:
                main(arguments)
        for logger in loggers:  # fairseq leaves the handlers of --log-file
            logger.setLevel(logging.NOTSET)
            logger.handlers.clear()
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_memory_bytes": memory, "cpu_seconds": 60.0, "wall_seconds": 90.0, "load_average": 9.0}

    monkeypatch.setattr(comparison.CommandRunner, "run", run)
    return commands


def fails(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["reproduce", *map(str, arguments)])
    assert "\n" not in str(stopped.value.code)
    return str(stopped.value.code)


@pytest.mark.slow
def test_all_methods_end_on_one_page_and_what_is_done_is_kept(small, in_process, tmp_path, monkeypatch):
    """The mean and the standard deviation over seeds, a method that is another one at evaluation among them."""
    monkeypatch.setitem(presets.PRESETS, "laptop", small._replace(parallel=1))
    methods = ("alibi", "learned", "rotary+yarn")
    sweep = ("--output", tmp_path / "out", "--cpu", "--seeds", "1", "7", "--methods", *methods)
    main(["reproduce", *map(str, sweep)])
    page = (tmp_path / "out" / "results.md").read_text()
    for name in ("perplexity-16.png", "perplexity-16-sliding.png", "positions-16.png"):
        assert f"({name})" in page
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "Seeds 1, 7; means and standard deviations" in page
    assert "18 CPU minutes, 27 minutes at 1 at a time. Load average at their ends: 9.0 to 9.0" in page
    assert "other work ran on the machine" in page
    printed = page.split("```")[1].splitlines()[1:]
    assert printed == [shlex.join(command).replace(f"{ROOT}/", "") for command in in_process[:3]], "as they were run"
    assert str(ROOT) not in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert rows[0] == ["evaluation length", *methods]
    row = next(row for row in rows if row[0] == "64")
    assert row[2] == "", "learned positions end with the training length"
    for cell, name in zip(row[1:], methods):
        folder, base = tmp_path / "out" / "results" / name.partition("+")[2], name.partition("+")[0]
        files = [folder / f"{base}-16{suffix}_checkpoint_last_valid.json" for suffix in ("", "-seed7")]
        curves = [curve for file in files for curve in read_curves([file]) if curve.windows == "non-overlapping"]
        if cell:
            first, second = (curve.perplexity[64] for curve in curves)
            assert first != second, "the seed changes nothing"
            assert cell == f"{(first + second) / 2:.2f} ± {abs(first - second) / 2**0.5:.2f}"
    done = json.loads((tmp_path / "out" / "alibi-16-seed7" / "run.json").read_text())
    assert done.keys() == {"training", "evaluation", "sliding window"}
    assert "--seed 7" in done["training"]["command"]
    speed, seconds, memory = next(row for row in rows if row[:2] == ["16", "alibi"])[2:5]
    assert int(speed.replace(",", "")) > 0
    assert (seconds, int(memory.replace(",", "")) > 64) == ("60", True)
    monkeypatch.setattr(comparison.CommandRunner, "run", lambda *_: pytest.fail("it was done"))
    main(["reproduce", *map(str, sweep)])
    assert "another updates" in fails(*sweep, "--updates", 7)


@pytest.fixture
def small_probes(monkeypatch, tmp_path):
    """The preset of probes made smaller: two tasks, of which each model learns both."""

    def model(*arguments):
        sizes = ["--decoder-layers=1", "--decoder-embed-dim=16", "--decoder-ffn-embed-dim=16", "--max-tokens=900"]
        return [*presets.probe_model(*arguments), *sizes]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(BIN), prepend=":")
    recall = probe_tasks.ProbeOptions(vocabulary=12, pairs=2, queries=2)
    folders = {
        "data/mqar": probe_data.ProbeSettings("mqar", (10, 14), (14, 28), 100, 20, options=recall),
        "data/copy": probe_data.ProbeSettings("copy", (2, 6), (6, 12), 100, 20),
    }
    monkeypatch.setattr(probe_comparison, "BUILTIN_PROBES", folders)
    preset = presets.PRESETS["probes"]._replace(training_command=model, data=":".join(folders), updates=3, parallel=1)
    monkeypatch.setitem(presets.PRESETS, "probes", preset)


@pytest.mark.slow
def test_probes_end_on_one_page_and_what_is_done_is_kept(small_probes, in_process, tmp_path, monkeypatch):
    """Mean and deviation over seeds, a method that ends with its training, one that is another at evaluation."""
    methods = ("learned", "rotary+yarn")
    command = ("reproduce", "--preset", "probes", "--output", "out", "--seeds", "1", "7", "--methods", *methods)
    main([*command])
    page = (tmp_path / "out" / "results.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    assert rows[0][:3] == ["method", "mqar, up to 14", "longer than 14"]
    summary = {row[0]: row for row in rows[2:4]}
    assert (summary["learned"][2], summary["learned"][4]) == ("", ""), "learned positions end with the training length"
    for probe, column in (("mqar", 1), ("copy", 3)):
        shares = []
        for suffix in ("", "-seed7"):
            path = tmp_path / "out" / "results" / "yarn" / f"rotary-15{suffix}-{probe}" / "probe.json"
            (model,) = json.loads(path.read_text())["models"]
            assert model["model"]["overrides"] == {"rotary_scaling": "yarn"}
            shares.append([result["exact_match"] for result in model["results"]])
        (near, far), (other_near, other_far) = shares
        for one, two, cell in ((near, other_near, column), (far, other_far, column + 1)):
            mean, spread = (one + two) / 2, abs(one - two) / 2**0.5
            assert summary["rotary+yarn"][cell] == f"{mean:.1%} ± {spread:.1%}"
        assert f"({probe}.png)" in page
        assert (tmp_path / "out" / f"{probe}.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "mqar-map.png").exists()
    assert not (tmp_path / "out" / "copy-map.png").exists(), "all its answers have one gap"
    assert in_process[0][1] == "data/mqar:data/copy"
    monkeypatch.setattr(comparison.CommandRunner, "run", lambda *_: pytest.fail("it was done"))
    main([*command])
    assert "drop it" in fails("--preset", "probes", "--subset", "test")
    assert "two folders have one name" in fails("--preset", "probes", "--data", "data/mqar:data/mqar")


def test_where_alibi_loses_is_said():
    def group(name, *perplexities):
        values = {"windows": "", "checkpoint": "", "subset": "", "training_length": 64, "details": {}}
        return [Curve(name, name, **values, perplexity=dict(zip((64, 128), seed))) for seed in perplexities]

    alibi, t5 = group("alibi", (5.0, 4.0), (6.0, 5.0)), group("t5", (4.5, 3.9), (5.5, 4.9))
    groups = [alibi, t5, group("fox", (5.5, 2.0), (6.5, 5.5)), group("none", (6.0,), (6.0,))]
    text = comparison_page.better_than(groups, "alibi")
    one, both = "1 of 2 seeds", "2 of 2 seeds"
    assert text == f"Better than alibi: t5 at 64 (-0.50, {both}), 128 (-0.10, {both}); fox at 128 (-0.75, {one})."
    assert comparison_page.better_than([alibi], "alibi") == "Better than alibi: none."


def test_a_step_that_fails_is_named_with_its_log_and_the_others_are_kept(small, tmp_path, monkeypatch):
    def commands(_, model):
        script = "echo from afar; exit 3" if model.method == "none" else ""
        return {"training": ["sh", "-c", script]}

    monkeypatch.setitem(presets.PRESETS, "laptop", small._replace(parallel=1))
    monkeypatch.setattr(comparison.Comparison, "commands", commands)
    monkeypatch.setattr(comparison, "count_updates", lambda _: 3)
    message = fails("--output", tmp_path, "--methods", "alibi", "none", "--updates", 3, "--seeds", 1)
    assert message.endswith(f"sh -c ended with status 3, see {tmp_path}/none-16/training.log: from afar")
    assert (tmp_path / "alibi-16" / "run.json").exists()
    assert not (tmp_path / "none-16" / "run.json").exists()


def test_all_models_of_a_length_differ_in_their_method_only(tmp_path):
    for name, preset in presets.PRESETS.items():
        commands = [preset.training_command("data", method, 512, tmp_path, 10) for method in position_methods()]
        alike = {tuple(part for part in command if part not in position_methods()) for command in commands}
        assert len(alike) == 1, name


def test_paper_prints_its_commands(capsys, tmp_path):
    main(["reproduce", "--preset", "paper", "--output", str(tmp_path / "out")])
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    trained = len(COMPARED) - 1  # rotary+yarn is rotary at evaluation
    assert len(lines) == 3 * 2 * (trained + 2 * len(COMPARED)), "seeds, lengths, steps"
    assert lines[0][1].endswith("scripts/train_wikitext103.sh")
    assert lines[1][:2] == ["fairseq-alibi", "evaluate"]
    assert lines[2][-2:] == ["--stride", "512"], "as in the paper's table 7"
    assert sum("{'rotary_scaling': 'yarn'}" in line for line in lines) == 3 * 2 * 2
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_paper_launched_trains_with_the_script_evaluates_and_writes_the_page(monkeypatch, tmp_path, corpus, capsys):
    """The real commands, with a smaller model and shorter texts."""
    monkeypatch.setenv("PATH", str(BIN), prepend=":")
    sizes = ["--decoder-layers", "1", "--decoder-attention-heads", "2", "--decoder-ffn-embed-dim", "32"]
    sizes += [f"--decoder-{name}-dim=16" for name in ("embed", "input", "output")]
    sizes += [f"--adaptive-{part}-{name}" for part in ("input", "softmax") for name in ("cutoff=10,20", "factor=2")]
    preset = presets.PRESETS["paper"]._replace(
        training_command=lambda *a: [*presets.paper_model(*a), *sizes],
        training_lengths=(32,),
        evaluation_lengths=(32, 64),
        sliding=("--stride", "16"),
    )
    monkeypatch.setitem(presets.PRESETS, "paper", preset)
    launch = ("reproduce", "--preset", "paper", "--launch", "--data", corpus, "--methods", "alibi", "--updates", 21)
    main([*map(str, launch), "--seeds", "1", "--output", str(tmp_path / "out"), "--cpu"])
    page = (tmp_path / "out" / "results.md").read_text()
    assert "train_wikitext103.sh" in page
    assert "(perplexity-32.png)" in page
    assert "alibi, trained on 32, non-overlapping, valid: another size (" in page.partition("## Beside the paper")[2]
    state = torch.load(tmp_path / "out" / "alibi-32" / "checkpoint_last.pt")
    assert state["cfg"]["optimizer"]["_name"] == "nag"
    assert state["last_optimizer_state"] is not None
    assert state["optimizer_history"][-1]["num_updates"] == 21


def test_order_is_compared_with_the_papers():
    def models(**perplexities):
        return [SimpleNamespace(label=name, perplexity={64: value}) for name, value in perplexities.items()]

    same = comparison_page.compare_with_paper(models(sinusoidal=9.0, alibi=1.0, none=2.0, t5=3.0), 64)
    assert "alibi, none, t5, sinusoidal (best first)" in same
    assert same.endswith("as in the paper.")
    assert "**not as in the paper**, where it is alibi, sinusoidal" in comparison_page.compare_with_paper(
        models(sinusoidal=1.0, alibi=2.0), 64
    )


def test_training_that_was_stopped_is_not_done(small, tmp_path, monkeypatch):
    """SIGTERM ends it with status 0, as if it were."""
    monkeypatch.setattr(comparison.CommandRunner, "run", lambda *_: {})
    monkeypatch.setattr(comparison, "count_updates", lambda _: 40)
    line = fails("--output", tmp_path / "out", "--methods", "alibi")
    assert "training was stopped after 40 updates; start this again" in line
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize("held", ["out", "out/alibi-16/checkpoint_last.pt"])
def test_a_second_run_into_the_same_folder_is_refused(small, tmp_path, monkeypatch, held):
    """Of the folder, or of a training whose own `reproduce` was killed."""
    monkeypatch.setattr(comparison.CommandRunner, "run", lambda *_: pytest.fail("another process does it"))
    code = "import sys, pathlib; from fairseq_alibi.files.locks import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / held)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT) as first:
        first.stdout.readline()
        line = fails("--output", tmp_path / "out", "--methods", "alibi")
    assert f"{held} is being written by process {first.pid}: wait" in line
