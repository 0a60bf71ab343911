"""Corpora to fairseq data folders: WikiText-103, any plain-text files, or Python's own standard library.

    python -m fairseq_alibi.prepare_data wikitext103 [DEST]
    python -m fairseq_alibi.prepare_data text DEST --train FILE --valid FILE --test FILE
    python -m fairseq_alibi.prepare_data text DEST --builtin

Everything is made in DEST.partial, checked there and renamed to DEST at the end, so DEST is whole or does not exist.
"""

import argparse
import codecs
import contextlib
import datetime
import fcntl
import hashlib
import importlib.metadata
import io
import itertools
import json
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
import tokenize
import types
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from fairseq.data import Dictionary, indexed_dataset
from fairseq.data.encoders.moses_tokenizer import MosesTokenizer, MosesTokenizerConfig
from fairseq.data.encoders.subword_nmt_bpe import SubwordNMTBPE, SubwordNMTBPEConfig
from subword_nmt.learn_bpe import learn_bpe
from tabulate import tabulate
from tqdm import tqdm

from .. import __version__
from ..files.results import naming
from .download import download, file_md5

SPLITS = ("train", "valid", "test")
MARKER = "prepared.json"

WIKITEXT103_URLS = (
    "https://wikitext.smerity.com/wikitext-103-v1.zip",
    "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip",
)
BY_HAND = (
    "name another source with --url, or get the archive by hand and name it with --from (the Hugging Face dataset "
    "Salesforce/wikitext holds the same text)"
)
WIKITEXT103_MD5 = "9ddaacaf6af0710eda8c456decff7832"
WIKITEXT103_LINES = {"train": 1_801_350, "valid": 3_760, "test": 4_358}
# After fairseq-preprocess: tokens with one end-of-sentence per line, types as fairseq logs them.
WIKITEXT103_TOKENS = {"train": 103_227_021, "valid": 217_646, "test": 245_569}
WIKITEXT103_TYPES = 267_744

BATCH_LINES = 50_000  # lines in memory at a time while encoding
CHUNK_LINES = 500  # lines that a worker gets at a time

# Parts of the standard library that are tests, other projects or generated tables rather than written code.
NOT_BUILTIN = re.compile(
    r"(^|/)(tests?|idlelib|turtledemo|lib2to3|ensurepip|encodings|pydoc_data|site-packages|dist-packages|__pycache__"
    r"|config-[^/]*|_sysconfigdata[^/]*|entities\.py)(/|$)"
)
BUILTIN_SHARES = {"train": 0.9, "valid": 0.05, "test": 0.05}


def check_text(path):
    """Returns the number of lines and the SHA-256 of a UTF-8 text file.

    Raises ValueError for what fairseq-preprocess would crash on or, worse, accept: a missing, empty or binary file,
    another encoding, a byte order mark.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a file: name a plain-text file that exists")
    digest, number, blank = hashlib.sha256(), 0, True
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            digest.update(line)
            if number == 1 and line.startswith(codecs.BOM_UTF8):
                raise ValueError(f"{path} starts with a byte order mark: remove it with sed -i '1s/^\\xEF\\xBB\\xBF//'")
            if b"\0" in line:
                raise ValueError(f"{path}, line {number}: a zero byte, so this is no plain text: name a text file")
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}, line {number}: not UTF-8 ({error.reason}): convert it, for example with "
                    "iconv -f LATIN1 -t UTF-8"
                ) from None
            blank = blank and not text.strip()
    if blank:
        raise ValueError(f"{path} is empty: name a file with text in it")
    return number, digest.hexdigest()


def is_prepared(dest, identity):
    """Says whether DEST was made from the same inputs with the same settings; raises ValueError if it is in use."""
    if os.path.ismount(dest):
        raise ValueError(f"{dest} is a mount point, which nothing can be renamed to: choose a folder inside it")
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return False
    marker = dest / MARKER
    made_from = {}
    with contextlib.suppress(OSError, ValueError):
        made_from = json.loads(marker.read_text(encoding="utf-8"))
    if all(made_from.get(key) == value for key, value in identity.items()):
        print(f"{dest} is already prepared (see {MARKER} in it)")
        return True
    raise ValueError(
        f"{dest} exists and was {'made from other inputs or settings' if made_from else 'not made by this script'}: "
        "choose another DEST or move it away"
    )


@contextlib.contextmanager
def work_folder(dest):
    """Gives an empty folder in DEST.partial, which is removed at the end, however it ends.

    Raises ValueError if DEST.partial is in use by another run or by somebody else. What a killed run left is removed.
    """
    partial = dest.with_name(dest.name + ".partial")
    lock_path = partial / "prepare_data.lock"
    with naming(dest):
        if partial.exists() and any(partial.iterdir()) and not lock_path.exists():
            raise ValueError(f"{partial} is in the way and not ours: move it away or choose another DEST")
        partial.mkdir(parents=True, exist_ok=True)
        lock_path.touch()
    with open(lock_path, "w") as lock:
        try:
            # lockf, not flock, whose lock would live on in worker processes after their main process was killed.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another run is preparing {dest}: wait for it or choose another DEST") from None
        try:
            work = partial / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            yield work
        finally:
            shutil.rmtree(partial)


def points_outside(member):
    """Says whether a zip member could be written outside of the folder that the archive is unpacked to."""
    path = member.filename.replace("\\", "/")
    return (
        path.startswith("/")
        or ".." in path.split("/")
        or re.match("[A-Za-z]:", path) is not None
        or stat.S_ISLNK(member.external_attr >> 16)
    )


def extract_wikitext(archive, folder):
    """Unpacks wiki.SPLIT.tokens as folder/SPLIT.txt; raises ValueError for an archive that is broken or unsafe."""
    try:
        with zipfile.ZipFile(archive) as zip_file:
            for member in zip_file.infolist():
                if points_outside(member):
                    raise ValueError(
                        f"{archive} is refused, because its member {member.filename} would be written outside of the "
                        "folder: get the archive from a source you trust"
                    )
            for split in SPLITS:
                found = [name for name in zip_file.namelist() if Path(name).name == f"wiki.{split}.tokens"]
                if len(found) != 1:
                    raise ValueError(
                        f"{archive} holds {len(found)} files wiki.{split}.tokens instead of one: "
                        "name a WikiText archive (word level, not raw)"
                    )
                with zip_file.open(found[0]) as packed, open(folder / f"{split}.txt", "wb") as text:
                    shutil.copyfileobj(packed, text)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{archive} is no readable zip archive ({error}): get it again") from None


def start_worker(encoder_class, config):
    """Gives this process its encoder; an interrupt from the keyboard is left to the main process."""
    global encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    encoder = encoder_class(config)


def encode_line(line):
    """Encodes a line in a process that `start_worker` prepared."""
    return encoder.encode(line.rstrip("\n"))


def encode_splits(folder, source, target, encoder_class, config, workers):
    """Encodes folder/SPLIT.source to folder/SPLIT.target, line by line, with one of fairseq's encoders."""
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(encoder_class, config)) as pool:
        for split in SPLITS:
            with (
                open(folder / f"{split}.{source}", encoding="utf-8", newline="\n") as lines,
                open(folder / f"{split}.{target}", "w", encoding="utf-8", newline="\n") as encoded,
                tqdm(desc=f"{target} {split}", unit=" lines", unit_scale=True, disable=None) as bar,
            ):
                while batch := list(itertools.islice(lines, BATCH_LINES)):
                    for line in pool.map(encode_line, batch, chunksize=CHUNK_LINES):
                        encoded.write(line + "\n")
                        bar.update()


def learn_codes(text, codes, merges):
    """Learns up to `merges` BPE merges on a tokenized text; raises ValueError if it is too small for a single one."""
    with (
        open(text, encoding="utf-8", newline="\n") as lines,
        open(codes, "w", encoding="utf-8") as file,
        tqdm(total=merges, desc="learn bpe", unit=" merges", disable=None) as bar,
    ):

        def write(line):
            file.write(line)
            bar.update(not line.startswith("#version"))

        # subword-nmt raises ValueError if there is no pair of characters, and says on stderr if no pair is frequent.
        with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(ValueError):
            learn_bpe(lines, types.SimpleNamespace(write=write), merges)
    if codes.read_text(encoding="utf-8").count("\n") < 2:
        raise ValueError("the training text is too small to learn BPE: give more text, or use --word-level")


def write_builtin(folder, max_bytes):
    """Writes folder/SPLIT.txt from the source files of the running Python's standard library; returns their paths.

    Each file is in one split. Files are taken in the order of a hash of their names as far as they fit into `max_bytes`
    bytes, shared out by BUILTIN_SHARES. Blank lines are left out. Raises ValueError if nothing fits.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    files = sorted((zlib.crc32(name.encode()), name) for name in names if not NOT_BUILTIN.search(name))
    room = {split: int(max_bytes * share) for split, share in BUILTIN_SHARES.items()}
    texts = {split: [] for split in SPLITS}
    for crc, name in files:
        split = {0: "valid", 1: "test"}.get(crc % 20, "train")
        with tokenize.open(root / name) as source:
            text = "".join(line.rstrip("\n") + "\n" for line in source if line.strip()).encode()
        if 0 < len(text) <= room[split]:
            room[split] -= len(text)
            texts[split].append(text)
    for split in SPLITS:
        if not texts[split]:
            raise ValueError(f"no file of {root} fits into the {split} split with --max-bytes {max_bytes}: raise it")
        (folder / f"{split}.txt").write_bytes(b"".join(texts[split]))
    return {split: folder / f"{split}.txt" for split in SPLITS}


def binarize(folder, suffix, workers):
    """Runs fairseq-preprocess on folder/SPLIT.suffix and returns the data folder; raises OSError if it fails."""
    # Bare names and cwd, because fairseq takes a comma in a path for the start of another one.
    command = [sys.executable, "-m", "fairseq_cli.preprocess", "--only-source", "--destdir", "data"]
    command += ["--workers", str(workers)]
    command += [word for split in SPLITS for word in (f"--{split}pref", f"{split}.{suffix}")]
    print("fairseq-preprocess runs: seconds for small texts, minutes for the whole of WikiText-103", flush=True)
    log = folder / "preprocess.out"
    with open(log, "w") as output:
        # A session of its own, so that its workers can be stopped with it and write nothing after we cleaned up.
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    if status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
        raise OSError(f"fairseq-preprocess failed with exit status {status}; its last lines:\n{tail}")
    return folder / "data"


def count_data(data, lines):
    """Counts types, and lines, tokens and unknown tokens per split; raises ValueError if lines were lost."""
    dictionary = Dictionary.load(str(data / "dict.txt"))
    counts = {"types": len(dictionary)}
    for split in SPLITS:
        ids = np.memmap(data / f"{split}.bin", indexed_dataset.best_fitting_int_dtype(len(dictionary)), mode="r")
        # The dataset is kept in a variable, because its sizes are a view into memory that dies with it.
        dataset = indexed_dataset.MMapIndexedDataset(str(data / split))
        if len(dataset) != lines[split] or dataset.sizes.sum() != len(ids):
            raise ValueError(
                f"fairseq-preprocess made {len(dataset):,} lines and {len(ids):,} tokens of the {lines[split]:,} lines "
                f"of the {split} text: look for carriage returns inside its lines"
            )
        unknown = int(np.count_nonzero(ids == dictionary.unk()))
        counts[split] = {"lines": len(dataset), "tokens": len(ids), "unknown": unknown}
    return counts


def finish(data, dest, identity, source, counts, next_command):
    """Adds the marker to a checked data folder, moves it to DEST and shows what it holds."""
    packages = ("fairseq", "sacremoses", "subword-nmt")
    marker = {
        **identity,
        "source": source,
        "counts": counts,
        "versions": {
            "python": platform.python_version(),
            "fairseq-alibi": __version__,
            **{package: importlib.metadata.version(package) for package in packages},
        },
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    (data / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    os.rename(data, dest)
    rows = [[split, *counts[split].values()] for split in SPLITS]
    print(tabulate(rows, headers=["split", "lines", "tokens", "<unk>"], intfmt=","))
    print(f"{dest} is ready: {counts['types']:,} types. Next:\n  {next_command}")


def check_known(what, got, known):
    """Raises ValueError if a count of the whole of WikiText-103 is not the known one."""
    if got != known:
        raise ValueError(f"WikiText-103 has {what} {known}, but this has {got}: get the original with --url or --from")


def identify_wikitext(source, md5):
    """Returns what tells the archive or folder `source` (None: the download) from others; raises ValueError if bad."""
    if source is None:
        return {"archive_md5": md5 or WIKITEXT103_MD5}
    if source.is_dir():
        return {"inputs": {split: check_text(source / f"wiki.{split}.tokens")[1] for split in SPLITS}}
    if not source.exists():
        raise ValueError(f"--from {source}: no such file or folder: name a WikiText archive or what it unpacks to")
    got = file_md5(source)
    if md5 not in (None, got):
        raise ValueError(f"--from {source}: MD5 is {got} instead of {md5}: get the archive again")
    return {"archive_md5": got}


def prepare_wikitext103(dest, source, urls, md5, workers):
    """Makes a data folder of WikiText-103 from the archive or folder `source` or, if that is None, from `urls`.

    Raises ValueError for bad input and OSError for what cannot be got or stored.
    """
    identity = {**identify_wikitext(source, md5), "settings": {"corpus": "wikitext103"}}
    if is_prepared(dest, identity):
        return
    # Not in the work folder, so that a later run can go on with it.
    part = dest.with_name(dest.name + ".zip.part")
    with work_folder(dest) as work:
        if source is None:
            download(urls or WIKITEXT103_URLS, part, identity["archive_md5"], BY_HAND)
            try:
                extract_wikitext(part, work)
            except ValueError:
                part.unlink()  # it would be refused again
                raise
        elif source.is_dir():
            for split in SPLITS:
                (work / f"{split}.txt").symlink_to((source / f"wiki.{split}.tokens").resolve())
        else:
            extract_wikitext(source, work)
        facts = {split: check_text(work / f"{split}.txt") for split in SPLITS}
        lines = {split: number for split, (number, _) in facts.items()}
        identity["inputs"] = {split: digest for split, (_, digest) in facts.items()}
        whole = identity.get("archive_md5") == WIKITEXT103_MD5 or lines == WIKITEXT103_LINES
        if whole:
            check_known("lines", lines, WIKITEXT103_LINES)
        else:
            print(f"{source or 'This'} is a subset, not the whole of WikiText-103: its known counts are not demanded")
        data = binarize(work, "txt", workers)
        counts = count_data(data, lines)
        if whole:
            check_known("tokens", {split: counts[split]["tokens"] for split in SPLITS}, WIKITEXT103_TOKENS)
            check_known("types", counts["types"], WIKITEXT103_TYPES)
            print("All counts are those of the whole WikiText-103")
        next_command = f"bash scripts/train_wikitext103.sh {dest} checkpoints/alibi-512 512"
        finish(data, dest, identity, str(source or "download"), counts, next_command)
    part.unlink(missing_ok=True)


def prepare_text(dest, texts, source, bpe_merges, workers):
    """Makes a data folder of plain-text files, one per split: Moses tokens, then BPE unless `bpe_merges` is None.

    BPE is learned on the training text alone. Raises ValueError for bad input and OSError for what cannot be stored.
    """
    facts = {split: check_text(path) for split, path in texts.items()}
    identity = {
        "inputs": {split: digest for split, (_, digest) in facts.items()},
        "settings": {"corpus": "text", "tokenizer": "moses", "bpe_merges": bpe_merges},
    }
    if is_prepared(dest, identity):
        return
    with work_folder(dest) as work:
        for split, path in texts.items():
            (work / f"{split}.txt").symlink_to(path.resolve())
        encode_splits(work, "txt", "moses", MosesTokenizer, MosesTokenizerConfig(), workers)
        suffix, options = "moses", "--tokenizer moses"
        if bpe_merges is not None:
            codes = work / "bpe.codes"
            learn_codes(work / "train.moses", codes, bpe_merges)
            encode_splits(work, "moses", "bpe", SubwordNMTBPE, SubwordNMTBPEConfig(bpe_codes=str(codes)), workers)
            suffix, options = "bpe", f"--tokenizer moses --bpe subword_nmt --bpe-codes {dest / codes.name}"
        data = binarize(work, suffix, workers)
        if bpe_merges is not None:
            codes.rename(data / codes.name)
        counts = count_data(data, {split: number for split, (number, _) in facts.items()})
        next_command = (
            f"fairseq-train {dest} --user-dir {Path(__file__).parents[1]} --task language_modeling "
            "--arch alibi_lm_tiny --tokens-per-sample 256 --max-tokens 4096 --optimizer adam --lr 0.001 --max-update 1000 "
            f"--save-dir checkpoints/{dest.name}"
        )
        finish(data, dest, identity, source, counts, next_command)
        print(f"A model of it takes plain text from fairseq-interactive {dest} {options}")


def parse_arguments(argv):
    """Returns the parsed command line; raises ValueError for values and combinations that make no sense."""
    parser = argparse.ArgumentParser(prog="prepare_data", description="Makes a fairseq data folder of a corpus.")
    commands = parser.add_subparsers(dest="command", required=True)

    wikitext = commands.add_parser("wikitext103", help="WikiText-103, downloaded and checked")
    wikitext.add_argument("dest", nargs="?", type=Path, default=Path("data-bin/wikitext-103"), metavar="DEST")
    wikitext.add_argument("--from", dest="source", type=Path, metavar="PATH", help="zip archive or folder you have")
    wikitext.add_argument("--url", dest="urls", action="append", help="download from here instead; may be repeated")
    wikitext.add_argument("--md5", type=str.lower, help="of the archive, if it is not the original one")

    text = commands.add_parser("text", help="plain-text files, tokenized with Moses and BPE")
    text.add_argument("dest", type=Path, metavar="DEST")
    for split in SPLITS:
        text.add_argument(f"--{split}", type=Path, metavar="FILE")
    text.add_argument("--builtin", action="store_true", help="the source of Python's standard library instead of FILEs")
    text.add_argument("--max-bytes", type=int, help="size limit of the builtin corpus (default: 6000000)")
    text.add_argument("--bpe-merges", type=int, help="BPE merges to learn (default: 10000, for --builtin 2000)")
    text.add_argument("--word-level", action="store_true", help="Moses tokens only, no BPE")

    for command in (wikitext, text):
        command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    args = parser.parse_args(argv)

    for option in ("workers", "bpe_merges", "max_bytes"):
        value = getattr(args, option, None)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value}: give a number from 1 on")
    if args.command == "wikitext103" and args.source and args.urls:
        raise ValueError(f"--from {args.source} and --url {args.urls[0]} exclude each other: give one of them")
    if args.command == "text":
        given = [split for split in SPLITS if getattr(args, split)]
        if len(given) != (0 if args.builtin else len(SPLITS)):
            raise ValueError("give all of --train, --valid and --test, or --builtin alone")
        if args.word_level and args.bpe_merges:
            raise ValueError(f"--bpe-merges {args.bpe_merges} and --word-level exclude each other: give one of them")
        if args.max_bytes and not args.builtin:
            raise ValueError(f"--max-bytes {args.max_bytes} is for --builtin only: leave it out")
    return args


def main(argv=None):
    """Runs the command line; a mistake or a full disk ends it with one line on stderr and exit status 1."""
    try:
        args = parse_arguments(argv)
        dest = args.dest.resolve()
        if args.command == "wikitext103":
            prepare_wikitext103(dest, args.source, args.urls, args.md5, args.workers)
            return
        merges = None if args.word_level else args.bpe_merges or (2_000 if args.builtin else 10_000)
        with tempfile.TemporaryDirectory() as folder:
            if args.builtin:
                texts = write_builtin(Path(folder), args.max_bytes or 6_000_000)
                source = f"standard library of Python {platform.python_version()}"
            else:
                texts = {split: getattr(args, split) for split in SPLITS}
                source = {split: str(path) for split, path in texts.items()}
            prepare_text(dest, texts, source, merges, args.workers)
    except (ValueError, OSError) as error:
        sys.exit(f"prepare_data: {error}")
    except KeyboardInterrupt:
        sys.exit("prepare_data: interrupted")


if __name__ == "__main__":
    # Batch systems end a job so; as an exception it lets the work folder be removed.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    main()
