"""`fairseq-alibi generate`."""

from ..evaluation.generate import add_arguments
from ..evaluation.generate import main as run

__all__ = ["add_arguments", "run"]
