"""Runs a script while no other process runs it for the same output.

    python scripts/with_lock.py results/quickstart bash scripts/quickstart.sh ...

Ends with the status of the script, or with one line and status 1 where another process runs it. The lock is not that of
the output itself, which the commands of the script take when they write there.
"""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from fairseq_alibi.files.locks import locked


def main(output: str, *command: str) -> None:
    """Runs the script under a lock for its output. SIGTERM is passed on to it."""
    script = Path(command[1]).stem
    lock = Path(output).with_name(f"{Path(output).name}.{script}")
    try:
        with locked(lock):
            process = subprocess.Popen(command)

            def stop(*_: Any) -> None:
                process.terminate()

            signal.signal(signal.SIGTERM, stop)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the command too
            status = process.wait()
    except (ValueError, OSError) as error:
        sys.exit(f"{script}: {str(error).replace(str(lock), output, 1)}")
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main(*sys.argv[1:])
