"""fairseq-generate: what its options cannot do with a model ends the command with one line."""

import argparse
import re
from typing import Any, Union

from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.utils import convert_namespace_to_omegaconf

from .option_checks import checked_command
from .patch import CommandError, original

#: Messages of errors in fairseq's generation, as regular expressions, and what the user can do.
REMEDIES = {
    r".*forward\(\) missing .* 'src_lengths' and 'prev_output_tokens'": (
        "--lm-path names a translation model: name a checkpoint of a language model"
    ),
    "'NoneType' object is not iterable": "--constraints come with the sentences of fairseq-interactive: use it",
    "'(steps|history)'": "--print-step and --retain-iter-history are for models that refine their output: drop them",
    "(--replace-unk requires .*)": r"\1; fairseq-interactive needs no data set: use it with --replace-unk=''",
    r"(\d+) < \1": "--prefix-size includes the end of a line, after which a beam finds nothing: pass a smaller one",
}


def generate(cfg: Union[FairseqConfig, argparse.Namespace]) -> Any:
    """Replaces `fairseq_cli.generate.main`, which is called without `call_main`."""
    cfg = convert_namespace_to_omegaconf(cfg) if isinstance(cfg, argparse.Namespace) else cfg
    with checked_command(cfg):
        try:
            return original("fairseq_cli.generate:main")(cfg)
        except (AssertionError, KeyError, TypeError) as error:
            for message, remedy in REMEDIES.items():
                if found := re.fullmatch(message, str(error)):
                    raise CommandError(found.expand(remedy)) from error
            raise
