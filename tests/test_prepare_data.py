"""Corpora: what is downloaded is checked, what is prepared is whole, and bad input leaves nothing behind.

The network is a server on 127.0.0.1; WikiText-103 is a fake of a few lines in an archive of the same form.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import sysconfig
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from fairseq.data import Dictionary, indexed_dataset
from fairseq.data.encoders.moses_tokenizer import MosesTokenizer, MosesTokenizerConfig
from fairseq.data.encoders.subword_nmt_bpe import SubwordNMTBPE, SubwordNMTBPEConfig

from fairseq_alibi.__main__ import main
from fairseq_alibi.data import download, wikitext103
from fairseq_alibi.data.builtin_corpus import LEFT_OUT, write_builtin_corpus

ROOT = Path(__file__).parent.parent
SPLITS = ("train", "valid", "test")

WIKI = {
    "train": " \n = Cats = \n \n the cat sat on the <unk> . \n the dog did not . \n" * 60,
    "valid": " \n the cat sat . \n",
    "test": " \n the dog sat on a mat . \n",
}
WIKI_LINES = {"train": 300, "valid": 2, "test": 2}
# By hand: 17 words in 5 lines of train, 4 in 2 lines of valid, 7 in 2 lines of test; one end of sentence per line.
WIKI_TOKENS = {"train": 60 * (3 + 7 + 5 + 5), "valid": 4 + 2, "test": 7 + 2}
# "a" and "mat" are not in train: 11 words, 4 special symbols, and one filler up to a multiple of 8.
WIKI_TYPES = 16


def make_archive(extra=None):
    """A fake WikiText archive as bytes, with 100 kB that do not compress, so that a transfer has many blocks."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for split, text in WIKI.items():
            archive.writestr(f"wikitext-103/wiki.{split}.tokens", text)
        archive.writestr("wikitext-103/filler", os.urandom(100_000))
        if extra:
            archive.writestr(*extra)
    return buffer.getvalue()


ARCHIVE = make_archive()
MD5 = hashlib.md5(ARCHIVE).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves `server.payload`, well or badly as the first part of the path says."""

    def do_GET(self):
        mode = self.path.split("/")[1]
        self.server.seen.append((mode, self.headers["Range"], self.headers["User-Agent"]))
        if mode == "forbidden" or "Python" in self.headers["User-Agent"]:
            self.send_error(403)
            return
        payload, start = self.server.payload, 0
        if mode == "corrupt":
            payload = bytes(len(payload))
        if self.headers["Range"] and mode != "ignores-range":
            start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
            if start >= len(payload):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(payload) - start))
        self.end_headers()
        rest = payload[start:]
        if mode == "breaks-always" or (mode in ("breaks", "ignores-range") and len(self.server.seen) == 1):
            rest = rest[:40_000]
        if mode == "stalls" and not start:
            self.wfile.write(rest[:40_000])
            self.server.released.wait(30)
            return
        self.wfile.write(rest)

    def log_message(self, *args):
        """Keeps the console calm."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PAUSE", 0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.payload, server.seen, server.released = ARCHIVE, [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


@pytest.fixture
def wiki_folder(tmp_path):
    folder = tmp_path / "wikitext"
    folder.mkdir()
    for split, text in WIKI.items():
        (folder / f"wiki.{split}.tokens").write_text(text)
    return folder


@pytest.fixture
def corpus(tmp_path):
    """Three plain-text files of a few lines; returns their paths by split."""
    return write_corpus(tmp_path)


def write_corpus(folder):
    texts = {
        "train": "The old man's boat, and the sea!\nLower, slower: <unk> a-b \"c\" & it's lowest.\n\n" * 40,
        "valid": "The newest boat.\r\n\r\nNo final newline: naïve\u2028sea",
        "test": 'He said: "it\'s the sea".\n \n[1] </s> @-@ x@@ y\n',
    }
    paths = {split: folder / f"my {split}.text" for split in SPLITS}
    for split, text in texts.items():
        paths[split].write_bytes(text.encode())
    return paths


def text_arguments(paths):
    return [word for split, path in paths.items() for word in (f"--{split}", str(path))]


def run(command, dest, *arguments):
    """Runs the command line in this process; every preparation here is so small that one worker is the quickest."""
    main([command, str(dest), "--workers", "1", *map(str, arguments)])


def failure(capsys, command, dest, *arguments):
    """Runs what must fail and returns its one line; checks that nothing half-made is left beside DEST."""
    before = sorted(dest.parent.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        run(command, dest, *arguments)
    message = error.value.code  # a text: Python prints it on stderr and exits with status 1
    assert message.startswith(f"fairseq-alibi {command}: ")
    assert "\n" not in message
    assert capsys.readouterr().err == ""
    assert [path for path in sorted(dest.parent.rglob("*")) if path.suffix != ".part"] == before
    return message


def read_split(data, split):
    """The lines of a binarized split as fairseq will see them."""
    dictionary = Dictionary.load(str(data / "dict.txt"))
    dataset = indexed_dataset.MMapIndexedDataset(str(data / split))
    return [" ".join(dictionary[index] for index in line[:-1]) for line in dataset]


# Downloading


def test_download_ends_in_a_data_folder_and_a_second_run_asks_for_nothing(server, tmp_path, capsys):
    dest = tmp_path / "parent" / "data"
    run("prepare-wikitext103", dest, "--url", f"{server.url}/good/x.zip", "--md5", MD5)
    assert "subset" in capsys.readouterr().out
    assert [path.name for path in dest.parent.iterdir()] == ["data"]
    assert read_split(dest, "test") == ["", "the dog sat on <unk> <unk> ."]
    marker = json.loads((dest / "prepared.json").read_text())
    assert marker["archive_md5"] == MD5
    assert marker["counts"]["train"].items() >= {"lines": 300, "tokens": WIKI_TOKENS["train"], "unknown": 60}.items()
    assert marker["counts"]["test"].items() >= {"lines": 2, "tokens": WIKI_TOKENS["test"], "unknown": 2}.items()
    assert marker["counts"]["types"] == len(Dictionary.load(str(dest / "dict.txt"))) == WIKI_TYPES

    server.seen.clear()
    run("prepare-wikitext103", dest, "--url", f"{server.url}/good/x.zip", "--md5", MD5)
    assert "already prepared" in capsys.readouterr().out
    assert server.seen == []


def test_broken_transfer_goes_on_where_it_ended(server, tmp_path):
    part = tmp_path / "x.part"
    download.download([f"{server.url}/breaks/x.zip"], part, MD5, "")
    assert part.read_bytes() == ARCHIVE
    assert [requested for _, requested, _ in server.seen] == [None, "bytes=40000-"]


def test_server_that_ignores_ranges_sends_all_again(server, tmp_path):
    part = tmp_path / "x.part"
    download.download([f"{server.url}/ignores-range/x.zip"], part, MD5, "")
    assert part.read_bytes() == ARCHIVE
    assert [requested for _, requested, _ in server.seen] == [None, "bytes=40000-"]


def test_whole_partial_file_needs_no_server(server, tmp_path):
    part = tmp_path / "x.part"
    part.write_bytes(ARCHIVE)
    download.download([f"{server.url}/good/x.zip"], part, MD5, "")
    assert server.seen == []


@pytest.mark.parametrize("rubbish", [bytes(10), bytes(len(ARCHIVE) + 10)], ids=["shorter", "longer"])
def test_partial_file_of_something_else_is_given_up(server, tmp_path, rubbish):
    part = tmp_path / "x.part"
    part.write_bytes(rubbish)
    download.download([f"{server.url}/good/x.zip"], part, MD5, "")
    assert part.read_bytes() == ARCHIVE


def test_next_source_after_forbidden_and_after_wrong_checksum(server, tmp_path):
    part = tmp_path / "x.part"
    download.download([f"{server.url}/{mode}/x.zip" for mode in ("forbidden", "corrupt", "good")], part, MD5, "")
    assert part.read_bytes() == ARCHIVE
    assert [mode for mode, _, _ in server.seen] == ["forbidden", "corrupt", "good"]
    assert all(agent.startswith("Mozilla/") for _, _, agent in server.seen)


def test_wrong_checksum_is_refused(server, tmp_path, capsys):
    message = failure(
        capsys, "prepare-wikitext103", tmp_path / "data", "--url", f"{server.url}/corrupt/x.zip", "--md5", MD5
    )
    assert f"instead of {MD5}" in message
    assert list(tmp_path.iterdir()) == []


def test_original_checksum_is_the_default(server, tmp_path, capsys):
    message = failure(capsys, "prepare-wikitext103", tmp_path / "data", "--url", f"{server.url}/good/x.zip")
    assert "instead of 9ddaacaf6af0710eda8c456decff7832" in message


def test_all_sources_fail_in_one_line_that_names_each(server, tmp_path, capsys):
    urls = [f"{server.url}/forbidden/x.zip", f"{server.url}/breaks-always/x.zip", "http://127.0.0.1:9/x.zip", "no-url"]
    options = [word for url in urls for word in ("--url", url)]
    server.payload = make_archive(("big", os.urandom(300_000)))
    message = failure(capsys, "prepare-wikitext103", tmp_path / "data", *options, "--md5", MD5)
    assert all(url in message for url in urls)
    for part in ("403", "broke off after 200,000 of", "refused", "--from", "--url", "Salesforce/wikitext"):
        assert part in message
    # What did come is kept for a later run.
    assert (tmp_path / "data.zip.part").read_bytes() == server.payload[:200_000]


@pytest.mark.slow
def test_killed_download_goes_on_in_the_next_run(server, tmp_path, monkeypatch):
    dest, url = tmp_path / "data", f"{server.url}/stalls/x.zip"
    command = [sys.executable, "-m", "fairseq_alibi", "prepare-wikitext103", dest, "--url", url, "--md5", MD5]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 60
    part = tmp_path / "data.zip.part"
    while not (part.exists() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == [part]
    received = part.stat().st_size

    # SIGKILL could not have tidied up: its rest is taken over as well.
    (tmp_path / "data.partial" / "work" / "data").mkdir(parents=True)
    (tmp_path / "data.partial" / "prepare_data.lock").touch()
    run("prepare-wikitext103", dest, "--url", url, "--md5", MD5)
    assert server.seen[-1][1] == f"bytes={received}-"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# Unpacking


def symlink_member():
    member = zipfile.ZipInfo("wikitext-103/link")
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize(
    "member",
    ["../x", "wikitext-103/../../x", "/tmp/fairseq-alibi-x", "..\\x", "C:\\x", symlink_member()],
    ids=["up", "down-and-up", "absolute", "backslash", "drive", "symlink"],
)
def test_archive_that_climbs_out_is_refused_whole(server, tmp_path, capsys, member):
    server.payload = make_archive((member, "/etc/passwd"))
    md5 = hashlib.md5(server.payload).hexdigest()
    message = failure(
        capsys, "prepare-wikitext103", tmp_path / "data", "--url", f"{server.url}/good/x.zip", "--md5", md5
    )
    assert "outside" in message
    assert getattr(member, "filename", member).replace("\\", "/") in message.replace("\\", "/")
    assert list(tmp_path.iterdir()) == []
    assert not Path("/tmp/fairseq-alibi-x").exists()


# The whole corpus and parts of it


@pytest.fixture
def known(monkeypatch):
    """Makes the fake corpus the known one."""
    for name in ("LINES", "TOKENS", "TYPES"):
        monkeypatch.setattr(wikitext103, name, globals()[f"WIKI_{name}"])


def test_folder_of_the_whole_corpus_is_recognized_by_its_lines(known, wiki_folder, tmp_path, capsys):
    run("prepare-wikitext103", tmp_path / "data", "--from", wiki_folder)
    output = capsys.readouterr().out
    assert "subset" not in output
    assert "All counts" in output
    run("prepare-wikitext103", tmp_path / "data", "--from", wiki_folder)
    assert "already prepared" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "value"), [("TOKENS", {**WIKI_TOKENS, "test": 8}), ("TYPES", 24)])
def test_whole_corpus_with_a_wrong_count_is_refused(known, monkeypatch, wiki_folder, tmp_path, capsys, name, value):
    monkeypatch.setattr(wikitext103, name, value)
    message = failure(capsys, "prepare-wikitext103", tmp_path / "data", "--from", wiki_folder)
    assert f"{name.lower()} {value}" in message


def test_original_archive_with_wrong_lines_is_refused(known, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(wikitext103, "MD5", MD5)
    monkeypatch.setattr(wikitext103, "LINES", {**WIKI_LINES, "valid": 3})
    archive = tmp_path / "x.zip"
    archive.write_bytes(ARCHIVE)
    assert "lines {'train': 300" in failure(capsys, "prepare-wikitext103", tmp_path / "data", "--from", archive)


def test_known_counts_are_those_of_the_literature():
    assert wikitext103.LINES == {"train": 1801350, "valid": 3760, "test": 4358}
    assert wikitext103.TOKENS == {"train": 103227021, "valid": 217646, "test": 245569}
    assert wikitext103.TYPES == 267744


@pytest.mark.slow
def test_script_takes_a_folder(wiki_folder, tmp_path):
    (wiki_folder / "wiki.train.tokens").write_text("one two three\n" * 9)
    command = ["bash", ROOT / "scripts" / "prepare_wikitext103.sh", "a,b", "--from", wiki_folder]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "subset" in result.stdout
    assert result.stderr == ""
    assert read_split(tmp_path / "a,b", "train") == ["one two three"] * 9


# Text files


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The corpus prepared with BPE by the shell script: (its folder, its data folder)."""
    folder = tmp_path_factory.mktemp("text")
    paths = write_corpus(folder)
    script = ROOT / "scripts" / "prepare_text.sh"
    command = ["bash", script, "data", *text_arguments(paths), "--bpe-merges", "30", "--workers", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    assert result.stderr == ""
    assert "data is ready" in result.stdout
    return folder, folder / "data"


def test_lines_are_what_fairseq_makes_of_a_prompt(prepared):
    folder, data = prepared
    moses = MosesTokenizer(MosesTokenizerConfig())
    bpe = SubwordNMTBPE(SubwordNMTBPEConfig(bpe_codes=str(data / "bpe.codes")))
    train = read_split(data, "train")
    lines = (folder / "my train.text").read_text().split("\n")[:-1]
    assert train == [bpe.encode(moses.encode(line)) for line in lines]
    assert any("@@ " in line for line in train)
    assert moses.decode(bpe.decode(train[0])) == "The old man's boat, and the sea!"
    assert moses.decode(bpe.decode(train[1])).startswith("Lower, slower: < unk >")  # no special symbol of fairseq's
    assert train[2] == ""


def test_lines_stay_one_to_one(prepared):
    _, data = prepared
    counts = json.loads((data / "prepared.json").read_text())["counts"]
    assert [counts[split]["lines"] for split in SPLITS] == [120, 3, 3]
    for split in SPLITS:
        lines = read_split(data, split)
        assert counts[split]["tokens"] == sum(len(line.split()) + 1 for line in lines)
        assert counts[split]["unknown"] == sum(line.split().count("<unk>") for line in lines)
    assert counts["valid"]["unknown"] > 0  # the ï is not in train


def test_rerun_is_done_at_once_and_other_settings_are_refused(prepared, capsys):
    folder, data = prepared
    options = text_arguments({split: folder / f"my {split}.text" for split in SPLITS})
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run("prepare-text", data, *options, "--bpe-merges", 30)
    assert "already prepared" in capsys.readouterr().out
    assert "other inputs or settings" in failure(capsys, "prepare-text", data, *options, "--bpe-merges", 31)
    assert "other inputs or settings" in failure(capsys, "prepare-text", data, *options, "--word-level")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_bpe_and_dictionary_are_learned_on_train_alone(prepared, tmp_path):
    folder, data = prepared
    paths = {"train": folder / "my train.text", "valid": tmp_path / "valid", "test": tmp_path / "test"}
    paths["valid"].write_text("quick quick quick brown fox\n" * 500)
    paths["test"].write_text("zebra\n" * 500)
    other = tmp_path / "data"
    other.mkdir()  # an empty folder may be used
    # One worker against two: their number must not matter either.
    run("prepare-text", other, *text_arguments(paths), "--bpe-merges", 30)
    for name in ("bpe.codes", "dict.txt", "train.bin", "train.idx"):
        assert (other / name).read_bytes() == (data / name).read_bytes()


def test_word_level_has_no_bpe(corpus, tmp_path):
    run("prepare-text", tmp_path / "data", *text_arguments(corpus), "--word-level")
    assert not (tmp_path / "data" / "bpe.codes").exists()
    moses = MosesTokenizer(MosesTokenizerConfig())
    lines = corpus["train"].read_text().split("\n")[:-1]
    assert read_split(tmp_path / "data", "train") == [moses.encode(line) for line in lines]


# Bad input


def test_failing_fairseq_leaves_nothing(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SystemExit, match="fairseq-preprocess ended with status 1: no output"):
        run("prepare-text", tmp_path / "data", *text_arguments(corpus), "--word-level")
    assert sorted(tmp_path.iterdir()) == sorted(corpus.values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing_and_stops_fairseq(corpus, tmp_path, monkeypatch, capsys, number):
    sleeper = tmp_path / "python"
    sleeper.write_text(f"#!/bin/sh\necho $$ >{tmp_path}/pid\nexec sleep 60\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores interrupts

    def interrupt_when_started():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.02)
        signal.pthread_kill(threading.main_thread().ident, number)

    threading.Thread(target=interrupt_when_started, daemon=True).start()
    with pytest.raises(SystemExit, match=str(128 + number)):
        run("prepare-text", tmp_path / "data", *text_arguments(corpus), "--word-level")
    assert capsys.readouterr().err.splitlines() == ["fairseq-alibi prepare-text: interrupted"]
    pid = int((tmp_path / "pid").read_text())
    with contextlib.suppress(ChildProcessError):  # Python kills it, but may not have waited for its end
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("data")]


def test_second_run_at_the_same_time_is_refused(corpus, tmp_path, capsys):
    """By the number of the first one's process; of a killed one nothing is left that blocks."""
    dest = tmp_path / "data"
    code = (
        "import os, pathlib, signal; from fairseq_alibi.data import destination\n"
        f"with destination.work_folder(pathlib.Path({str(dest)!r})): print(os.getpid(), flush=True); signal.pause()"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with first:
        pid = int(first.stdout.readline())
        message = failure(capsys, "prepare-text", dest, *text_arguments(corpus), "--word-level")
        assert f"{dest} is being written by process {pid}: wait for it" in message
        assert (tmp_path / "data.partial" / "work").is_dir()
        first.kill()
    run("prepare-text", dest, *text_arguments(corpus), "--word-level")
    assert {path.name for path in tmp_path.iterdir()} == {"data", *(path.name for path in corpus.values())}


# The built-in corpus


def test_builtin_corpus_is_split_by_file_and_always_the_same(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_builtin_corpus(tmp_path / name, 400_000)
    texts = {split: (tmp_path / "a" / f"{split}.txt").read_text() for split in SPLITS}
    assert texts == {split: (tmp_path / "b" / f"{split}.txt").read_text() for split in SPLITS}
    assert 0.8 * 400_000 < sum(len(text.encode()) for text in texts.values()) <= 400_000
    assert len(texts["train"]) > 5 * max(len(texts["valid"]), len(texts["test"]))
    assert "\n\n" not in texts["train"]

    # Every file of the library is in one split or in none.
    holders = {}
    for path in Path(sysconfig.get_paths()["stdlib"]).glob("*.py"):
        text = "".join(line for line in path.read_text(errors="replace").splitlines(True) if line.strip())
        if len(text) > 500:
            holders[path.name] = [split for split in SPLITS if text in texts[split]]
    assert max(map(len, holders.values())) == 1


def test_builtin_corpus_is_written_code_without_tests():
    left_out = ["test/a.py", "unittest/test/b.py", "idlelib/c.py", "site-packages/torch/d.py", "encodings/cp1252.py"]
    left_out += ["_sysconfigdata__linux.py", "config-3.11-x/python-config.py", "pydoc_data/topics.py"]
    assert all(LEFT_OUT.search(name) for name in left_out)
    assert not any(LEFT_OUT.search(name) for name in ["unittest/case.py", "json/encoder.py", "this.py"])


def test_builtin_corpus_is_prepared(tmp_path, capsys):
    dest = tmp_path / "data"
    run("prepare-text", dest, "--builtin", "--max-bytes", 200_000, "--bpe-merges", 100)
    marker = json.loads((dest / "prepared.json").read_text())
    assert marker["source"].startswith("standard library of Python 3.")
    assert min(marker["counts"][split]["tokens"] for split in SPLITS) > 1000
    table = capsys.readouterr().out
    assert f"{marker['counts']['train']['tokens']:,}" in table
    assert "fairseq-train" in table
