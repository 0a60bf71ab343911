"""Files good and bad in which the tests of bad input run, and the check that each of their commands has to pass."""

import contextlib
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import warnings
import zipfile
from unittest import mock

import numpy
import torch
from conftest import ROOT, failure

from fairseq_alibi.__main__ import main

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
    good = {"model": model, "subset": "valid", "results": [one], "speed": "of another program"}
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
        "updates-text": {**good, "model": {**model, "updates": "many"}},
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
    os.mkfifo(folder / "pipe.npz")
    (folder / "circle").symlink_to("circle")


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
    with zipfile.ZipFile(folder / "folders.zip", "w") as archive:
        for split in ("train", "valid", "test"):
            archive.writestr(f"wikitext-103/wiki.{split}.tokens/", "")
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
        "aliases": b"a0: &a0 [1]\n"
        + b"".join(b"a%d: &a%d [%s]\n" % (n + 1, n + 1, b"*a%d, " % n * 9) for n in range(8)),
        "circle": b"a: &a [*a]\n",
        "nested": b"a: " + b"[" * 2000 + b"]" * 2000,
        "large": b"# " + b"x" * 2**20,
        "unsafe": b"task: !!python/object/apply:os.system ['touch owned']\n",
    }.items():
        (folder / f"{name}.yaml").write_bytes(content)
    shutil.copy(ROOT / "configs" / "tiny.yaml", folder)
    shutil.copytree(ROOT / "configs", folder / "configs")


def make_files(folder, corpus, checkpoint):
    """Everything that the commands are given."""
    checkpoints(folder, checkpoint)
    data_folders(folder, corpus)
    results(folder)
    texts(folder)
    configs(folder)


def snapshot(folder):
    """Everything in a folder, with its content."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def check(capsys, folder, command, expected, programs=None):
    """Runs a command in this process and compares what it says, and what it leaves.

    Args:
        capsys: pytest's fixture.
        folder: in which the command runs, see `make_files`.
        command: a subcommand of fairseq-alibi, or one of `programs`, with its arguments.
        expected: a regular expression for the message; or the status and that, where the status is not 1.
        programs: functions that take the arguments, by name.
    """
    program, *arguments = shlex.split(command)
    if program in ("evaluate", "generate", "reproduce", "benchmark"):
        arguments.append("--cpu")
    if program.startswith("prepare") and "--workers" not in arguments:
        arguments += ["--workers", "1"]
    call = (programs or {}).get(program)
    if call is None:
        call, arguments = main, [program, *arguments]
    status, message = expected if isinstance(expected, tuple) else (1, expected)
    before = snapshot(folder)
    line = failure(capsys, call, *arguments, status=status)
    assert re.search(message, line), line
    assert snapshot(folder) == before


@contextlib.contextmanager
def full_disk():
    """A context in which no file gets longer than 400 bytes: a limit of the system stands in for a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, limits[1]))
    try:
        with mock.patch("sys.dont_write_bytecode", True):  # Python would leave half of each module that it compiles
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
