"""`fairseq-alibi report`."""

from ..evaluation.report import add_arguments
from ..evaluation.report import main as run

__all__ = ["add_arguments", "run"]
