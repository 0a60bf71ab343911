"""scripts/setup.sh: nothing to do ends at once; what is missing is named in one line, with the remedy."""

import os
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


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.8", "3.14"])
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


def test_second_run_calls_neither_pip_nor_network(tmp_path):
    """With a stand-in for the environment that writes down what pip is asked for."""
    calls = tmp_path / "calls"
    stub = tmp_path / "stub"
    stub.write_text(f'#!/bin/bash\necho "$*" >>{calls}\n')
    stub.chmod(0o755)
    python = tmp_path / "python3"
    python.write_text(
        f"""#!/bin/bash
[ "$2" = venv ] || exec {sys.executable} "$@"
mkdir -p "$4/bin" && cp {stub} "$4/bin/python" && cp {stub} "$4/bin/fairseq-alibi"
"""
    )
    python.chmod(0o755)
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
