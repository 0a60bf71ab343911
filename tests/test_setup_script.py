"""scripts/setup.sh: nothing to do ends at once; what is missing is named in one line, with the remedy."""

import fcntl
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run

SETUP = ROOT / "scripts" / "setup.sh"


def fake_python(folder, version="3.11", missing=""):
    """A python3 that reports another version, or that lacks a module."""
    path = folder / "fake-python3"
    path.write_text(
        f"""#!/bin/bash
case "$*" in
  *version_info*) echo {version} ;;
  *"{missing or "nothing of the kind"}"*) exit 1 ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
    )
    path.chmod(0o755)
    return path


def setup(tmp_path, **environment):
    environment = {"VENV": str(tmp_path / "venv"), "PYTHON": sys.executable, **environment}
    done = run("bash", SETUP, check=False, **environment)
    return done.returncode, done.output.strip().splitlines()


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.8", "3.15"])
def test_wrong_python(tmp_path, version):
    status, lines = setup(tmp_path, PYTHON=str(fake_python(tmp_path, version)))
    assert status == 1
    assert len(lines) == 1
    assert version in lines[0]
    assert "PYTHON=" in lines[0]


def test_no_python(tmp_path):
    status, lines = setup(tmp_path, PYTHON="no-such-python")
    assert (status, len(lines)) == (1, 1)
    assert "no-such-python not found" in lines[0]


@pytest.mark.parametrize(
    ("missing", "remedy"), [("import venv", "python3.11-venv"), ("Python.h", "python3.11-dev")], ids=["venv", "headers"]
)
def test_incomplete_python(tmp_path, missing, remedy):
    status, lines = setup(tmp_path, PYTHON=str(fake_python(tmp_path, missing=missing)))
    assert (status, len(lines)) == (1, 1)
    assert remedy in lines[0]


def test_no_compiler(tmp_path):
    status, lines = setup(tmp_path, CXX="no-such-compiler")
    assert (status, len(lines)) == (1, 1)
    assert "build-essential" in lines[0]


def test_no_network(tmp_path):
    unreachable = "http://127.0.0.1:9/simple"
    status, lines = setup(
        tmp_path,
        PIP_INDEX_URL=unreachable,
        PIP_CONFIG_FILE=os.devnull,
        PIP_EXTRA_INDEX_URL="",
        PIP_FIND_LINKS="",
        PIP_RETRIES="0",
        PIP_NO_CACHE_DIR="1",
    )
    assert status == 1
    assert "check the network" in lines[-1]
    assert "PIP_INDEX_URL" in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_a_folder_of_the_users_is_left_alone(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "precious").write_text("mine")
    status, lines = setup(tmp_path)
    assert (status, len(lines)) == (1, 1)
    assert "was not made by this script" in lines[0]
    assert (tmp_path / "venv" / "precious").read_text() == "mine"


@pytest.fixture
def stub(tmp_path):
    """A Python whose environments write down what pip is asked for; returns its path and that of the list."""
    calls, python, environment = tmp_path / "calls", tmp_path / "python3", tmp_path / "stub"
    environment.write_text(
        f"""#!/bin/bash
case "$1 $2" in
  "- "* | *sys.version* | *_base_executable*) exec {sys.executable} "$@" ;;
  *) echo "$*" >>{calls} ;;
esac
"""
    )
    python.write_text(
        f"""#!/bin/bash
[ "$2" = venv ] || exec {sys.executable} "$@"
mkdir -p "$3/bin" && cp {environment} "$3/bin/python" && cp -n {environment} "$3/bin/fairseq-alibi"
"""
    )
    for path in (python, environment):
        path.chmod(0o755)
    return python, calls


def test_second_run_calls_neither_pip_nor_network(tmp_path, stub):
    python, calls = stub
    status, lines = setup(tmp_path, PYTHON=str(python))
    assert status == 0, lines
    installs = [line for line in calls.read_text().splitlines() if "pip install" in line]
    fairseq, torch = installs[1:]
    assert fairseq.endswith("--no-deps fairseq==0.12.2"), "before torch, without its own pins"
    assert torch.endswith(f"--editable {ROOT}[test]")
    assert all("--constraint constraints.txt" in line for line in installs)
    calls.unlink()
    status, lines = setup(tmp_path, PYTHON=str(python))
    assert status == 0
    assert "up to date" in lines[0]
    assert not calls.exists()


def test_an_environment_keeps_its_python_unless_another_is_named(tmp_path):
    """Its Python is asked for, here a stand-in that says it was made with 3.8."""
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "fairseq-alibi-setup").write_text("unfinished\n")
    theirs = fake_python(tmp_path, "3.8")
    (tmp_path / "venv" / "bin" / "python").write_text(f"#!/bin/bash\necho {theirs}\n")
    (tmp_path / "venv" / "bin" / "python").chmod(0o755)
    status, lines = setup(tmp_path, PYTHON="")
    assert (status, lines[0].startswith(f"setup: {theirs} is Python 3.8")) == (1, True)
    status, lines = setup(tmp_path, PYTHON="no-such-python")
    assert "no-such-python not found" in lines[0]


def test_a_moved_environment_is_adapted(tmp_path, stub):
    python, _ = stub
    setup(tmp_path, PYTHON=str(python))
    before, now = tmp_path / "venv", tmp_path / "moved"
    (before / "bin" / "torchrun").write_text(f"#!{before}/bin/python\nprint()\n")
    before.rename(now)
    status, lines = setup(tmp_path, PYTHON=str(python), VENV=str(now))
    assert status == 0, lines
    assert f"setup: the environment was made in {before}; its commands are adapted" in lines
    assert (now / "bin" / "torchrun").read_text() == f"#!{now}/bin/python\nprint()\n"
    status, lines = setup(tmp_path, PYTHON=str(python), VENV=str(now))
    assert len(lines) == 1


@pytest.mark.parametrize("left", [[], ["fairseq-alibi-setup"], ["fairseq-alibi-setup", "bin/", "lib/"]], ids=str)
def test_an_interrupted_setup_is_gone_on_with(tmp_path, stub, left):
    venv, (python, _) = tmp_path / "venv", stub
    venv.mkdir()
    for name in left:
        (venv / name).mkdir() if name.endswith("/") else (venv / name).touch()
    packages = venv / "lib" / "python3.11" / "site-packages"
    for name, files in (("whole", ["METADATA", "RECORD"]), ("half", ["METADATA"])):
        (packages / f"{name}.dist-info").mkdir(parents=True)
        for file in files if "lib/" in left else ():
            (packages / f"{name}.dist-info" / file).touch()
    if "lib/" not in left:
        shutil.rmtree(venv / "lib")
    status, lines = setup(tmp_path, PYTHON=str(python))
    assert status == 0, lines
    assert not (packages / "half.dist-info").exists()


def test_a_second_setup_waits_for_the_first(tmp_path, stub):
    python, calls = stub
    setup(tmp_path, PYTHON=str(python))
    stamp = tmp_path / "venv" / "fairseq-alibi-setup"
    with stamp.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("unfinished")
        file.flush()
        calls.unlink()
        environment = {**os.environ, "VENV": str(tmp_path / "venv"), "PYTHON": str(python)}
        second = subprocess.Popen(["bash", SETUP], env=environment, stdout=subprocess.PIPE, text=True)
        assert second.stdout.readline() == "setup: waiting for another setup of this environment\n"
        assert not calls.exists()
    assert second.wait(60) == 0
    assert calls.exists()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    status, lines = setup(tmp_path, VENV=str(tmp_path / "file" / "venv"))
    assert (status, len(lines)) == (1, 1)
    assert "cannot be written: choose another folder with VENV=..." in lines[0]
