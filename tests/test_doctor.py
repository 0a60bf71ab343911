"""`fairseq-alibi doctor`: all parts are tried, what does not work is named, with the first thing to fix."""

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import types
from collections import namedtuple

import pytest
from conftest import ROOT, run

from fairseq_alibi.__main__ import main
from fairseq_alibi.commands import doctor
from fairseq_alibi.commands.doctor import PARTS


def rows(capsys):
    """What is printed of each part, by its name, and the last line."""
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    return {line[:16].strip(): line[16:] for line in lines if line[16:]}, lines[-1]


@pytest.mark.slow
def test_here_everything_required_works(capsys):
    main(["doctor"])
    found, last = rows(capsys)
    assert found.keys() >= {part.name for part in PARTS}
    assert not [part.name for part in PARTS if part.needed_for is None and "BROKEN" in found[part.name]]
    assert found["Python"].startswith(sys.version.split()[0])
    assert found["fairseq"] == "0.12.2"
    assert found["alibi_lm"] == "registered; attention with and without a mask agree"
    assert last == "nothing to fix" or last.startswith("fix first: ")


def test_an_optional_part_that_is_missing_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    monkeypatch.setattr(doctor, "PARTS", [part for part in PARTS if part.name in ("tqdm", "text", "disk")])
    main(["doctor"])
    found, last = rows(capsys)
    assert found["text"].startswith("BROKEN, needed for scripts/prepare_text.sh: ")
    assert "sacremoses" in found["text"]
    assert last == "fix first: text, with: bash scripts/setup.sh"


def test_transformers_is_no_fault_where_it_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor, "PARTS", [part for part in PARTS if part.name == "transformers"])
    main(["doctor"])
    found, last = rows(capsys)
    assert found["transformers"].startswith("not installed; only fairseq-alibi export-hf needs it (")
    assert last == "nothing to fix"


def test_the_first_required_part_comes_first_and_is_the_status(capsys, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2**20))
    monkeypatch.setitem(sys.modules, "hydra", None)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    some = [part for part in PARTS if part.name in ("hydra-core", "tqdm", "disk")]
    monkeypatch.setattr(doctor, "PARTS", some[::-1])
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert stopped.value.code == "fairseq-alibi doctor: fix first: tqdm, with: bash scripts/setup.sh"
    found, _ = rows(capsys)
    assert found["disk"] == "BROKEN, needed for scripts/prepare_wikitext103.sh: 0.0 GiB free here"
    assert found["hydra-core"].startswith("BROKEN, needed for everything: ")


def test_attention_that_disagrees_is_broken(capsys, monkeypatch):
    from fairseq_alibi.core import attention

    tiled = next(kernel for kernel in attention.KERNELS if kernel.name == "tiled")
    wrong = tiled._replace(run=lambda q, *rest: q, tried=False)  # a wrong kernel that is tried does not run
    monkeypatch.setattr(attention, "KERNELS", [wrong if kernel is tiled else kernel for kernel in attention.KERNELS])
    monkeypatch.setattr(doctor, "PARTS", [part for part in PARTS if part.name == "alibi_lm"])
    with pytest.raises(SystemExit, match="fix first: alibi_lm"):
        main(["doctor"])


def test_it_runs_where_torch_is_broken_and_the_other_commands_name_it(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: cannot open\\nshared object')")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run(sys.executable, "-m", "fairseq_alibi", "doctor", check=False, PYTHONPATH=path)
    assert done.returncode == 1
    assert "Traceback" not in done.output
    assert "\ntorch           BROKEN, needed for everything: libtorch.so: cannot open shared object\n" in done.output
    assert done.output.splitlines()[-1] == "fairseq-alibi doctor: fix first: torch, with: bash scripts/setup.sh"
    done = run(sys.executable, "-m", "fairseq_alibi", "plan", "x", check=False, PYTHONPATH=path)
    assert done.returncode == 1
    assert "Traceback" not in done.output
    assert done.output.splitlines()[-1].endswith("see what to fix first: fairseq-alibi doctor")


def test_a_version_that_is_too_old_is_named(monkeypatch):
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.6.0" if name == "torch" else version(name))
    with pytest.raises(RuntimeError, match=r"torch 2\.6\.0 is installed, but >=2\.7 is needed"):
        doctor.check_versions()


def test_a_command_that_cannot_start_is_named(tmp_path, monkeypatch):
    """As in a folder that was moved: the interpreter of the script is gone."""
    for name in ("fairseq-alibi", "fairseq-eval-lm", "fairseq-generate", "fairseq-preprocess", "fairseq-train"):
        script = tmp_path / name
        first = {"fairseq-train": "#!/gone/python", "fairseq-generate": "#!/bin/sh\nexit 1"}.get(name, "#!/bin/sh")
        script.write_text(f"{first}\n")
        script.chmod(0o755)
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(RuntimeError, match=r"^fairseq-train, fairseq-generate --help fails$"):
        doctor.check_commands()
    monkeypatch.setenv("PATH", "")
    (tmp_path / "fairseq-generate").unlink()
    with pytest.raises(RuntimeError, match="fairseq-generate is not installed"):
        doctor.check_commands()


@pytest.mark.parametrize(
    ("prefix", "installer", "command"),
    [
        ("/home/me/.local/share/pipx/venvs/fairseq-alibi", "pip", "pipx runpip fairseq-alibi"),
        ("/home/me/env", "uv", "uv pip"),
        ("/home/me/env", "pip", f"{sys.executable} -m pip"),
    ],
)
def test_advice_fits_how_the_package_was_installed(monkeypatch, prefix, installer, command):
    monkeypatch.setattr(sys, "prefix", prefix)
    found = types.SimpleNamespace(read_text=lambda name: installer)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    assert doctor.pip_command() == command


@pytest.mark.parametrize("option", [["--output", "results"], ["--overwrite"]])
def test_options_of_gpu_are_not_ignored_without_it(option):
    with pytest.raises(SystemExit, match="--output and --overwrite are for --gpu"):
        main(["doctor", *option])
