"""`fairseq-alibi import-checkpoint`."""

from ..files.import_checkpoint import add_arguments
from ..files.import_checkpoint import main as run

__all__ = ["add_arguments", "run"]
