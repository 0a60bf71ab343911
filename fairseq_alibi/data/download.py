"""Download of one file from the first of several sources that delivers it whole. A broken transfer is resumed."""

import hashlib
import http.client
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from tqdm import tqdm

USER_AGENT = "Mozilla/5.0 (X11; Linux x86_64)"  # the first source of WikiText-103 refuses Python's own
SCHEMES = ("http://", "https://", "ftp://")
ATTEMPTS = 5  # transfers from one source; each resumes where the last one broke off
TIMEOUT = 60  # seconds without a byte
PAUSE = 2  # seconds before a broken transfer is resumed
#: Errors that can interrupt a transfer. OSError as a whole is not among them: a full disk is not the server's fault.
TRANSFER_ERRORS = (ConnectionError, socket.timeout, ssl.SSLError, http.client.HTTPException)


def transfer(url: str, part: Path) -> None:
    """Appends the missing bytes of a file to `part`; raises `TRANSFER_ERRORS` if it breaks off, URLError if refused."""
    received = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": USER_AGENT, **({"Range": f"bytes={received}-"} if received else {})}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        if response.status != 206:  # the server ignores the range and sends the whole file
            received = 0
        total = received + int(response.headers["Content-Length"] or 0)
        bar = tqdm(total=total, initial=received, unit="B", unit_scale=True, desc="download", disable=None)
        with open(part, "ab" if received else "wb") as file, bar:
            while block := response.read1(1 << 18):  # returns what has arrived, so that a kill loses nothing
                file.write(block)
                received += len(block)
                bar.update(len(block))
    if received < total:
        raise ConnectionError(f"broke off after {received:,} of {total:,} bytes")


def download_from(url: str, part: Path, md5: str) -> Optional[str]:
    """Downloads a file from one source, in up to `ATTEMPTS` transfers; returns why it was not delivered, or None."""
    if not url.startswith(SCHEMES):
        return "not an http, https or ftp address"
    reason = None
    for _ in range(ATTEMPTS):
        resumed = part.exists()
        try:
            transfer(url, part)
        except TRANSFER_ERRORS as error:
            reason = str(error) or type(error).__name__
            time.sleep(PAUSE)
            continue
        except (urllib.error.URLError, ValueError) as error:
            # Status 416 means that the partial file is no beginning of this file.
            if resumed and getattr(error, "code", None) == 416:
                part.unlink()
                continue
            return str(error)
        found = md5_of_file(part)
        if found == md5:
            return None
        part.unlink()
        reason = f"MD5 is {found} instead of {md5}"
        if not resumed:
            break
    return reason


def download(urls: Sequence[str], part: Path, md5: str, remedy: str) -> None:
    """Downloads the file with this MD5, hexadecimal, from the first source that delivers it; ValueError names all."""
    if part.exists() and md5_of_file(part) == md5:
        return
    failures = []
    for url in urls:
        reason = download_from(url, part, md5)
        if reason is None:
            return
        failures.append(f"{url} ({reason})")
    raise ValueError(f"no source delivered the archive: {', '.join(failures)}; {remedy}")


def md5_of_file(path: Path) -> str:
    """Returns the MD5 of a file, hexadecimal."""
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
