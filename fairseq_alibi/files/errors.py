"""Messages for the user: other libraries' as one line, and commands that can be run as they are printed."""

import shlex
from pathlib import Path


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
