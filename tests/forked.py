"""Runs a console script in a process forked from one that has imported torch and fairseq, which takes seconds.

The forked process imports `fairseq_alibi` itself, as a new one does. A test of the imports themselves, or one that sets
environment variables that Python or torch reads at its start, needs a new process.
"""

import atexit
import importlib.metadata
import multiprocessing
import os
import sys
from pathlib import Path

#: The console scripts that can be run here.
SCRIPTS = {
    script.name: script.value
    for distribution in importlib.metadata.distributions()
    for script in distribution.entry_points
    if script.group == "console_scripts" and script.value.startswith(("fairseq_cli.", "fairseq_alibi."))
}
CONTEXT = multiprocessing.get_context("forkserver")
#: What the commands import, except for this project's own package.
CONTEXT.set_forkserver_preload(
    [
        *("fairseq_cli.eval_lm", "fairseq_cli.generate", "fairseq_cli.interactive", "fairseq_cli.preprocess"),
        *("fairseq_cli.train", "fairseq_cli.hydra_train", "matplotlib.pyplot", "tabulate", "tensorboardX", "torch"),
        "torch._dynamo",  # every optimizer of torch imports it
    ]
)


def prepare(output, environment, cwd):
    """Makes the forked process like a new one: output to a file, environment, folder, how processes are started."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    tests = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path) not in (tests, tests.parent / "scripts")]
    file = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    multiprocessing.set_start_method("fork", force=True)  # for the workers of a data loader


def run_script(command, output, environment, cwd):
    """In the forked process: calls the function behind a console script, and ends as Python ends a process."""
    prepare(output, environment, cwd)
    module, _, function = SCRIPTS[Path(command[0]).name].partition(":")
    sys.argv = command
    try:
        status = getattr(importlib.import_module(module), function)()
    except SystemExit as exit_:
        status = exit_.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    atexit._run_exitfuncs()  # a process of multiprocessing does not call them
    sys.exit(status)


def start_forked(command, output, cwd, **environment):
    """Starts a console script; returns its process. Output and errors go to the file `output`."""
    process = CONTEXT.Process(target=run_script, args=(command, output, {**os.environ, **environment}, cwd))
    process.start()
    return process


def run_forked(command, output, cwd, timeout=600):
    """Runs a console script to its end; returns its exit status. Output and errors go to the file `output`."""
    process = start_forked(command, output, cwd)
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{command[0]} takes longer than {timeout} seconds: {Path(output).read_text()}")
    return process.exitcode
