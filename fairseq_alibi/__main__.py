"""The command `fairseq-alibi`, also `python -m fairseq_alibi`."""

import argparse
import contextlib
import importlib
import io
import logging
import signal
import sys
import threading
import warnings
from typing import Any, NoReturn, Optional

from . import __version__
from .files.errors import output_fault, replace_closed_outputs

#: Subcommands with their summaries. The module of a subcommand is `commands/NAME.py`, with `_` in the place of `-`.
COMMANDS = {
    "plan": "What a training run will take: parameters, memory, FLOPs, and what fits.",
    "evaluate": "Perplexity of checkpoints at many lengths: by windows or as one stream.",
    "eval-lm": "Perplexity at several lengths through fairseq-eval-lm.",
    "report": "Results of several evaluations as tables and plots.",
    "reproduce": "The paper's comparison: all position methods, trained and evaluated alike, on one page.",
    "probe": "Made-up tasks with known answers: what a model finds in its context, near and far.",
    "reach": "How far each head of a model can see, from its weights alone, and how far it looks in a text.",
    "generate": "Text that continues a prompt.",
    "import-checkpoint": "Turns a checkpoint of the ALiBi authors' fairseq fork into one of alibi_lm.",
    "merge-checkpoint": "Makes one file of a checkpoint that sharded training wrote with --use-sharded-state.",
    "export-hf": "Writes a checkpoint as a folder for Hugging Face's transformers: weights, code and tokenizer.",
    "show-bias": "A picture of the ALiBi bias, head by head, causal and in the three forms of encoders.",
    "prepare-text": "Makes a data folder of plain-text files: Moses tokens, BPE, fairseq's binary format.",
    "prepare-wikitext103": "Downloads WikiText-103, checks it and makes a data folder of it.",
    "doctor": "What this environment has, what of it works, and the first thing to fix.",
}


LIBRARIES = r"(?!fairseq_alibi)"  # the modules whose warnings are not about what a command is given

#: The command that installs fairseq, whose own requirements no current pip accepts.
GET_FAIRSEQ = "pip install --no-deps fairseq==0.12.2"


def import_command(name: str) -> Any:
    """Imports the module of a subcommand; if that fails, it ends with one line and status 1."""
    try:
        return importlib.import_module(f".commands.{name.replace('-', '_')}", __package__)
    except Exception as error:  # a broken installation raises anything
        missing = isinstance(error, ModuleNotFoundError) and error.name == "fairseq"
        remedy = f"get it with {GET_FAIRSEQ}; " if missing else ""
        sys.exit(f"fairseq-alibi {name}: {error}; {remedy}see what to fix first: fairseq-alibi doctor")


def import_user_dir(argv: list[str]) -> list[str]:
    """Imports the folder of `--user-dir`, before or behind the subcommand but not `--`; returns the other arguments."""
    end = argv.index("--") if "--" in argv else len(argv)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--user-dir")
    found, others = finder.parse_known_args(argv[:end])
    if found.user_dir is not None:
        from fairseq.utils import import_user_module

        try:
            import_user_module(found)
        except Exception as error:  # the folder's code raises anything
            sys.exit(f"fairseq-alibi: --user-dir {found.user_dir} cannot be imported: {' '.join(str(error).split())}")
    return [*others, *argv[end:]]


def prepare_streams_and_warnings() -> None:
    """Lets every command run with any standard output and any warning filter.

    Characters that the terminal's encoding lacks are written as escapes. With PYTHONWARNINGS=error the warnings of
    libraries are printed and do not end the command.
    """
    if any(option.startswith("error") for option in sys.warnoptions):
        warnings.filterwarnings("default", module=LIBRARIES)
    replace_closed_outputs()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")


def parse_arguments(argv: list[str]) -> tuple[Any, argparse.Namespace]:
    """Returns the module of the subcommand that the arguments name, and the arguments; bad ones end with status 2."""
    argv = import_user_dir(argv)
    parser = argparse.ArgumentParser(prog="fairseq-alibi", description="ALiBi language models for fairseq.")
    parser.add_argument("--user-dir", metavar="DIR", help="folder to import, which may register position methods")
    parser.add_argument("--version", action="version", version=f"fairseq-alibi {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    by_name = {name: subparsers.add_parser(name, help=text, description=text) for name, text in COMMANDS.items()}
    command: Any = None
    passed_on: list[str] = []
    if argv and argv[0] in COMMANDS:  # only this command is imported: doctor has to run where the others cannot
        command = import_command(argv[0])
        logging.getLogger().setLevel(logging.WARNING)  # when imported, fairseq sets it to log its whole configuration
        command.add_arguments(by_name[argv[0]])
    if getattr(command, "PASSES_ARGUMENTS_ON", False) and "--" in argv:
        end = argv.index("--")
        argv, passed_on = argv[:end], argv[end + 1 :]
    for argument in argv:
        if argument.startswith("--") and argument.endswith("=--"):  # argparse would take it for an empty list
            by_name.get(argv[0], parser).error(f"argument {argument[:-3]}: '--' is no value")
    if hasattr(command, "join_processes"):  # the command can run in several processes
        command.join_processes()
    if getattr(command, "ANY_ORDER", False):
        args = by_name[argv[0]].parse_intermixed_args(argv[1:], argparse.Namespace(command=argv[0]))
    else:
        args = parser.parse_args(argv)
    args.passed_on = passed_on
    return command, args


def lock_of(command: Any, args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """Returns the lock on what a command writes, if its module names the argument by `WRITES`."""
    if not hasattr(command, "WRITES"):
        return contextlib.nullcontext()
    from .files.locks import locked  # here, as not every command needs its library

    return locked(getattr(args, command.WRITES))


def interrupt(number: int, _: Any) -> None:
    """The handler of SIGTERM, which ends a command as Ctrl-C does, so that it removes what is half-written."""
    raise KeyboardInterrupt(number)


def exit_interrupted(program: str, interruption: KeyboardInterrupt, note: str = "") -> NoReturn:
    """Ends a command with one line and the status of Ctrl-C or of the signal that `interrupt` took."""
    print(f"{program}: interrupted{note}", file=sys.stderr)
    output_fault()
    sys.exit(128 + (interruption.args or (signal.SIGINT,))[0])


def main(argv: Optional[list[str]] = None) -> None:
    """Runs a subcommand, by default of the command line.

    Bad input ends it with one line and status 1, Ctrl-C and SIGTERM with one line and status 130 or 143.
    """
    prepare_streams_and_warnings()
    argv = sys.argv[1:] if argv is None else argv
    program, command = "fairseq-alibi", None
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, interrupt)
    try:
        command, args = parse_arguments(argv)
        program = f"{program} {args.command}"
        with lock_of(command, args):
            command.run(args)
        message = output_fault()
    except (ValueError, OSError) as error:
        message = output_fault(error) or str(error)
    except KeyboardInterrupt as interruption:
        resumes = getattr(command, "RESUMES", False)
        exit_interrupted(program, interruption, "; start the same command again, and it continues" if resumes else "")
    if message:
        sys.exit(f"{program}: {message}".replace("\n", "\\n"))  # of a file's name


if __name__ == "__main__":
    main()
