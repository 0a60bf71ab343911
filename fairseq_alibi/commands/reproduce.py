"""`fairseq-alibi reproduce`."""

from ..experiments.reproduce import add_arguments
from ..experiments.reproduce import main as run

__all__ = ["add_arguments", "run"]
