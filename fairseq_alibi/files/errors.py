"""Messages for the user: other libraries' as one line, and commands that can be run as they are printed."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any, Optional


def one_line(error: BaseException) -> str:
    """Returns the message of an error, of many lines or empty, as one line of at most 300 characters."""
    text = repr(error) if isinstance(error, KeyError) else str(error)
    return (" ".join(text.split()) or repr(error))[:300]


def script_command(name: str) -> str:
    """Returns the command that runs a script of the project from the working directory; "" where there is none."""
    root = Path(__file__).parents[2]
    script = root / "scripts" / name
    if not script.is_file():  # a wheel has none
        return ""
    return shlex.join(["bash", str(script.relative_to(root) if root.samefile(Path.cwd()) else script)])


def check_kind(name: str, value: Any, default: Any) -> None:
    """Raises ValueError for the override of a switch by anything but True or False, or of a number by no number."""
    kinds = (bool,) if isinstance(default, bool) else (int, float)
    if isinstance(default, (int, float)) and value is not None and type(value) not in kinds:
        raise ValueError(f"--model-overrides: {name} {value!r}: pass a value as {default} is")


def replace_closed_outputs() -> None:
    """Makes a standard output or error that is closed the null device, so that no file takes its number."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            stream = open(os.devnull, "w")  # noqa: SIM115, open until the process ends
            os.set_inheritable(stream.fileno(), True)  # for the commands that this one starts
            setattr(sys, name, stream)


def output_fault(error: Optional[Exception] = None) -> str:
    """Writes out what was printed; returns why it cannot be, if so, and drops it, of which Python would complain.

    `error` ended the command. One of a file of the command names that file, see `naming`.
    """
    try:
        if isinstance(error, OSError) and error.errno and not error.filename:
            raise error
        sys.stdout.flush()
    except OSError as fault:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        closed = isinstance(fault, BrokenPipeError)  # the reader of the output has ended, as `head -1` does
        return "standard output is closed" if closed else f"standard output cannot be written ({fault.strerror})"
    return ""
