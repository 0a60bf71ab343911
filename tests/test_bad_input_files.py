"""Bad input of the commands that write checkpoints, and files that would run code: one line names it, nothing is lost.

Every case runs in one folder of files good and bad; it has to look afterwards as it did before.
"""

import ast
import re
import shutil

import pytest
import torch
from bad_input import check, full_disk
from conftest import ROOT
from fairseq_cli import eval_lm as fairseqs_eval_lm
from fairseq_cli import train

pytestmark = pytest.mark.usefixtures("inside_given")


#: What is run, with what it has to say. The status is 1, or stands before that: 2 where argparse refuses the command.
TABLE = {
    # Files that are none, or of another kind
    "import-checkpoint nowhere.pt out.pt": "there is no checkpoint nowhere.pt",
    "import-checkpoint text.pt out.pt": "text.pt is no fairseq checkpoint",
    "import-checkpoint good.pt out.pt": "good.pt cannot be imported: .* only a transformer_lm",
    "import-checkpoint twisted.pt out.pt": "twisted.pt cannot be imported: .* not known: alibi_twist",
    "import-checkpoint no-weights.pt out.pt": "no-weights.pt cannot be imported: it holds no table of token embeddings",
    "import-checkpoint more-weights.pt out.pt": "more-weights.pt cannot be imported: .*decoder.twist",
    "import-checkpoint less-weights.pt out.pt": "less-weights.pt cannot be imported: .*decoder.layers.0.fc1.weight",
    "import-checkpoint transformer.pt out.pt --dict nowhere": "there is no dictionary nowhere: name",
    "import-checkpoint transformer.pt out.pt --dict dict-twice/dict.txt": "dict-twice/dict.txt is no dictionary",
    "import-checkpoint transformer.pt out.pt --dict dict-few/dict.txt": "48 types, but the dictionary has 13",
    # Destinations that hold something, or can hold nothing
    "import-checkpoint good.pt taken/thesis.tex": "taken/thesis.tex exists: pass --overwrite",
    "import-checkpoint transformer.pt file/out.pt": "file/out.pt cannot be written",
    "export-hf good.pt file/out --data data": "file/out cannot be written",
    "import-checkpoint transformer.pt folder.pt --overwrite": "folder.pt cannot be written",
    # Numbers and names that are wrong
    "doctor everything": (2, "unrecognized arguments: everything"),
    "cure": (2, "invalid choice: 'cure'"),
    # What would run code
    "import-checkpoint malicious-old.pt out.pt": "malicious-old.pt is refused, as it could run code: .*system; get",
    "export-hf malicious.pt out": "malicious.pt is refused, as it could run code: .*system; get",
}


@pytest.mark.parametrize("command", TABLE)
def test_bad_input_is_named_in_one_line_and_nothing_is_lost(given, command, capsys):
    check(capsys, given, command, TABLE[command])


#: Commands that need more room than there is, with the file that they cannot write.
FULL = {
    "import-checkpoint transformer.pt out.pt": "out.pt cannot be written",
    "import-checkpoint transformer.pt transformer.pt --overwrite": "transformer.pt cannot be written",
    "export-hf good.pt out --data data": "out cannot be written .*(large|space)",
}


@pytest.mark.parametrize("command", FULL)
def test_a_full_disk_is_named_and_loses_nothing(given, command, capsys):
    with full_disk():
        check(capsys, given, command, FULL[command])


@pytest.mark.parametrize("name", ["malicious.pt", "malicious-old.pt"])
@pytest.mark.parametrize("command", ["train", "eval-lm"])
def test_fairseqs_commands_with_the_plugin_run_no_code(given, tmp_path, monkeypatch, name, command):
    arguments = ["data", "--user-dir", str(ROOT / "fairseq_alibi"), "--cpu"]
    if command == "train":
        shutil.copy(name, tmp_path / "checkpoint_last.pt")
        arguments += ["--task", "language_modeling", "--arch", "alibi_lm_tiny", "--save-dir", str(tmp_path)]
        arguments += ["--tokens-per-sample", "32", "--max-tokens", "256", "--optimizer", "adam", "--max-update", "1"]
    else:
        arguments += ["--path", name]
    monkeypatch.setattr("sys.argv", ["fairseq", *arguments])
    with pytest.raises((Exception, SystemExit), match=r"posix\.system"):
        (train if command == "train" else fairseqs_eval_lm).cli_main()
    assert not (given / "owned").exists()


def test_what_is_malicious_would_run_code(given, tmp_path, monkeypatch):
    """Else the tests above would prove nothing."""
    monkeypatch.chdir(tmp_path)
    for name in ("malicious.pt", "malicious-old.pt"):
        torch.load(given / name, weights_only=False)
        (tmp_path / "owned").unlink()


def test_nothing_in_this_package_evaluates_text_or_loads_without_the_safe_loader():
    """Names and attributes in its source; commands read a checkpoint by `checkpoints.read_checkpoint` alone."""
    for path in (ROOT / "fairseq_alibi").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "compile", "os.system", "os.popen"}, (path, name)
                assert not re.search(r"(^|\.)(unsafe_load|full_load)$|^yaml\.load$|^(marshal|shelve)\.", name), (
                    path,
                    name,
                )
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert not given.keys() & {"shell", "allow_pickle"}, (path, name)
                assert given.get("weights_only") == ("True" if name == "torch.load" else None), (path, name)
                if name.endswith("load_checkpoint_to_cpu"):
                    assert path.name == "checkpoints.py"
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not {"pickle", "marshal", "shelve", "dill", "cloudpickle"} & set(names), path
