"""Bad input of prepare-text and prepare-wikitext103: one line names it, and nothing is lost or half-written.

Every case runs in one folder of files good and bad; it has to look afterwards as it did before.
"""

import pytest
from bad_input import check, full_disk

pytestmark = pytest.mark.usefixtures("inside_given")

TEXT = "--train good.txt --valid good.txt --test good.txt"

#: What is run, with what it has to say. The status is 1, or stands before that: 2 where argparse refuses the command.
TABLE = {
    # Texts and archives that are none
    f"prepare-text out {TEXT} --train nowhere.txt": "nowhere.txt is not a file: name",
    f"prepare-text out {TEXT} --train folder.pt": "folder.pt is not a file: name",
    f"prepare-text out {TEXT} --train empty.txt": "empty.txt is empty: name",
    f"prepare-text out {TEXT} --valid blank.txt": "blank.txt is empty: name",
    f"prepare-text out {TEXT} --test latin1.txt": "latin1.txt, line 2: not UTF-8 .*: convert it",
    f"prepare-text out {TEXT} --train binary.txt": "binary.txt, line 2: a zero byte",
    f"prepare-text out {TEXT} --test mark.txt": "mark.txt starts with a byte order mark: remove it",
    f"prepare-text out {TEXT} --train one-line.txt": "too small to learn BPE: .*--word-level",
    f"prepare-text out {TEXT} --train pairless.txt": "too small to learn BPE: .*--word-level",
    "prepare-wikitext103 out --from nowhere": "--from nowhere: no such file or folder: name",
    "prepare-wikitext103 out --from raw.zip": "raw.zip holds 0 files wiki.train.tokens instead of one: name",
    "prepare-wikitext103 out --from folders.zip": "folders.zip holds 0 files wiki.train.tokens instead of one: name",
    f"prepare-text out {TEXT} --train /dev/zero": "/dev/zero is not a file: name",
    "prepare-wikitext103 out --url file:///dev/zero": "file:///dev/zero .not an http, https or ftp address",
    "prepare-wikitext103 out --from cut.zip": "cut.zip is no readable zip archive .*: get it again",
    "prepare-wikitext103 out --from empty.txt": "empty.txt is no readable zip archive .*: get it again",
    "prepare-wikitext103 out --from wiki-one": "wiki-one/wiki.valid.tokens is not a file: name",
    "prepare-wikitext103 out --from wiki-return": "look for carriage returns",
    "prepare-wikitext103 out --from good.txt --md5 ABC": "instead of abc: get the archive again",
    "prepare-wikitext103 out --url no-url --url http://127.0.0.1:9/x": "no-url .* http://127.0.0.1:9/x .*--from",
    f"prepare-text out {TEXT} --shards 9 --train one-line.txt": "--shards 9: .*one-line.txt has too few lines: pass",
    f"prepare-text out {TEXT} --shards 2 --valid nowhere.txt": "nowhere.txt is not a file: name",
    f"prepare-text out {TEXT} --shards 1 --test latin1.txt": "latin1.txt, line 2: not UTF-8 .*: convert it",
    f"prepare-text a:b {TEXT}": "a:b has a colon, at which fairseq would cut it: choose another DEST",
    # Destinations that hold something, or can hold nothing
    f"prepare-text taken {TEXT}": "taken exists and was not made by this script: choose another DEST",
    f"prepare-text other {TEXT}": "other.partial is in the way and not ours: move it away",
    f"prepare-text file {TEXT}": "file exists and was not made by this script",
    f"prepare-text file/out {TEXT}": "file/out cannot be written",
    f"prepare-text /proc/out {TEXT}": "/proc/out cannot be written",
    "prepare-wikitext103 taken": "taken exists and was not made by this script",
    # Numbers and names that are wrong
    "prepare-text out --builtin --workers 0": (2, "'0' is no such number"),
    "prepare-text out --builtin --workers x": (2, "'x' is no such number"),
    "prepare-text out --builtin --bpe-merges -5": (2, "'-5' is no such number"),
    "prepare-text out --builtin --max-bytes 1000": "with --max-bytes 1000: raise it",
    f"prepare-text out {TEXT} --workers 1000000000": "--workers 1000000000: each is a process, pass at most 1,024",
    "prepare-wikitext103 out --from wiki --workers 1025": "--workers 1025: each is a process",
    # Options that contradict each other
    "prepare-text out --train good.txt": "give all of --train, --valid and --test, or --builtin alone",
    "prepare-text out --builtin --train good.txt": "or --builtin alone",
    f"prepare-text out {TEXT} --max-bytes 9": "--max-bytes 9 is for --builtin only: leave it out",
    "prepare-text out --builtin --word-level --bpe-merges 9": "exclude each other: give one of them",
    "prepare-wikitext103 out --from x --url http://y": "exclude each other: give one of them",
}


@pytest.mark.parametrize("command", TABLE)
def test_bad_input_is_named_in_one_line_and_nothing_is_lost(given, command, capsys):
    check(capsys, given, command, TABLE[command])


#: Commands that need more room than there is, with the file that they cannot write.
FULL = {
    f"prepare-text out {TEXT} --word-level": "out cannot be written .*[Tt]oo large",
}


@pytest.mark.parametrize("command", FULL)
def test_a_full_disk_is_named_and_loses_nothing(given, command, capsys):
    with full_disk():
        check(capsys, given, command, FULL[command])
