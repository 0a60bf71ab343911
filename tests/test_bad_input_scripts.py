"""Bad input of the scripts: one line names it, and nothing is lost or half-written.

Every case runs in one folder of files good and bad; it has to look afterwards as it did before.
"""

import re
import shlex

import benchmark
import pytest
import soak
from bad_input import check, full_disk, snapshot
from conftest import ROOT, run

pytestmark = pytest.mark.usefixtures("inside_given")


#: What is run, with what it has to say. The status is 1, or stands before that: 2 where argparse refuses the command.
TABLE = {
    # Files that are none, or of another kind
    "benchmark --checkpoint nowhere.pt --data data": "there is no checkpoint nowhere.pt",
    "benchmark --checkpoint good.pt --data nowhere": "nowhere holds no subset 'train'",
    "benchmark --checkpoint unbiased.pt --data data": "has the position method none: name",
    # Destinations that hold something, or can hold nothing
    "soak data --output file": "file/soak.json cannot be written",
    "benchmark --output taken": "taken/benchmark.json exists: pass --overwrite",
    "benchmark --parts attention --output file": "file/benchmark.json cannot be written",
    # Numbers and names that are wrong
    "benchmark --parts training,speed": (2, "'speed' is no part: choose of"),
    "benchmark --lengths 512 0": (2, "'0' is no such number"),
    "benchmark --repeats x": (2, "'x' is no such number"),
    "benchmark --dtype int8": (2, "invalid choice: 'int8'"),
    "benchmark --checkpoint good.pt --data data --parts evaluation --lengths 99999": "holds 20,813 .*: pass shorter",
    "soak data --minutes 0": "--minutes must be more than 0",
    "soak nowhere": "there is no nowhere/dict.txt",
    # Options that contradict each other
    "benchmark --checkpoint good.pt": "go together: pass both or neither",
    # What would run code
    "benchmark --data data --checkpoint malicious.pt": "malicious.pt is refused, as it could run code: .*system; get",
}

PROGRAMS = {"benchmark": benchmark.main, "soak": soak.main}


@pytest.mark.parametrize("command", TABLE)
def test_bad_input_is_named_in_one_line_and_nothing_is_lost(given, command, capsys):
    check(capsys, given, command, TABLE[command], PROGRAMS)


#: Commands that need more room than there is, with the file that they cannot write.
FULL = {
    "benchmark --parts attention --lengths 8 --repeats 1 --output .": "benchmark.(json|md) cannot be written",
}


@pytest.mark.parametrize("command", FULL)
def test_a_full_disk_is_named_and_loses_nothing(given, command, capsys):
    with full_disk():
        check(capsys, given, command, FULL[command], PROGRAMS)


#: Arguments of a script, with the status and what it has to say before any Python starts.
SCRIPTS = {
    **{
        f"train_wikitext103.sh {arguments}": (2, "usage: .* for example: ")
        for arguments in ("", "data", "data save x12", "data save 0", "data save -1", "data save 1.5")
    },
    "train_wikitext103.sh nowhere save 512": (1, "nowhere holds no dict.txt: make it with"),
    "quickstart.sh --data": (2, "--data needs a value"),
    "quickstart.sh --speed 9": (2, "'--speed' is no option: --data DIR"),
    "quickstart.sh --updates 0": (2, "'0' is no length or number of updates: pass whole numbers"),
    "quickstart.sh --lengths '128 many'": (2, "'many' is no length"),
    "quickstart.sh --lengths ''": (2, "'none' is no length"),
    "quickstart.sh --train-length ''": (2, "'none' is no length"),
    "quickstart.sh --data nowhere": (1, "nowhere holds no dict.txt: make it with"),
    "sweep_lengths.sh data good.pt --output": (2, "--output needs a value"),
}


@pytest.mark.parametrize("command", SCRIPTS)
def test_scripts_name_bad_input_in_one_line(given, command):
    status, message = SCRIPTS[command]
    script, *arguments = shlex.split(command)
    before = snapshot(given)
    done = run("bash", ROOT / "scripts" / script, *arguments, cwd=given, check=False)
    assert (done.returncode, len(done.output.splitlines())) == (status, 1), done.output
    assert re.search(message, done.output), done.output
    assert snapshot(given) == before


@pytest.mark.parametrize("script", ["benchmark", "generate", "reproduce", "sweep_lengths", "train_wikitext103"])
def test_scripts_without_an_environment_name_setup(given, script):
    nowhere = {"PATH": "/usr/bin:/bin", "VENV": str(given / "nowhere")}
    done = run("bash", ROOT / "scripts" / f"{script}.sh", "data", "save", 64, cwd=given, check=False, **nowhere)
    assert done.returncode == 1
    assert re.fullmatch(r".* not found: run 'bash .*/scripts/setup.sh' first.*\n", done.output)
