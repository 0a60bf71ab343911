"""`fairseq-alibi evaluate`."""

from ..evaluation.evaluate import add_arguments, follow
from ..evaluation.evaluate import main as run

__all__ = ["add_arguments", "follow", "run"]
