"""Bad input of every command and script: one line that names it, an exit status, and nothing lost or half-written.

Files that would run code are bad input too.

Every case runs in one folder of files good and bad, which `given` makes; it has to look afterwards as it did before.
"""

import ast
import io
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import warnings
import zipfile

import benchmark
import numpy
import pytest
import soak
import torch
from conftest import ROOT, failure, run
from fairseq_cli import eval_lm as fairseqs_eval_lm
from fairseq_cli import train

from fairseq_alibi.__main__ import main
from fairseq_alibi.data import download, prepare_data
from fairseq_alibi.evaluation import eval_lm, evaluate

#: What makes a file if it is evaluated.
CODE = "__import__('os').system('touch owned')"


class Malicious:
    """Pickled it is a call that makes a file."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def checkpoints(folder, checkpoint):
    """Checkpoints good and bad; `folder.pt` is a folder."""
    state = torch.load(checkpoint)
    state["last_optimizer_state"] = None
    torch.save(state, folder / "good.pt")
    content = (folder / "good.pt").read_bytes()
    (folder / "cut.pt").write_bytes(content[: len(content) // 2])
    (folder / "text.pt").write_text("no checkpoint")
    (folder / "empty.pt").touch()
    (folder / "folder.pt").mkdir()
    torch.save([1, 2], folder / "list.pt")
    torch.save({"model": state["model"]}, folder / "weights.pt")
    weights = {**state["model"], "decoder.twist": torch.zeros(1)}
    cfg = {**state["cfg"], "model": {**state["cfg"]["model"], "_name": "transformer_lm"}}
    torch.save({**state, "cfg": cfg, "model": weights}, folder / "more-weights.pt")
    torch.save({**state, "cfg": cfg, "model": {}}, folder / "no-weights.pt")
    del weights["decoder.twist"], weights["decoder.layers.0.fc1.weight"]
    torch.save({**state, "cfg": cfg, "model": weights}, folder / "less-weights.pt")
    torch.save({"cfg": Malicious()}, folder / "malicious.pt")
    torch.save({"cfg": Malicious()}, folder / "malicious-old.pt", _use_new_zipfile_serialization=False)
    torch.save({"cfg": Malicious()}, folder / "malicious-4.pt", pickle_protocol=4)
    (folder / "malicious-raw.pt").write_bytes(pickle.dumps(Malicious()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(1, 1)).save(str(folder / "script.pt"))
    torch.save({**state, "model": {**state["model"], "decoder.layers.0.fc1.bias": torch.zeros(3)}}, folder / "shape.pt")
    nan = torch.full_like(state["model"]["decoder.layers.0.fc1.bias"], float("nan"))
    torch.save({**state, "model": {**state["model"], "decoder.layers.0.fc1.bias": nan}}, folder / "nan.pt")
    task = state["cfg"]["task"]
    torch.save({**state, "cfg": {**state["cfg"], "task": {**task, "_name": "translation"}}}, folder / "translation.pt")
    torch.save({**state, "cfg": {**state["cfg"], "task": {**task, "add_bos_token": True}}}, folder / "bos.pt")
    for name, change in {
        "short": {"max_target_positions": 16},
        "unbiased": {"position_method": "none"},
        "transformer": {"_name": "transformer_lm"},
        "twisted": {"_name": "transformer_lm", "alibi_twist": 1},
    }.items():
        cfg = {**state["cfg"], "model": {**state["cfg"]["model"], **change}}
        torch.save({**state, "cfg": cfg}, folder / f"{name}.pt")


def data_folders(folder, corpus):
    """Data folders good and bad."""
    words = (corpus / "dict.txt").read_text()

    def data(name, **files):
        shutil.copytree(corpus, folder / name)
        for file, content in files.items():
            path = folder / name / file.replace("_", ".")
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())

    data("data")
    data("dict-none", dict_txt=None)
    data("dict-no-counts", dict_txt="the\nof\n")
    data("dict-binary", dict_txt=b"\xff\xfe\x00")
    data("dict-twice", dict_txt="the 1\nthe 1\n")
    data("dict-more", dict_txt=words + "".join(f"more{n} 1\n" for n in range(8)))
    data("dict-other", dict_txt=words.replace("word7 ", "wordX ", 1))
    data("dict-few", dict_txt="".join(words.splitlines(keepends=True)[:9]))
    text, index = ((corpus / f"valid.{suffix}").read_bytes() for suffix in ("bin", "idx"))
    data("bin-none", valid_bin=None)
    data("bin-empty", valid_bin="")
    data("bin-short", valid_bin=text[: len(text) // 2])
    data("idx-empty", valid_idx="")
    data("idx-head", valid_idx=index[:11])
    data("idx-short", valid_idx=index[: len(index) // 2])
    data("idx-text", valid_idx="no index at all, but some text")
    data("idx-of-train", valid_idx=(corpus / "train.idx").read_bytes())
    data("prepared-broken", prepared_json="{")
    data("prepared-other", prepared_json="[1]")


def results(folder):
    """Result files good and bad, and the outputs that are there already."""
    model = {"checkpoint": "good.pt", "position_method": "alibi", "training_length": 32}
    one = {"length": 64, "stride": 64, "perplexity": 9.0}
    good = {"model": model, "subset": "valid", "results": [one]}
    for name, content in {
        "good": good,
        "list": [],
        "no-model": {**good, "model": {}},
        "no-checkpoint": {**good, "model": {"position_method": "alibi", "training_length": 32}},
        "no-results": {**good, "results": []},
        "length-text": {**good, "results": [{**one, "length": "many"}]},
        "length-0": {**good, "results": [{**one, "length": 0, "stride": 0}]},
        "perplexity-none": {**good, "results": [{**one, "perplexity": None}]},
        "perplexity-nan": {**good, "results": [{**one, "perplexity": float("nan")}]},
        "bins-text": {**good, "results": [{**one, "by_position": "no bins"}]},
        "training-text": {**good, "model": {**model, "training_length": "long"}},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "cut.json").write_text(json.dumps(good)[:50])
    (folder / "binary.json").write_bytes(b"\xff\xfe\x00")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "taken").mkdir()
    for name in ("report.md", "benchmark.json", "settings.json", "thesis.tex", "checkpoint_last.pt"):
        (folder / "taken" / name).write_text("mine")
    (folder / "taken" / f"{folder.name}_good_valid.json").write_text("mine")
    numpy.savez(folder / "taken.npz", tokens=numpy.zeros(3))
    (folder / "cut.npz").write_bytes((folder / "taken.npz").read_bytes()[:99])
    (folder / "empty.npz").touch()
    numpy.savez(folder / "malicious.npz", tokens=numpy.array([Malicious()], dtype=object))
    (folder / "file").write_text("mine")


def texts(folder):
    """Plain text good and bad, and archives."""
    text = "The old man and the sea, the lowest.\n" * 30
    for name, content in {
        "good": text.encode(),
        "empty": b"",
        "blank": b" \n\n",
        "latin1": "fine\nnaïve\n".encode("latin-1"),
        "binary": b"fine\nPK\x00\x01\n",
        "mark": b"\xef\xbb\xbffine\n",
        "one-line": b"a b c\n",
        "pairless": b"ab cd\n",
    }.items():
        (folder / f"{name}.txt").write_bytes(content)
    for name in ("wiki", "wiki-return"):
        (folder / name).mkdir()
        for split in ("train", "valid", "test"):
            (folder / name / f"wiki.{split}.tokens").write_text(text)
    (folder / "wiki-return" / "wiki.valid.tokens").write_bytes(b"one\rtwo\n")
    (folder / "wiki-one").mkdir()
    (folder / "wiki-one" / "wiki.train.tokens").write_text(text)
    with zipfile.ZipFile(folder / "raw.zip", "w") as archive:
        archive.writestr("wikitext-103-raw/wiki.train.raw", text)
    (folder / "cut.zip").write_bytes((folder / "raw.zip").read_bytes()[:99])
    (folder / "other.partial").mkdir()
    (folder / "other.partial" / "thesis.tex").write_text("mine")


def configs(folder):
    """Configs that are none."""
    for name, content in {
        "broken": b"task: [",
        "list": b"- 1\n- 2\n",
        "empty": b"",
        "binary": b"\xff\xfe\x00",
        "unsafe": b"task: !!python/object/apply:os.system ['touch owned']\n",
    }.items():
        (folder / f"{name}.yaml").write_bytes(content)
    shutil.copy(ROOT / "configs" / "tiny.yaml", folder)
    shutil.copytree(ROOT / "configs", folder / "configs")


@pytest.fixture(scope="module")
def given(corpus, checkpoint, tmp_path_factory):
    """The folder in which all cases run."""
    folder = tmp_path_factory.mktemp("given")
    checkpoints(folder, checkpoint)
    data_folders(folder, corpus)
    results(folder)
    texts(folder)
    configs(folder)
    return folder


def snapshot(folder):
    """Everything in a folder, with its content."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


TEXT = "--train good.txt --valid good.txt --test good.txt"
PLAN = "--gpu-memory 80 --types 100"

#: What is run, with what it has to say. The status is 1, or stands before that: 2 where argparse refuses the command.
TABLE = {
    # Files that are none, or of another kind
    "evaluate nowhere good.pt": "there is no nowhere/dict.txt: name the data folder",
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
    "evaluate data bos.pt": "bos.pt was trained with --add-bos-token: use scripts/eval_nonoverlapping.sh",
    "generate data nowhere.pt x": "there is no checkpoint nowhere.pt",
    "generate data text.pt x": "text.pt is no fairseq checkpoint",
    "generate nowhere good.pt x": "there is no nowhere/dict.txt",
    "generate data translation.pt x": "was trained for 'translation'",
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
    "eval_lm nonoverlapping data nowhere.pt 64": "there is no checkpoint nowhere.pt",
    "eval_lm nonoverlapping data text.pt 64": "text.pt is no fairseq checkpoint",
    "eval_lm nonoverlapping nowhere good.pt 64": "nowhere holds no subset 'valid'",
    "eval_lm nonoverlapping data nan.pt 64 -- --cpu": "at length 64 is nan: the model has diverged",
    "eval_lm nonoverlapping data translation.pt 64": "was trained for 'translation'",
    "benchmark --checkpoint nowhere.pt --data data": "there is no checkpoint nowhere.pt",
    "benchmark --checkpoint good.pt --data nowhere": "nowhere holds no subset 'train'",
    "benchmark --checkpoint unbiased.pt --data data": "has the position method none: name",
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
    "evaluate bin-short good.pt": "valid.bin does not hold the 2,086 tokens of its .idx: prepare",
    "evaluate idx-empty good.pt": "valid.idx is cut short: prepare the folder anew",
    "evaluate idx-head good.pt": "valid.idx is cut short: prepare the folder anew",
    "evaluate idx-short good.pt": "valid.idx is cut short: prepare the folder anew",
    "evaluate idx-text good.pt": "valid.bin and .idx cannot be read .*: prepare the folder anew",
    "evaluate idx-of-train good.pt": "does not hold the 20,813 tokens of its .idx: prepare",
    "evaluate prepared-broken good.pt": "prepared-broken/prepared.json cannot be read .*: prepare",
    "evaluate prepared-other good.pt": "prepared-other/prepared.json cannot be read .*: prepare",
    "generate dict-more good.pt x": "was trained with 48 types, but dict-more/dict.txt has 56",
    "generate prepared-other good.pt x": "prepared-other/prepared.json cannot be read",
    "eval_lm nonoverlapping bin-short good.pt 64": "valid.bin does not hold the 2,086 tokens",
    "eval_lm nonoverlapping idx-text good.pt 64": "valid.bin and .idx cannot be read",
    "eval_lm nonoverlapping dict-none good.pt 64": "there is no dict-none/dict.txt",
    "eval_lm nonoverlapping dict-more good.pt 64": "was trained with 48 types, but dict-more/dict.txt has 56",
    "plan tiny.yaml task.data=nowhere --gpu-memory 80": "there is no nowhere/dict.txt",
    "plan tiny.yaml task.data=dict-twice --gpu-memory 80": "dict-twice/dict.txt is no dictionary",
    "reproduce --data nowhere": "there is no nowhere/dict.txt",
    "reproduce --data bin-short --subset valid": "valid.bin does not hold",
    # Results that are none
    "report nowhere.json": "nowhere.json cannot be read .*: name JSON files",
    "report folder.pt": "folder.pt cannot be read .*: name JSON files",
    **{
        f"report {name}.json": f"{name}.json is no result of an evaluation .*: name one of their JSON files"
        for name in (
            *("cut", "binary", "deep", "list", "no-model", "no-checkpoint", "length-text", "length-0"),
            *("perplexity-none", "perplexity-nan", "bins-text", "training-text"),
        )
    },
    "report no-results.json": "no result in no-results.json: the evaluation ended before its first length",
    # Configs that are none
    "plan nowhere.yaml --gpu-memory 80": "there is no config nowhere.yaml: name a YAML file",
    "plan folder.pt --gpu-memory 80": "there is no config folder.pt: name a YAML file",
    f"plan broken.yaml {PLAN}": "broken.yaml: .*line 1",
    f"plan list.yaml {PLAN}": "list.yaml: .*must be a DictConfig",
    f"plan binary.yaml {PLAN}": "binary.yaml: 'utf-8' codec",
    f"plan unsafe.yaml {PLAN}": "unsafe.yaml: could not determine a constructor .*os.system",
    f"plan empty.yaml {PLAN}": "model._name is None: only alibi_lm can be planned",
    "plan tiny.yaml --gpu-memory 80": "tiny.yaml does not say how large its vocabulary is: pass",
    # Texts and archives that are none
    f"prepare_data text out {TEXT} --train nowhere.txt": "nowhere.txt is not a file: name",
    f"prepare_data text out {TEXT} --train folder.pt": "folder.pt is not a file: name",
    f"prepare_data text out {TEXT} --train empty.txt": "empty.txt is empty: name",
    f"prepare_data text out {TEXT} --valid blank.txt": "blank.txt is empty: name",
    f"prepare_data text out {TEXT} --test latin1.txt": "latin1.txt, line 2: not UTF-8 .*: convert it",
    f"prepare_data text out {TEXT} --train binary.txt": "binary.txt, line 2: a zero byte",
    f"prepare_data text out {TEXT} --test mark.txt": "mark.txt starts with a byte order mark: remove it",
    f"prepare_data text out {TEXT} --train one-line.txt": "too small to learn BPE: .*--word-level",
    f"prepare_data text out {TEXT} --train pairless.txt": "too small to learn BPE: .*--word-level",
    "prepare_data wikitext103 out --from nowhere": "--from nowhere: no such file or folder: name",
    "prepare_data wikitext103 out --from raw.zip": "raw.zip holds 0 files wiki.train.tokens instead of one: name",
    "prepare_data wikitext103 out --from cut.zip": "cut.zip is no readable zip archive .*: get it again",
    "prepare_data wikitext103 out --from empty.txt": "empty.txt is no readable zip archive .*: get it again",
    "prepare_data wikitext103 out --from wiki-one": "wiki-one/wiki.valid.tokens is not a file: name",
    "prepare_data wikitext103 out --from wiki-return": "look for carriage returns",
    "prepare_data wikitext103 out --from good.txt --md5 ABC": "instead of abc: get the archive again",
    "prepare_data wikitext103 out --url no-url --url http://127.0.0.1:9/x": "no-url .* http://127.0.0.1:9/x .*--from",
    "generate data good.pt x --bpe subword_nmt --bpe-codes binary.txt": "--bpe-codes binary.txt cannot be used",
    "generate data good.pt x --bpe subword_nmt --bpe-codes latin1.txt": "--bpe-codes latin1.txt cannot be used",
    "generate data good.pt x --bpe subword_nmt --bpe-codes folder.pt": "there are no codes folder.pt, name them",
    "generate data good.pt x --bpe subword_nmt": "there are no codes data/bpe.codes, name them with --bpe-codes",
    # Destinations that hold something, or can hold nothing
    "evaluate data good.pt --output file": "file/given0_good_valid.json cannot be written .*: .*name another place",
    "evaluate data good.pt --output file/out": "file/out/given0_good_valid.json cannot be written",
    "evaluate data good.pt --output taken": "given0_good_valid.json exists and is of another evaluation .*--overwrite",
    "evaluate data good.pt --save-token-losses taken.npz": "taken.npz exists and holds something else: .*--overwrite",
    "evaluate data good.pt --save-token-losses cut.npz": "cut.npz exists and holds something else",
    "evaluate data good.pt --save-token-losses empty.npz": "empty.npz exists and holds something else",
    "evaluate data good.pt --save-token-losses malicious.npz": "malicious.npz exists and holds something else",
    "evaluate data good.pt --save-token-losses file/l.npz": "file/l.npz cannot be written",
    "evaluate data good.pt good.pt --output out": "would both be written to out/given0_good_valid.json: drop",
    "eval_lm nonoverlapping data good.pt 64 --output good.json": "good.json exists: pass --overwrite",
    "eval_lm nonoverlapping data good.pt 64 --output file/x.json": "file/x.json cannot be written",
    "eval_lm nonoverlapping data good.pt 64 --output folder.pt --overwrite": "folder.pt cannot be written",
    "report good.json --output taken": "taken/report.md exists: pass --overwrite",
    "report good.json --output file": "file/report.png cannot be written",
    "import-checkpoint good.pt taken/thesis.tex": "taken/thesis.tex exists: pass --overwrite",
    "import-checkpoint transformer.pt file/out.pt": "file/out.pt cannot be written",
    "import-checkpoint transformer.pt folder.pt --overwrite": "folder.pt cannot be written",
    "show-bias --output file": "file exists: pass --overwrite",
    "show-bias --output file/bias.png": "file/bias.png cannot be written",
    "soak data --output file": "file/soak.json cannot be written",
    "reproduce --data data --output file": "file/settings.json cannot be written",
    "reproduce --data data --output taken": "taken/settings.json is not ours .*: name another --output",
    "benchmark --output taken": "taken/benchmark.json exists: pass --overwrite",
    "benchmark --parts attention --output file": "file/benchmark.json cannot be written",
    f"prepare_data text taken {TEXT}": "taken exists and was not made by this script: choose another DEST",
    f"prepare_data text other {TEXT}": "other.partial is in the way and not ours: move it away",
    f"prepare_data text file {TEXT}": "file exists and was not made by this script",
    f"prepare_data text file/out {TEXT}": "file/out cannot be written",
    f"prepare_data text /proc/out {TEXT}": "/proc/out cannot be written",
    "prepare_data wikitext103 taken": "taken exists and was not made by this script",
    # Numbers and names that are wrong
    "evaluate data good.pt --lengths 64,0": (2, "'0' is no such number: pass a whole number of at least 1"),
    "evaluate data good.pt --lengths many": (2, "'many' is no such number"),
    "evaluate data good.pt --lengths ''": (2, "'' is no such number"),
    "evaluate data good.pt --lengths 99999999999999999999": "is longer than the model's longest sequence",
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
    """evaluate data good.pt --model-overrides "{'decoder_layers': 9}" """: "good.pt cannot be loaded: .*Missing key",
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
    "plan tiny.yaml --gpu-memory nan --types 100": (2, "'nan' is no such number: pass the GiB"),
    "plan tiny.yaml --gpu-memory 0 --types 100": (2, "'0' is no such number: pass the GiB"),
    "plan configs/wikitext103.yaml --gpu-memory 80 --types 50000": "the options make no model: .*vocab",
    "plan configs/wikitext103.yaml --gpu-memory 80 --gpus 7": "7 GPUs cannot share .*: pass --gpus 1, 2, 3",
    "plan configs/wikitext103.yaml --gpu-memory 2": "not one block of 512 tokens fits 2 GiB: try",
    "plan configs/wikitext103.yaml dataset.max_tokens=500 --gpu-memory 80": "max_tokens=500 holds no block of 512",
    "plan configs/wikitext103.yaml dataset.max_tokens=null --gpu-memory 80": "max_tokens is not set: set it",
    "plan configs/wikitext103.yaml common.amp=true --gpu-memory 80": "common.amp cannot be planned: switch it off",
    "plan configs/wikitext103.yaml model._name=alibi_lm_wiki103 --gpu-memory 80": "alibi_lm_wiki103: .*sizes",
    "plan tiny.yaml --gpu-memory much --types 100": (2, "'much' is no such number: pass the GiB"),
    "plan tiny.yaml --gpu-memory 80 --types 4": "4 types are no vocabulary, 4 of which are special: name",
    "plan tiny.yaml --gpu-memory 80 --types 100 --gpus 0": (2, "'0' is no such number"),
    f"plan tiny.yaml nonsense {PLAN}": "tiny.yaml: Error parsing override 'nonsense'",
    f"plan tiny.yaml model=null {PLAN}": "tiny.yaml: Config group override",
    f"plan tiny.yaml model.decoder_layerz=3 {PLAN}": "tiny.yaml: .*decoder_layerz",
    f"plan tiny.yaml +model.decoder_layerz=3 {PLAN}": "tiny.yaml: .*decoder_layerz",
    f"plan tiny.yaml model.position_method=abacus {PLAN}": "'abacus', expected one of .*alibi",
    f"plan tiny.yaml model.decoder_attention_heads=7 {PLAN}": "the options make no model: .*num_heads",
    f"plan tiny.yaml model.decoder_layers=0 {PLAN}": "model.decoder_layers is 0: set it to a whole number",
    f"plan tiny.yaml model.decoder_embed_dim=-4 {PLAN}": "model.decoder_embed_dim is -4: set it",
    f"plan tiny.yaml task.tokens_per_sample=0 {PLAN}": "task.tokens_per_sample is 0: set it",
    f"plan tiny.yaml task.tokens_per_sample=many {PLAN}": "tiny.yaml: Value 'many'",
    f"plan tiny.yaml optimization.update_freq=[] {PLAN}": "optimization.update_freq",
    f"plan tiny.yaml optimization.update_freq=[0] {PLAN}": "optimization.update_freq\\[0\\] is 0: set it",
    f"plan tiny.yaml dataset.max_tokens=-5 {PLAN}": "dataset.max_tokens",
    f"plan tiny.yaml dataset.required_batch_size_multiple=0 {PLAN}": "required_batch_size_multiple is 0: set it",
    f"plan tiny.yaml distributed_training.distributed_world_size=0 {PLAN}": "distributed_world_size is 0: set it",
    f"plan tiny.yaml optimizer._name=adafactor {PLAN}": "optimizer adafactor cannot be planned: use nag or adam",
    "eval_lm nonoverlapping data good.pt 0": (2, "'0' is no such number"),
    "eval_lm nonoverlapping data good.pt many": (2, "'many' is no such number"),
    "eval_lm nonoverlapping data good.pt": (2, "required: LENGTH"),
    "eval_lm nonoverlapping data good.pt 64 --subset dev": "no subset 'dev'",
    "eval_lm nonoverlapping data good.pt 64 -- --nonsense": "it refuses its arguments",
    "reproduce --preset desk": (2, "invalid choice: 'desk'"),
    "reproduce --data data --updates 0": (2, "'0' is no such number"),
    "reproduce --data data --methods abacus": (2, "invalid choice: 'abacus'"),
    "reproduce --data data --subset dev": "no subset 'dev'",
    "prepare_data text out --builtin --workers 0": "--workers 0: give a number from 1 on",
    "prepare_data text out --builtin --workers x": (2, "invalid int value: 'x'"),
    "prepare_data text out --builtin --bpe-merges -5": "--bpe-merges -5: give a number from 1 on",
    "prepare_data text out --builtin --max-bytes 1000": "with --max-bytes 1000: raise it",
    "prepare_data pictures out": (2, "invalid choice: 'pictures'"),
    "benchmark --parts training,speed": (2, "'speed' is no part: choose of"),
    "benchmark --lengths 512 0": (2, "'0' is no such number"),
    "benchmark --repeats x": (2, "'x' is no such number"),
    "benchmark --dtype int8": (2, "invalid choice: 'int8'"),
    "benchmark --checkpoint good.pt --data data --parts evaluation --lengths 99999": "holds 20,813 .*: pass shorter",
    "show-bias --heads 0": (2, "'0' is no such number"),
    "show-bias --length 99999": "--length 99,999 has more cells",
    "soak data --minutes 0": "--minutes must be more than 0",
    "soak nowhere": "there is no nowhere/dict.txt",
    "doctor everything": (2, "unrecognized arguments: everything"),
    "cure": (2, "invalid choice: 'cure'"),
    # Options that contradict each other
    "evaluate data good.pt --lengths 64 --stride 65": "stride 65 is longer than the length 64 and would skip tokens",
    "evaluate data good.pt --stride 5 --streaming": (2, "not allowed with argument --stride"),
    "evaluate data good.pt --streaming --by-position": "a stream has no windows.*; drop one of the two",
    "evaluate data good.pt good.pt --save-token-losses l.npz": "evaluate one at a time",
    "generate data good.pt x --sampling-topp 0.5 --sampling-topk 2": "exclude each other: drop one",
    "generate data good.pt x --sampling-topk 2 --beam 2": "contradicts beam search: drop --beam",
    "eval_lm sliding data good.pt 64 65": "stride 65 is longer than the window of 64",
    "eval_lm nonoverlapping data good.pt 64 -- --num-workers 2": "--num-workers decides what is scored .*: drop it",
    "eval_lm nonoverlapping data good.pt 64 -- --num-shards=2": "--num-shards=2 decides what is scored",
    "eval_lm nonoverlapping data good.pt 64 -- --max-tokens 2": "--max-tokens decides what is scored",
    "reproduce --preset slice": "--preset slice needs --data",
    "prepare_data text out --train good.txt": "give all of --train, --valid and --test, or --builtin alone",
    "prepare_data text out --builtin --train good.txt": "or --builtin alone",
    f"prepare_data text out {TEXT} --max-bytes 9": "--max-bytes 9 is for --builtin only: leave it out",
    "prepare_data text out --builtin --word-level --bpe-merges 9": "exclude each other: give one of them",
    "prepare_data wikitext103 out --from x --url http://y": "exclude each other: give one of them",
    "benchmark --checkpoint good.pt": "go together: pass both or neither",
    # What would run code
    **{
        f"{command} {name}.pt {rest}": f"{name}.pt is refused, as it could run code: it calls [a-z]+.system; get"
        for command, name, rest in (
            *(("evaluate data", f"malicious{kind}", "") for kind in ("", "-old", "-4", "-raw")),
            ("generate data", "malicious", "x"),
            ("import-checkpoint", "malicious-old", "out.pt"),
            ("eval_lm nonoverlapping data", "malicious", "64"),
            ("benchmark --data data --checkpoint", "malicious", ""),
        )
    },
    f"evaluate data good.pt --model-overrides {shlex.quote(CODE)}": (2, "is no dictionary: pass one as"),
    f"eval_lm nonoverlapping data good.pt 64 -- --cpu --model-overrides {shlex.quote(CODE)}": "is no dictionary: pass",
}

PROGRAMS = {"eval_lm": eval_lm.main, "prepare_data": prepare_data.main, "benchmark": benchmark.main, "soak": soak.main}


def check(capsys, folder, command):
    """Runs a command of the table in this process and compares what it says, and what it leaves."""
    program, *arguments = shlex.split(command)
    if program in ("evaluate", "generate", "reproduce", "benchmark"):
        arguments.append("--cpu")
    if program == "prepare_data" and "--workers" not in arguments:
        arguments += ["--workers", "1"]
    if program not in PROGRAMS:
        arguments = [program, *arguments]
    expected = {**TABLE, **FULL}[command]
    status, message = expected if isinstance(expected, tuple) else (1, expected)
    before = snapshot(folder)
    line = failure(capsys, PROGRAMS.get(program, main), *arguments, status=status)
    assert re.search(message, line), line
    assert snapshot(folder) == before


@pytest.fixture(autouse=True)
def inside(given, monkeypatch):
    """Every test runs in the folder, without a prompt on standard input, without waiting for the network."""
    monkeypatch.chdir(given)
    monkeypatch.setattr(download, "PAUSE", 0)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))


@pytest.mark.parametrize("command", TABLE)
def test_bad_input_is_named_in_one_line_and_nothing_is_lost(given, command, capsys):
    check(capsys, given, command)


def test_an_output_that_cannot_be_written_is_named_before_the_work(given, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: pytest.fail("that is the work"))
    line = failure(capsys, main, "evaluate", "data", "good.pt", "--output", "/proc", "--cpu", status=1)
    assert "/proc/given0_good_valid.json cannot be written" in line


@pytest.mark.parametrize("command", [command for command in TABLE if "malicious" in command])
def test_the_environment_cannot_make_our_commands_run_code(given, command, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    check(capsys, given, command)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1", "for what else runs in this process"


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


#: Commands that need more room than there is, with the file that they cannot write.
FULL = {
    "evaluate data good.pt --lengths 32": "good_valid.json cannot be written",
    "evaluate data good.pt --lengths 32 --overwrite --save-token-losses taken.npz": "taken.npz cannot be written",
    "eval_lm nonoverlapping data good.pt 32 --output good.json --overwrite -- --cpu": "good.json cannot be written",
    "report good.json --output .": "report.png cannot be written",
    "report good.json --output taken --overwrite": "report.png cannot be written",
    "import-checkpoint transformer.pt out.pt": "out.pt cannot be written",
    "import-checkpoint transformer.pt transformer.pt --overwrite": "transformer.pt cannot be written",
    "benchmark --parts attention --lengths 8 --repeats 1 --output .": "benchmark.(json|md) cannot be written",
    f"prepare_data text out {TEXT} --word-level": "[Tt]oo large",
}


@pytest.mark.parametrize("command", FULL)
def test_a_full_disk_is_named_and_loses_nothing(given, command, capsys):
    """A limit of the system on the size of files stands in for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        check(capsys, given, command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


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
    """Names and attributes in its source; commands read a checkpoint by `inputs.read_checkpoint` alone."""
    for path in (ROOT / "fairseq_alibi").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "compile", "os.system", "os.popen"}, (path, name)
                assert not re.search(r"(^|\.)(unsafe_load|full_load)$|^(yaml|marshal|shelve)\.", name), (path, name)
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert not given.keys() & {"shell", "allow_pickle"}, (path, name)
                assert given.get("weights_only") == ("True" if name == "torch.load" else None), (path, name)
                if name.endswith("load_checkpoint_to_cpu"):
                    assert path.name == "inputs.py"
            names = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            assert not {"pickle", "marshal", "shelve", "dill", "cloudpickle"} & set(names), path
