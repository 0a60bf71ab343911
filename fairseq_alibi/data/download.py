"""A file from the first of several sources that gives it whole, resumed where a transfer broke off, checked by MD5."""

import hashlib
import http.client
import socket
import ssl
import time
import urllib.error
import urllib.request

from tqdm import tqdm

USER_AGENT = "Mozilla/5.0 (X11; Linux x86_64)"  # the first source refuses Python's own
ATTEMPTS = 5  # transfers per source, each going on where the one before broke off
TIMEOUT = 60  # seconds without a byte
PAUSE = 2  # seconds before going on with a transfer that broke off
# What may break a transfer that had begun. OSError as a whole is not here: a full disk is not the server's fault.
BROKEN_TRANSFER = (ConnectionError, socket.timeout, ssl.SSLError, http.client.HTTPException)


def fetch(url, part):
    """Transfers what is missing in the file `part`; raises urllib's errors or one of BROKEN_TRANSFER."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": USER_AGENT, **({"Range": f"bytes={have}-"} if have else {})}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        if response.status != 206:  # the server sends the whole file, whatever we have
            have = 0
        total = have + int(response.headers["Content-Length"] or 0)
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc="download", disable=None)
        with open(part, "ab" if have else "wb") as file, bar:
            while block := response.read1(1 << 18):  # what is there, so that a kill loses nothing
                file.write(block)
                have += len(block)
                bar.update(len(block))
    if have < total:
        raise ConnectionError(f"broke off after {have:,} of {total:,} bytes")


def fetch_checked(url, part, md5):
    """Transfers `url` to the file `part` in up to ATTEMPTS pieces; returns None, or why it failed."""
    reason = None
    for _ in range(ATTEMPTS):
        resumed = part.exists()
        try:
            fetch(url, part)
        except BROKEN_TRANSFER as error:
            reason = str(error) or type(error).__name__
            time.sleep(PAUSE)
            continue
        except (urllib.error.URLError, ValueError) as error:
            # 416: what we have is no beginning of this file, so it is not worth keeping.
            if resumed and getattr(error, "code", None) == 416:
                part.unlink()
                continue
            return str(error)
        got = file_md5(part)
        if got == md5:
            return None
        part.unlink()
        reason = f"MD5 is {got} instead of {md5}"
        if not resumed:
            break
    return reason


def download(urls, part, md5, remedy):
    """Gets the file with this MD5 from the first source that gives it whole, going on with what is in `part`.

    Raises OSError, naming each source, why it failed, and the remedy, if none does.
    """
    if part.exists() and file_md5(part) == md5:
        return
    failures = []
    for url in urls:
        reason = fetch_checked(url, part, md5)
        if reason is None:
            return
        failures.append(f"{url} ({reason})")
    raise OSError(f"no source gave the archive: {', '.join(failures)}; {remedy}")


def file_md5(path):
    """Returns the MD5 of a file in hexadecimal."""
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
