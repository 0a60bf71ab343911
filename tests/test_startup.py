"""The startup module: fairseq imports in every process, other dataclasses stay strict, starting imports nothing."""

import re
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, run

needs_startup = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python before 3.11 accepts fairseq as it is")


def python(code, *options):
    return run(sys.executable, "-W", "ignore", *options, "-c", code).output


@needs_startup
def test_other_packages_dataclasses_stay_strict():
    """After fairseq's import too, and even with a class of fairseq's as the default."""
    code = """
import dataclasses, fairseq
from fairseq.dataclass.configs import CommonConfig, FairseqConfig
class Mutable:
    __hash__ = None
for default in (Mutable(), [], CommonConfig()):
    try:
        dataclasses.make_dataclass("Theirs", [("field", object, default)])
    except ValueError as error:
        print("refused:", error)
assert CommonConfig.__hash__ is None
assert FairseqConfig().common == CommonConfig()
"""
    assert python(code).count("refused: mutable default") == 3


@needs_startup
def test_fairseq_imports_in_spawned_processes():
    code = """
import multiprocessing as mp
if __name__ == "__main__":
    context = mp.get_context("spawn")
    with context.Pool(1) as pool:
        print(pool.apply(eval, ("__import__('fairseq').__version__",)))
"""
    assert "0.12.2" in python(code)


@needs_startup
def test_without_it_fairseq_is_refused():
    """Else the module would be dead weight."""
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'fairseq' not in f.__module__]; import fairseq"
    done = run(sys.executable, "-c", code, check=False)
    assert "mutable default <class 'fairseq.dataclass.configs.CommonConfig'>" in done.output


@needs_startup
def test_the_start_of_python_imports_nothing_else():
    code = """
import sys
del sys.modules["fairseq_alibi_startup"]
before = set(sys.modules)
__import__("fairseq_alibi_startup").install()
assert set(sys.modules) - before == {"fairseq_alibi_startup"}
"""
    python(code)
    assert "dataclasses" not in python("import sys; print(*sys.modules)")


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_both_kinds_of_install_put_it_into_site_packages(kind, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "results", "checkpoints"))
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fairseq_alibi_startup.py", "fairseq_alibi_startup.pth"} <= set(names)
    assert ("fairseq_alibi/core/positions.py" in names) == (kind == "wheel")
    assert ("fairseq_alibi/evaluation/paper.json" in names) == (kind == "wheel")
    assert not any(name.startswith("fairseq_alibi/startup") for name in names), "a second copy"


@pytest.mark.slow
def test_works_as_a_user_dir_from_any_folder_once_installed(tmp_path, corpus):
    """`--user-dir fairseq_alibi` finds the package where it lies beside fairseq."""
    import fairseq

    site = tmp_path / "site"
    for package in (Path(fairseq.__file__).parent, ROOT / "fairseq_alibi"):
        shutil.copytree(package, site / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from fairseq_cli.train import cli_main; cli_main()"
    arguments = [corpus, "--user-dir", "fairseq_alibi", "--arch", "alibi_lm_tiny", "--task", "language_modeling"]
    arguments += ["--optimizer", "adam", "--max-update", 1, "--max-tokens", 64, "--tokens-per-sample", 32, "--cpu"]
    output = run(sys.executable, "-c", code, *arguments, "--no-save", cwd=tmp_path).output
    assert "model: AlibiLanguageModel" in output
    assert "num_updates 1" in output


def test_without_fairseq_the_maths_works_and_the_way_to_get_fairseq_is_named():
    code = """
import sys
sys.modules["fairseq"] = None
from fairseq_alibi.core import ALiBi
from fairseq_alibi.core.attention import attend
from fairseq_alibi.core.attention_inputs import AttentionInputs, FoldedMask
from torch import ones
x, mask = ones(1, 2, 2, 8), ALiBi(2).future_mask(2, 2)
masked = attend(x, x, x, AttentionInputs(bias=FoldedMask(mask)))
print(mask.shape, (masked == attend(x, x, x, AttentionInputs())).all(), "torch._dynamo" in sys.modules)
import fairseq_alibi.models
"""
    output = run(sys.executable, "-c", code, check=False).output
    assert "torch.Size([2, 2, 2]) tensor(True) False" in output, "TorchDynamo takes a second to import"
    assert "pip install --no-deps fairseq==0.12.2" in output


def test_tensor_files_import_neither_fairseq_nor_numpy():
    for path in (ROOT / "fairseq_alibi" / "core").glob("*.py"):
        imports = re.findall(r"^(?:from|import) +([.\w]+)", path.read_text(), re.MULTILINE)
        libraries = {name.split(".")[0] for name in imports} - {""}
        assert not libraries & {"fairseq", "numpy", "omegaconf", "hydra"}, path


ORDERS = {"plugin first": "import fairseq_alibi, fairseq", "fairseq first": "import fairseq, fairseq_alibi"}


@pytest.mark.parametrize("order", ORDERS)
def test_models_are_registered_and_patches_applied_in_both_orders(order):
    code = f"""
{ORDERS[order]}
from fairseq import checkpoint_utils
from fairseq.models import MODEL_REGISTRY
print(MODEL_REGISTRY["alibi_lm"].__module__, checkpoint_utils.load_checkpoint.__module__)
"""
    assert "fairseq_alibi.models.language_model fairseq_alibi.patches.restart" in python(code)


@pytest.mark.parametrize("name", ["models.translation", "patches", "patches.restart", "files.checkpoints"])
@pytest.mark.slow
def test_each_module_that_needs_fairseq_can_be_the_first_import(name):
    """The end of fairseq's import imports patches and models, in the midst of that module's own import."""
    code = (
        f"import fairseq_alibi.{name}; from fairseq.models import MODEL_REGISTRY; print('alibi_lm' in MODEL_REGISTRY)"
    )
    assert python(code).strip() == "True"


def test_an_import_without_fairseq_in_use_is_cheap_and_patches_nothing():
    code = """
import sys
before = set(sys.modules)
import fairseq_alibi
print(len(set(sys.modules) - before))
import fairseq_alibi.core.positions, warnings
filters = list(warnings.filters)
assert not any(name.partition(".")[0] == "fairseq" for name in sys.modules)
import numpy
assert not hasattr(numpy, "compat") and warnings.filters == filters
"""
    assert int(python(code)) <= 8


def test_a_search_for_fairseq_alone_registers_nothing():
    """Other libraries look whether fairseq is installed."""
    code = """
import importlib.util, sys, fairseq_alibi
assert importlib.util.find_spec("fairseq") and "fairseq" not in sys.modules
import fairseq.models
print("alibi_lm" in fairseq.models.MODEL_REGISTRY)
"""
    assert python(code).strip() == "True"


@pytest.mark.skipif(sys.version_info < (3, 10), reason="Python 3.9 has no `X | None`")
def test_an_option_of_a_union_with_none_is_one_of_the_other_type():
    """Python 3.14 makes `str | None` of `Optional[str]`."""
    code = """
from typing import List, Optional
from fairseq.dataclass.utils import interpret_dc_type
print(*(interpret_dc_type(kind) for kind in (str | None, None | int, Optional[str], int, List[int] | None, int | str)))
"""
    expected = "<class 'str'> <class 'int'> <class 'str'> <class 'int'> typing.List[int] int | str"
    assert expected in python(code)


#: What Python 3.14 does: it formats the help of an option when the option is added.
STRICT_HELP = """
import argparse
add = argparse._ActionsContainer.add_argument
def add_argument(self, *args, **kwargs):
    action = add(self, *args, **kwargs)
    if hasattr(self, "_check_help") and action.help:
        self._check_help(action)
    return action
def check_help(self, action):
    "%" in action.help
argparse._ActionsContainer.add_argument = add_argument
argparse.ArgumentParser._check_help = check_help
"""


@pytest.mark.parametrize("first", ["import fairseq", "import hydra._internal.utils, fairseq"])
@pytest.mark.slow
def test_hydras_parser_is_built_where_help_is_checked_and_others_stay_checked(first):
    code = f"""{STRICT_HELP}
{first}
from hydra._internal.utils import get_args_parser
print(type(get_args_parser()).__name__)
try:
    argparse.ArgumentParser().add_argument("--x", help=object())
except TypeError as error:
    print("refused:", error)
"""
    assert re.search(r"ArgumentParser\nrefused: .*not (iterable|a container)", python(code))
    without = f"{STRICT_HELP}\nfrom hydra._internal.utils import get_args_parser\nget_args_parser()"
    assert "TypeError" in run(sys.executable, "-c", without, check=False).output, "nothing is repaired without fairseq"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not fork")
@pytest.mark.parametrize(("chosen", "method"), [("", "fork"), ("set_start_method('forkserver')", "forkserver")])
@pytest.mark.slow
def test_processes_are_forked_unless_somebody_chose_otherwise(chosen, method):
    """Python 3.14 starts them from a server, which outlives a run that is killed."""
    code = f"""
import multiprocessing.context as context
context._default_context._default_context = context._concrete_contexts["forkserver"]
from multiprocessing import get_start_method, set_start_method
{chosen}
import fairseq
print(get_start_method())
"""
    assert python(code).endswith(f"{method}\n")
