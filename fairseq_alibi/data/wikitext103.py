"""WikiText-103: downloaded or taken from a file, checked against its known counts, made a data folder."""

import re
import shlex
import shutil
import stat
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from ..files.errors import script_command
from .binarize import SPLITS, TextSummary, check_text, count_tokens, run_preprocess
from .destination import is_prepared, print_counts, publish, work_folder
from .download import download, md5_of_file

URLS = (
    "https://wikitext.smerity.com/wikitext-103-v1.zip",
    "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip",
)
MD5 = "9ddaacaf6af0710eda8c456decff7832"
LINES = {"train": 1_801_350, "valid": 3_760, "test": 4_358}
#: After fairseq-preprocess: tokens with one end of sentence per line, and types as fairseq logs them.
TOKENS = {"train": 103_227_021, "valid": 217_646, "test": 245_569}
TYPES = 267_744

REMEDY = (
    "name another source with --url, or get the archive by hand and name it with --from (the Hugging Face dataset "
    "Salesforce/wikitext holds the same text)"
)


def is_outside(member: zipfile.ZipInfo) -> bool:
    """Says whether a zip member could be written outside of the folder that the archive is unpacked to."""
    path = member.filename.replace("\\", "/")
    return (
        path.startswith("/")
        or ".." in path.split("/")
        or re.match("[A-Za-z]:", path) is not None
        or stat.S_ISLNK(member.external_attr >> 16)
    )


def extract_texts(archive: Path, folder: Path) -> None:
    """Unpacks wiki.SPLIT.tokens from a zip archive as `folder`/SPLIT.txt; ValueError if broken, unsafe or without."""
    try:
        with zipfile.ZipFile(archive) as zip_file:
            for member in zip_file.infolist():
                if is_outside(member):
                    raise ValueError(
                        f"{archive} is refused, because its member {member.filename} would be written outside of the "
                        "folder: get the archive from a source you trust"
                    )
            for split in SPLITS:
                files = (member for member in zip_file.infolist() if not member.is_dir())
                members = [member for member in files if Path(member.filename).name == f"wiki.{split}.tokens"]
                if len(members) != 1:
                    raise ValueError(
                        f"{archive} holds {len(members)} files wiki.{split}.tokens instead of one: "
                        "name a WikiText archive (word level, not raw)"
                    )
                with zip_file.open(members[0]) as packed, open(folder / f"{split}.txt", "wb") as text:
                    shutil.copyfileobj(packed, text)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ValueError(f"{archive} is no readable zip archive ({error}): get it again") from None


def identify(source: Optional[Path], md5: Optional[str]) -> dict[str, Any]:
    """Returns what distinguishes an archive or folder from others: its MD5, or the SHA-256 of its texts.

    `source` is None for the download, `md5` None for the original's. ValueError: the source cannot be used.
    """
    if source is None:
        return {"archive_md5": md5 or MD5}
    if source.is_dir():
        return {"inputs": {split: check_text(source / f"wiki.{split}.tokens").sha256 for split in SPLITS}}
    if not source.is_file():
        raise ValueError(f"--from {source}: no such file or folder: name a WikiText archive or what it unpacks to")
    found = md5_of_file(source)
    if md5 not in (None, found):
        raise ValueError(f"--from {source}: MD5 is {found} instead of {md5}: get the archive again")
    return {"archive_md5": found}


def place_texts(work: Path, source: Optional[Path], urls: Sequence[str], part: Path, md5: str) -> None:
    """Puts the texts into the work folder as SPLIT.txt; a download goes to `part`, where a later run resumes it."""
    if source is None:
        download(urls, part, md5, REMEDY)
        try:
            extract_texts(part, work)
        except ValueError:
            part.unlink()  # the next run would refuse it again
            raise
    elif source.is_dir():
        for split in SPLITS:
            (work / f"{split}.txt").symlink_to((source / f"wiki.{split}.tokens").resolve())
    else:
        extract_texts(source, work)


def check_count(kind: str, found: Any, known: Any) -> None:
    """Raises ValueError if a count of the whole corpus is not the known one."""
    if found != known:
        raise ValueError(
            f"WikiText-103 has {kind} {known}, but this has {found}: get the original with --url or --from"
        )


def prepare_wikitext103(
    destination: Path, source: Optional[Path], urls: Optional[Sequence[str]], md5: Optional[str], workers: int
) -> None:
    """Makes a data folder of WikiText-103 or of a part of it.

    `source` is an archive, or the folder it unpacks to, None to download it from `urls` (default `URLS`); `md5` is of
    the archive, hexadecimal. ValueError: bad input, or no source delivered it. OSError: the folder cannot be written.
    """
    identity = {**identify(source, md5), "settings": {"corpus": "wikitext103"}}
    if is_prepared(destination, identity):
        return
    part = destination.with_name(destination.name + ".zip.part")  # not in the work folder, which a failure removes
    with work_folder(destination) as work:
        place_texts(work, source, urls or URLS, part, identity.get("archive_md5", ""))
        summaries: dict[str, TextSummary] = {split: check_text(work / f"{split}.txt") for split in SPLITS}
        lines = {split: summary.lines for split, summary in summaries.items()}
        identity["inputs"] = {split: summary.sha256 for split, summary in summaries.items()}
        whole = identity.get("archive_md5") == MD5 or lines == LINES
        if whole:
            check_count("lines", lines, LINES)
        data = run_preprocess(work, "txt", workers)
        counts = count_tokens(data, summaries)
        if whole:
            check_count("tokens", {split: counts[split]["tokens"] for split in SPLITS}, TOKENS)
            check_count("types", counts["types"], TYPES)
        publish(data, destination, {**identity, "source": str(source or "download"), "counts": counts})
    part.unlink(missing_ok=True)
    print_counts(destination, counts)
    subset = f"{source or 'This'} is a subset, not the whole of WikiText-103: its known counts are not demanded"
    print("All counts are those of the whole WikiText-103" if whole else subset)
    script = script_command("train_wikitext103.sh") or "in a clone: bash scripts/train_wikitext103.sh"
    print(f"Next:\n  {script} {shlex.join([str(destination), 'checkpoints/alibi-512', '512'])}")
