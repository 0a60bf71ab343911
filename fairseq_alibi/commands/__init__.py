"""The subcommands of fairseq-alibi, one file each, named like the subcommand with `_` in the place of `-`.

Each file has two functions, `add_arguments(parser)` and `run(args)`. `run` raises ValueError or OSError for bad input;
`__main__` prints it as one line and ends with status 1. A file with `PASSES_ARGUMENTS_ON = True` gets what follows `--`
on the command line as the list `args.passed_on`. The one-line summary of a subcommand stands in the table of
`__main__`, which imports only the subcommand that is run.
"""
