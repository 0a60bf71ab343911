"""Bad input of evaluate, generate, eval_lm, report and show-bias: one line names it, and nothing is lost.

Every case runs in one folder of files good and bad; it has to look afterwards as it did before.
"""

import os
import shlex

import pytest
from bad_input import CODE, check, full_disk
from conftest import failure

from fairseq_alibi.__main__ import main
from fairseq_alibi.evaluation import checkpoint_evaluation

pytestmark = pytest.mark.usefixtures("inside_given")


#: What is run, with what it has to say. The status is 1, or stands before that: 2 where argparse refuses the command.
TABLE = {
    # Files that are none, or of another kind
    "evaluate nowhere good.pt": "there is no nowhere/dict.txt: name the data folder",
    "evaluate 'line\nbreak' good.pt": r"there is no line\\nbreak/dict.txt",
    "evaluate data nowhere.pt": "there is no checkpoint nowhere.pt: name",
    "evaluate data folder.pt": "there is no checkpoint folder.pt: name",
    "evaluate data text.pt": "text.pt is no fairseq checkpoint",
    "evaluate data empty.pt": "empty.pt is no fairseq checkpoint",
    "evaluate data cut.pt": "cut.pt is no fairseq checkpoint",
    "evaluate data list.pt": "list.pt is no fairseq checkpoint",
    "evaluate data weights.pt": "weights.pt is no fairseq checkpoint",
    "evaluate data script.pt": "script.pt is no fairseq checkpoint",
    "evaluate data shape.pt": "shape.pt cannot be loaded: .*fc1.bias",
    "evaluate data nan.pt": "length 32, stride 32: a loss is nan; the model has diverged",
    "evaluate data translation.pt": "was trained for 'translation', not for language_modeling",
    "generate data nowhere.pt x": "there is no checkpoint nowhere.pt",
    "generate data text.pt x": "text.pt is no fairseq checkpoint",
    "generate nowhere good.pt x": "there is no nowhere/dict.txt",
    "generate data translation.pt x": "was trained for 'translation'",
    "eval-lm nonoverlapping data nowhere.pt 64": "there is no checkpoint nowhere.pt",
    "eval-lm nonoverlapping data text.pt 64": "text.pt is no fairseq checkpoint",
    "eval-lm nonoverlapping nowhere good.pt 64": "there is no nowhere/dict.txt",
    "eval-lm nonoverlapping data nan.pt 64 -- --cpu": "at length 64 is nan: the model has diverged",
    "eval-lm nonoverlapping data translation.pt 64": "was trained for 'translation'",
    # Data folders with something missing, broken or of another preparation
    "evaluate dict-none good.pt": "there is no dict-none/dict.txt",
    "evaluate dict-no-counts good.pt": "dict-no-counts/dict.txt is no dictionary",
    "evaluate dict-binary good.pt": "dict-binary/dict.txt is no dictionary",
    "evaluate dict-twice good.pt": "dict-twice/dict.txt is no dictionary .*Duplicate",
    "evaluate dict-more good.pt": "was trained with 48 types, but dict-more/dict.txt has 56: name",
    "evaluate dict-other good.pt": "type 24 is 'wordX', in .* 'word7'; name the data folder",
    "evaluate dict-few good.pt": "are not of one preparation, prepare the folder anew",
    "evaluate bin-none good.pt": "valid.bin is missing or empty: prepare the folder anew",
    "evaluate bin-empty good.pt": "valid.bin is missing or empty: prepare the folder anew",
    "evaluate bin-short good.pt": "valid.bin does not hold the 686 tokens of its .idx: prepare",
    "evaluate idx-empty good.pt": "valid.idx is cut short: prepare the folder anew",
    "evaluate idx-head good.pt": "valid.idx is cut short: prepare the folder anew",
    "evaluate idx-short good.pt": "valid.idx is cut short: prepare the folder anew",
    "evaluate idx-text good.pt": "valid.bin and .idx cannot be read .*: prepare the folder anew",
    "evaluate idx-of-train good.pt": "does not hold the 20,813 tokens of its .idx: prepare",
    "evaluate prepared-broken good.pt": "prepared-broken/prepared.json cannot be read .*: prepare",
    "evaluate prepared-other good.pt": "prepared-other/prepared.json cannot be read .*: prepare",
    "generate dict-more good.pt x": "was trained with 48 types, but dict-more/dict.txt has 56",
    "generate prepared-other good.pt x": "prepared-other/prepared.json cannot be read",
    "eval-lm nonoverlapping bin-short good.pt 64": "valid.bin does not hold the 686 tokens",
    "eval-lm nonoverlapping idx-text good.pt 64": "valid.bin and .idx cannot be read",
    "eval-lm nonoverlapping dict-none good.pt 64": "there is no dict-none/dict.txt",
    "eval-lm nonoverlapping dict-more good.pt 64": "was trained with 48 types, but dict-more/dict.txt has 56",
    # Results that are none
    "report nowhere.json": "nowhere.json cannot be read .*: name JSON files",
    "report folder.pt": "folder.pt cannot be read .*: name JSON files",
    **{
        f"report {name}.json": f"{name}.json is no result of an evaluation .*: name one of their JSON files"
        for name in (
            *("cut", "binary", "deep", "list", "no-model", "no-checkpoint", "length-text", "length-0"),
            *("perplexity-none", "perplexity-nan", "bins-text", "training-text", "updates-text"),
        )
    },
    "report no-results.json": "no result in no-results.json: the evaluation ended before its first length",
    # Texts and archives that are none
    "generate data good.pt x --bpe subword_nmt --bpe-codes binary.txt": "--bpe-codes binary.txt cannot be used",
    "generate data good.pt x --bpe subword_nmt --bpe-codes latin1.txt": "--bpe-codes latin1.txt cannot be used",
    "generate data good.pt x --bpe subword_nmt --bpe-codes folder.pt": "there are no codes folder.pt, name them",
    "generate data good.pt x --bpe subword_nmt": "there are no codes data/bpe.codes, name them with --bpe-codes",
    # Destinations that hold something, or can hold nothing
    "evaluate data good.pt --output file": "file/given0_good_valid.json cannot be written .*: .*name another place",
    "evaluate data good.pt --output file/out": "file/out/given0_good_valid.json cannot be written",
    "evaluate data good.pt --output taken": "given0_good_valid.json exists and is of another evaluation .*--overwrite",
    "evaluate data good.pt --save-token-losses taken.npz": "taken.npz exists and holds something else.*: .*--overwrite",
    "evaluate data good.pt --save-token-losses cut.npz": "cut.npz exists and holds something else",
    "evaluate data good.pt --save-token-losses empty.npz": "empty.npz exists and holds something else",
    "evaluate data good.pt --save-token-losses malicious.npz": "malicious.npz exists and holds something else",
    "evaluate data good.pt --save-token-losses file/l.npz": "file/l.npz cannot be written",
    "evaluate data good.pt good.pt --output out": "would both be written to out/given0_good_valid.json: drop",
    "eval-lm nonoverlapping data good.pt 64 --output good.json": "good.json exists: pass --overwrite",
    "eval-lm nonoverlapping data good.pt 64 --output file/x.json": "file/x.json cannot be written",
    "eval-lm nonoverlapping data good.pt 64 --output folder.pt --overwrite": "folder.pt cannot be written",
    "report good.json --output taken": "taken/report.md exists: pass --overwrite",
    "report good.json --output file": "file/report.png cannot be written",
    "show-bias --output file": "file exists: pass --overwrite",
    "show-bias --output file/bias.png": "file/bias.png cannot be written",
    # Numbers and names that are wrong
    "evaluate data good.pt --lengths 64,0": (2, "'0' is no such number: pass a whole number of at least 1"),
    "evaluate data good.pt --lengths many": (2, "'many' is no such number"),
    "evaluate data good.pt --lengths ''": (2, "'' is no such number"),
    "evaluate data good.pt --lengths=--": (2, "argument --lengths: '--' is no value"),
    "evaluate data short.pt --lengths 999999999999": "is longer than the model's longest sequence",
    "evaluate data good.pt --lengths 9999999999999": (2, "'9999999999999' is too large: pass a number of at most 12"),
    f"evaluate data good.pt --lengths {'9' * 6000}": (2, "9\\.\\.\\.' is too large"),
    "evaluate data good.pt --stride 10000000000000000000000000": (2, "is too large"),
    "evaluate data good.pt --stride-fraction 1e-99999999": (2, "'1e-99999999' is no share of the length"),
    "evaluate data good.pt --stride-fraction 1e99999999": (2, "is no share of the length"),
    f"evaluate data good.pt --stride-fraction 1/{'9' * 6000}": (2, "9\\.\\.\\.' is no share of the length"),
    "evaluate data good.pt --max-tokens 10000000000000000000000000": (2, "is too large"),
    """evaluate data good.pt --model-overrides "{'decoder_layers': 1000000}" """: "decoder_layers 1000000 does not fit",
    """evaluate data good.pt --model-overrides "{'decoder_embed_dim': 10000000000}" """: "does not fit the weights",
    """evaluate data good.pt --model-overrides "{'decoder_attention_heads': 999999999}" """: "does not fit the weights",
    """evaluate data good.pt --model-overrides "{'tokens_per_sample': 'x'}" """: "tokens_per_sample 'x': pass a whole",
    """evaluate data good.pt --model-overrides "{'dropout': 'x'}" """: "dropout 'x': pass a value as 0.1 is",
    """evaluate data good.pt --model-overrides "{'decoder_normalize_before': 'no'}" """: "before 'no': pass a value as",
    """evaluate data good.pt --model-overrides "{5: 1}" """: (2, "is no dictionary: pass one as"),
    """evaluate data good.pt --model-overrides "{[]: 1}" """: (2, "is no dictionary: pass one as"),
    f"evaluate data good.pt --model-overrides {'[' * 100_000}": (2, "is no dictionary: pass one as"),
    "evaluate data /dev/zero": "there is no checkpoint /dev/zero",
    "evaluate data good.pt --save-token-losses pipe.npz": "pipe.npz cannot be written .it is a device or a pipe",
    "evaluate data good.pt --tensorboard-logdir file/log": "file/log/.* cannot be written",
    "eval-lm nonoverlapping data good.pt 10000000000000000000000000": (2, "is too large"),
    "eval-lm nonoverlapping data good.pt 32 --output /dev/null --overwrite": "/dev/null cannot be written .it is a dev",
    "eval-lm nonoverlapping data good.pt 32 -- --model-overrides [[[": "is no dictionary: pass one as",
    "report pipe.npz": "pipe.npz cannot be read .it is no file.: name JSON files",
    "report good.json --output circle": "circle/report.png cannot be written",
    "report /dev/zero": "/dev/zero cannot be read .it is no file.",
    "generate data good.pt x --tokens 10000000000000000000000000": "--tokens 1.*: pass a whole number of at most",
    "generate data good.pt x --tokens 10000000 --beam 1000": "the keys and values of 1,000 texts of 10,000,.* take",
    "generate data good.pt x --beam 10000000000000000000000000": "--beam 1.*: pass a whole number of at most",
    "generate data good.pt x --beam 2 --lenpen 1e308 --tokens 3": "generation failed: ",
    "show-bias --heads 1000000000 --output x.png": "1,000,000,000 heads of 32 tokens take too much memory",
    "show-bias --heads 10000000000000000000000000 --output x.png": (2, "is too large"),
    "show-bias --max-bias nan --output x.png": "--max-bias nan: pass a number above 0",
    "show-bias --output x": "--output x: give the picture's name a suffix, as in x.png",
    "show-bias --output /dev/null --overwrite": "/dev/null: give",
    "evaluate data good.pt --stride-fraction 1.5": (2, "'1.5' is no share of the length: pass"),
    "evaluate data good.pt --stride-fraction 1/0": (2, "'1/0' is no share of the length"),
    "evaluate data good.pt --max-tokens 0": (2, "'0' is no such number"),
    "evaluate data good.pt --dtype int8": (2, "invalid choice: 'int8'"),
    "evaluate data good.pt --subset dev": "data holds no subset 'dev' \\(it holds test, train, valid\\): pass --subset",
    "evaluate data good.pt --subset ''": "data holds no subset ''",
    "evaluate data good.pt --remove-bpe ''": "--remove-bpe '': pass the marker",
    "evaluate data good.pt --save-token-losses l.txt": "l.txt: the file's name has to end in .npz",
    """evaluate data good.pt --model-overrides "{'atention': 'mask'}" """: "has no option 'atention' to override",
    """evaluate data good.pt --model-overrides "{'attention': 'fast'}" """: "--attention fast: choose one of auto",
    """evaluate data good.pt --model-overrides "{'decoder_layers': 9}" """: "decoder_layers 9 does not fit the weights",
    "evaluate data good.pt --model-overrides [1]": (2, "'\\[1\\]' is no dictionary: pass one as"),
    "generate data good.pt x --tokens 0": "--tokens 0: pass a whole number of at least 1",
    "generate data good.pt x --beam 0": "--beam 0: pass a whole number",
    "generate data good.pt x --seed -1": "--seed -1: pass a whole number",
    "generate data good.pt x --seed 9223372036854775808": "--seed 9223372036854775808: pass a whole number below",
    "generate data good.pt x --temperature 0": "--temperature 0.0: pass a number above 0",
    "generate data good.pt x --temperature nan": "--temperature nan: pass a number above 0",
    "generate data good.pt x --lenpen nan": "--lenpen nan: pass a number",
    "generate data good.pt x --sampling-topk 0": "--sampling-topk 0: pass",
    "generate data good.pt x --sampling-topk 1000": "--sampling-topk 1000: the dictionary has 48 types only",
    "generate data good.pt x --sampling-topp 1.5": "--sampling-topp 1.5: pass a probability",
    "generate data good.pt x --no-repeat-ngram-size 1": "--no-repeat-ngram-size 1: .*pass 0",
    "generate data good.pt x --length-scale soon": "must be a positive number or auto, not soon",
    "generate data short.pt x --tokens 16": "longest sequence of 16: shorten them",
    "generate data good.pt": "no prompt: pass one, or text on standard input",
    "eval-lm nonoverlapping data good.pt 0": (2, "'0' is no such number"),
    "eval-lm nonoverlapping data good.pt many": (2, "'many' is no such number"),
    "eval-lm nonoverlapping data good.pt": (2, "required: LENGTH"),
    "eval-lm nonoverlapping data good.pt 64 --subset dev": "no subset 'dev'",
    "eval-lm nonoverlapping data good.pt 64 -- --nonsense": "it refuses its arguments",
    "evaluate data good.pt --subset ../data/valid": (2, "'../data/valid' is a path: pass the name of a subset"),
    "eval-lm nonoverlapping data good.pt 64 --subset ../x": (2, "'../x' is a path"),
    "show-bias --heads 0": (2, "'0' is no such number"),
    "show-bias --length 99999": "--length 99,999 has more cells",
    # Options that contradict each other
    "evaluate data good.pt --lengths 64 --stride 65": "stride 65 is longer than the length 64 and would skip tokens",
    "evaluate data good.pt --stride 5 --streaming": (2, "not allowed with argument --stride"),
    "evaluate data good.pt --streaming --by-position": "a stream has no windows.*; drop one of the two",
    "evaluate data good.pt good.pt --save-token-losses l.npz": "evaluate one at a time",
    "generate data good.pt x --sampling-topp 0.5 --sampling-topk 2": "exclude each other: drop one",
    "generate data good.pt x --sampling-topk 2 --beam 2": "contradicts beam search: drop --beam",
    "eval-lm sliding data good.pt 64 65": "stride 65 is longer than the window of 64",
    "eval-lm nonoverlapping data good.pt 64 -- --num-workers 2": "--num-workers decides what is scored .*: drop it",
    "eval-lm nonoverlapping data good.pt 64 -- --num-shards=2": "--num-shards=2 decides what is scored",
    "eval-lm nonoverlapping data good.pt 64 -- --max-tokens 2": "--max-tokens decides what is scored",
    # What would run code
    f"evaluate data good.pt --model-overrides {shlex.quote(CODE)}": (2, "is no dictionary: pass one as"),
    f"eval-lm nonoverlapping data good.pt 64 -- --cpu --model-overrides {shlex.quote(CODE)}": "is no dictionary: pass",
    # What would run code
    **{
        f"{command} {name}.pt {rest}": f"{name}.pt is refused, as it could run code: it calls [a-z]+.system; get"
        for command, name, rest in (
            *(("evaluate data", f"malicious{kind}", "") for kind in ("", "-old", "-4", "-raw")),
            ("generate data", "malicious", "x"),
            ("eval-lm nonoverlapping data", "malicious", "64"),
        )
    },
}


@pytest.mark.parametrize("command", TABLE)
def test_bad_input_is_named_in_one_line_and_nothing_is_lost(given, command, capsys):
    check(capsys, given, command, TABLE[command])


#: Commands that need more room than there is, with the file that they cannot write.
FULL = {
    "evaluate data good.pt --lengths 32": "good_valid.json cannot be written",
    "evaluate data good.pt --lengths 32 --overwrite --save-token-losses taken.npz": "taken.npz cannot be written",
    "eval-lm nonoverlapping data good.pt 32 --output good.json --overwrite -- --cpu": "good.json cannot be written",
    "report good.json --output .": "report.png cannot be written",
    "report good.json --output taken --overwrite": "report.png cannot be written",
}


@pytest.mark.parametrize("command", FULL)
def test_a_full_disk_is_named_and_loses_nothing(given, command, capsys):
    with full_disk():
        check(capsys, given, command, FULL[command])


def test_an_output_that_cannot_be_written_is_named_before_the_work(given, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint_evaluation, "evaluate_model", lambda *_: pytest.fail("that is the work"))
    line = failure(capsys, main, "evaluate", "data", "good.pt", "--output", "/proc", "--cpu", status=1)
    assert "/proc/given0_good_valid.json cannot be written" in line


@pytest.mark.parametrize("command", [command for command in TABLE if "malicious" in command])
def test_the_environment_cannot_make_our_commands_run_code(given, command, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    check(capsys, given, command, TABLE[command])
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1", "for what else runs in this process"


def test_results_that_are_too_deep_are_something_else(given, capsys, tmp_path):
    output = tmp_path / f"{given.name}_good_valid.json"
    output.write_text("[" * 100_000)
    line = failure(capsys, main, "evaluate", "data", "good.pt", "--output", tmp_path, "--cpu", status=1)
    assert "is of another evaluation" in line


def test_text_without_an_end_is_refused(given, capsys, monkeypatch):
    with open("/dev/zero") as zeros:
        monkeypatch.setattr("sys.stdin", zeros)
        line = failure(capsys, main, "generate", "data", "good.pt", "--cpu", status=1)
    assert "has more than 67,108,864 bytes: pass its end only" in line
